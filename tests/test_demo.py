"""`dvpa demo` at pico size: its files, the schema of its report, baselines, several seeds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dvpa.config import DvpaConfig
from dvpa.model.answer import answer, load
from dvpa.pricing import price
from dvpa_train.baselines import single_tier
from dvpa_train.demo import run_demo

RECIPE = "train/pico.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one pico demo with baselines."""
    out = tmp_path_factory.mktemp("demo") / "run"
    run_demo(out, seed=1, baselines=True, recipe=RECIPE)
    return out


def test_report_has_what_others_rely_on(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    names = [tier["name"] for tier in report["tiers"]]
    assert names == ["base", "middle", "top"]
    for tier in report["tiers"]:
        assert tier.keys() >= {"activated_params", "quality", "quality_by_level"}
        assert len(tier["quality_by_level"]) == len(report["levels"])
    rows = report["routers"]
    assert rows.keys() >= {"adaptive", "random", "length", "oracle", "always_base", "always_top"}
    for row in rows.values():
        assert row["ci95"][0] <= row["quality"] <= row["ci95"][1]
        assert row["mean_activated_params"] > 0
    assert all(
        row["ms_per_request"] > 0
        for name, row in rows.items()
        if "fixed" not in name and "specialist" not in name
    )  # measured
    expected = {"apgr", "ece_by_tier", "seeds", "wall_seconds", "environment", "stages"}
    assert report.keys() >= expected
    assert report["seeds"] == [1]
    assert len(report["samples"]) == 5
    assert (finished / "report.html").stat().st_size > 10_000
    assert (finished / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_baselines_spend_the_nested_runs_flops(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    nested = sum(stage["training_flops"] for stage in report["stages"])
    rows = report["routers"]
    for name in ("base", "middle", "top"):
        assert rows[f"fixed_{name}"]["training_flops"] == pytest.approx(nested, rel=0.1)
    specialists = sum(rows[f"specialist_{n}"]["training_flops"] for n in ("base", "middle", "top"))
    assert specialists == pytest.approx(nested, rel=0.1)
    tokens = [
        rows[f"specialist_{n}"]["training_flops"] / rows[f"specialist_{n}"]["mean_activated_params"]
        for n in ("base", "middle", "top")
    ]
    assert max(tokens) == pytest.approx(min(tokens), rel=0.1)


def test_the_checkpoint_answers_at_once(finished: Path) -> None:
    model, tokenizer = load(finished / "checkpoint")
    report = json.loads((finished / "report.json").read_text())
    for sample in report["samples"]:
        (given,) = answer(model, tokenizer, [sample["question"]], max_new_tokens=16)
        assert given.text == sample["text"]
        assert given.telemetry.tier == sample["telemetry"]["tier"]
        assert given.telemetry.decided_by == "tier_map"


def test_two_seeds_are_joined(tmp_path: Path) -> None:
    report = run_demo(tmp_path, seeds=2, recipe=RECIPE)
    assert report["seeds"] == [0, 1]
    singles = [
        json.loads((tmp_path / f"seed-{seed}" / "seed_report.json").read_text()) for seed in (0, 1)
    ]
    mean = sum(single["routers"]["adaptive"]["quality"] for single in singles) / 2
    assert report["routers"]["adaptive"]["quality"] == pytest.approx(mean)


def test_a_worker_ends_when_its_parent_is_gone() -> None:
    code = "import time; from dvpa_train.demo import _end_with; _end_with(-1); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 1


def test_an_ordinary_moe_of_the_same_size_costs_the_same() -> None:
    tiers = [
        {"name": "a", "num_groups": 1, "top_k": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        {"name": "b", "num_groups": 4, "top_k": 4, "topk_group": 4, "routed_scaling_factor": 2.0},
    ]
    nested = DvpaConfig(n_routed_experts=16, n_group=4, tiers=tiers)
    alone = single_tier(nested, num_groups=1, top_k=1)
    assert price(alone).tiers[0].activated_params == price(nested).tiers[0].activated_params
    ordinary = single_tier(nested, num_groups=4, top_k=4)
    assert price(ordinary).total_params == price(nested).total_params


def test_no_seeds_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds"):
        run_demo(tmp_path, seeds=0)
