"""Studies of architectures: dense models, equal data, paired differences, the report."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ablate_world import study_of
from PIL import Image

from dvpa.ablate.architecture_report import write_architectures
from dvpa.ablate.architectures import compare
from dvpa.ablate.models import DONE
from dvpa.ablate.study import load_study, parse_study
from dvpa.architecture import load_architecture
from dvpa.config import DvpaConfig
from dvpa.evaluate.table import OutcomeTable
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price
from dvpa_train.balance import LoadBalancer, load_metrics
from dvpa_train.point import resolve, train_point

TEXT = "ablation/architecture.yaml"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small text in the place where recipes look for theirs."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(60)]
    lines = [" ".join(rng.choice(words, 9)) for _ in range(900)]
    (tmp_path / "tinyshakespeare.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("DVPA_DATA", str(tmp_path))
    return tmp_path


def test_the_shipped_architectures_are_of_equal_size() -> None:
    study = load_study(TEXT)
    prices = {}
    for variant in study.architectures:
        point = resolve(study.recipe, variant.overrides(), variant.model, 0, is_text=True)
        content = point.model or {}
        config = DvpaConfig(**content) if content else load_architecture("model/text.yaml")
        own = price(config)
        prices[variant.name] = own.total_params - own.head_params, own.tiers[-1].activated_params
    assert study.reference == "DeepSeekMoE"
    total, activated = prices["DeepSeekMoE"]
    sparse = ["Switch", "GShard", "dvpa nested", "dvpa nested one row"]
    for name in ["dense x16", *sparse]:
        assert prices[name][0] == pytest.approx(total, rel=0.02), name
    for name in sparse[1:]:
        assert prices[name][1] == pytest.approx(activated, rel=0.06), name
    assert prices["dense"][1] == pytest.approx(prices["Switch"][1], rel=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "architectures"}, "kind: 'architectures' is not one of maps, architecture"),
        ({"kind": "architecture"}, "maps: unknown key"),
        ({"kind": "architecture", "maps": None}, "maps: unknown key"),
    ],
)
def test_a_wrong_kind_of_study(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_study(study_of(**changes), "small")


def test_a_reference_must_be_one_of_them() -> None:
    content = study_of(kind="architecture", reference={"recipe": "none"})
    del content["maps"]
    with pytest.raises(ValueError, match=r"reference.recipe: 'none' is not one of default, other"):
        parse_study(content, "small")
    with pytest.raises(ValueError, match=r"needs data\.files and calibration"):
        resolve("train/pico.yaml", [], {}, 0, is_text=True)


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    config = DvpaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        first_k_dense_replace=2, num_attention_heads=2, n_group=1, n_routed_experts=2,
        num_experts_per_tok=1, max_position_embeddings=32,
    )  # fmt: skip
    model = DvpaForCausalLM(config).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    cost = price(config)
    assert (cost.total_params, cost.tiers[0].tier_params) == (size, size)
    assert not [name for name, _ in model.named_parameters() if "expert" in name]
    balancer = LoadBalancer(model)
    balancer.update(0.1)
    assert load_metrics(balancer.last_load, config) == {}
    ids = torch.randint(0, 64, (2, 9))
    model.save_pretrained(tmp_path)
    again = DvpaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_points_are_trained_and_compared(corpus: Path) -> None:
    narrow = {"vocab_size": 300, "num_hidden_layers": 1, "difficulty": None}
    single = [{"name": "top", "num_groups": 7, "top_k": 7, "topk_group": 7}]
    single[0]["routed_scaling_factor"] = 2.6
    short = {"stages.train.steps": 2, "data.max_length": 120}
    one = {**short, "stages.train.num_tiers": 1, "stages.train.tier_weights": [1.0]}
    content = {
        "recipe": "train/text.yaml",
        "kind": "architecture",
        "seeds": [0, 1],
        "resamples": 100,
        "reference": {"recipe": "dense"},
        "recipes": [
            {"name": "nested", "model": narrow, "set": short, "note": "all tiers"},
            {
                "name": "dense",
                "model": {**narrow, "first_k_dense_replace": 1, "tiers": single},
                "set": one,
            },
        ],
    }
    study, out = parse_study(content, "small"), corpus / "out"
    points = {}
    for variant in study.architectures:
        for seed in study.seeds:
            point = resolve(study.recipe, variant.overrides(), variant.model, seed, is_text=True)
            points[variant.name, seed] = point
            point.write(out / "models" / point.key)
            train_point(out / "models" / point.key)
    assert len({point.key for point in points.values()}) == 4
    results = compare(study, out, points)
    rows = results["architectures"]
    assert [row["label"] for row in rows] == [
        "nested, base", "nested, middle", "nested, top", "dense"
    ]  # fmt: skip
    assert all(4 < row["nll"]["mean"] < 9 for row in rows)
    assert rows[0]["activated_params"] < rows[1]["activated_params"] < rows[2]["activated_params"]
    assert rows[0]["training_flops"] == rows[2]["training_flops"] > rows[3]["training_flops"]
    assert "minus_reference" not in rows[3]
    for row in rows[:3]:
        wanted = row["nll"]["mean"] - rows[3]["nll"]["mean"]
        assert row["minus_reference"]["difference"] == pytest.approx(wanted, abs=1e-9)
    files = write_architectures(results, out)
    page = files["report.html"].read_text()
    assert "nested, middle" in page and "all tiers" in page
    with Image.open(files["flops.png"]) as image:
        assert image.width > 1000
    assert json.loads(files["results.json"].read_text()) == results


def test_other_passages_are_refused(tmp_path: Path) -> None:
    content = study_of(kind="architecture", seeds=[0])
    del content["maps"]
    study, points = parse_study(content, "small"), {}
    for place, name in enumerate(("default", "other")):
        folder = tmp_path / "models" / name
        nll = np.full((3, 1), 2.0)
        OutcomeTable(
            ids=[f"{place}-{i}" for i in range(3)], level=np.zeros(3, int), kind=["t"] * 3,
            prompt_tokens=np.full(3, 4), quality=np.exp(-nll), nll=nll,
            difficulty=np.full(3, np.nan), completion_tokens=np.full((3, 1), 4),
        ).save_jsonl(folder / "outcomes" / "held_out.jsonl")  # fmt: skip
        stage = {"tokens": 1, "seconds": 1.0}
        done = {"tier_names": ["top"], "whole_costs": [1.0], "flops_per_token": [2.0],
                "total_params": 1, "training_flops": 1.0, "stages": [stage]}  # fmt: skip
        (folder / DONE).write_text(json.dumps(done))
        points[name, 0] = SimpleNamespace(key=name)
    with pytest.raises(ValueError, match="recipes: other: scored on other passages than default"):
        compare(study, tmp_path, points)  # type: ignore[arg-type]
