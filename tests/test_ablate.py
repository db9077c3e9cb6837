"""`dvpa ablate`: studies are read strictly, jobs survive a kill, maps are judged on fresh data."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ablate_world import NAMES, model, study_of

from dvpa.ablate.jobs import Job, run_jobs
from dvpa.ablate.measure import load_point, measure_map, measure_model, save_point
from dvpa.ablate.run import only_one
from dvpa.ablate.study import MapVariant, load_study, parse_study
from dvpa.ablate.summary import paired, spread
from dvpa.ablate.sweep import MapFitter, most_mixed_kind, sweep_map
from dvpa.cli import main
from dvpa.config import load_yaml
from dvpa.evaluate.rivals import mean_by_kind, rival_choices
from dvpa.evaluate.selective import risk_coverage
from dvpa_train.point import resolve

REPOSITORY = Path(__file__).resolve().parent.parent
STUDIES = sorted((REPOSITORY / "configs" / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_resolve(path: Path) -> None:
    study = load_study(path)
    keys = {
        resolve(
            study.recipe,
            recipe.overrides(),
            recipe.model,
            study.seeds[0],
            is_text=bool(study.architectures),
        ).key
        for recipe in study.recipes
    }
    assert len(keys) == len(study.recipes)


def test_the_nano_study_is_the_one_that_was_promised() -> None:
    study = load_study("ablation/nano.yaml")
    assert len(study.configurations) == 24
    assert len(study.seeds) >= 3
    assert study.configurations[0].name == "default / gain"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": []}, "maps: must be a list"),
        ({"mpas": []}, "mpas: unknown key"),
        ({"recipe": 3}, "recipe: the name"),
        ({"seeds": [1, 1]}, "seeds:"),
        ({"workers": 0}, "workers: 0"),
        ({"wandb_mode": "on"}, "wandb_mode: 'on'"),
        ({"reference": {"map": "none"}}, "reference.map: 'none' is not one of gain, dear"),
        ({"random": {"configurations": 9}}, "random.configurations: 9 is more than the 4"),
        ({"recipes": [{"name": "a"}, {"name": "a"}]}, "recipes: the name 'a' comes twice"),
        ({"recipes": [{"name": "a", "set": {"seed": 1}}]}, "recipes[0].set.seed"),
        ({"recipes": [{"name": "a", "grid": {"x": [1]}}]}, "recipes[0].grid.x: must begin"),
        ({"maps": [{"name": "a"}]}, "maps[0]: give one of budget, shares, cuts"),
        ({"maps": [{"name": "a", "budget": "much"}]}, "maps[0].budget: 'much'"),
        ({"maps": [{"name": "a", "budget": "25ms"}]}, "maps[0].budget: '25ms' is in ms"),
        ({"maps": [{"name": "a", "budget": "60%", "alpha": 1}]}, "maps[0].alpha: 1"),
        ({"maps": [{"name": "a", "budget": "60%", "upper_cut": True}]}, "maps[0].upper_cut"),
        ({"maps": [{"name": "a", "shares": [0.5, 0.5]}]}, "maps[0].shares: needs kind: threshold"),
        (
            {"maps": [{"name": "a", "kind": "threshold", "shares": [0.5, 0.4]}]},
            "maps[0].shares: [0.5, 0.4] must add up to 1",
        ),
        ({"maps": [{"name": "a", "budget": "60%", "grid": {"budgte": ["1"]}}]}, "grid.budgte"),
        (
            {"maps": [{"name": "a", "budget": "60%", "escalation": {"uper": 0.5}}]},
            "maps[0].escalation.uper: unknown key",
        ),
        (
            {"maps": [{"name": "a", "budget": "60%", "escalation": {"upper": 2.0}}]},
            "maps[0].escalation.lower, upper: 0.4, 2.0 must be",
        ),
        (
            {"maps": [{"name": "a", "budget": "60%", "tiers": ["base", "top"], "escalation": {}}]},
            "maps[0].escalation: needs a map of all tiers",
        ),
    ],
)
def test_a_wrong_study_names_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        parse_study(study_of(**changes), "small")


def test_grids_multiply_and_samples_keep_the_reference() -> None:
    grid = {"name": "g", "grid": {"budget": ["50%", "70%"], "kind": ["gain", "threshold"]}}
    recipe = {"name": "r", "grid": {"set.stages.joint.steps": [4, 8]}}
    content = study_of(maps=[grid], recipes=[recipe])
    study = parse_study(content, "small")
    assert len(study.configurations) == 8
    assert study.configurations[0].name == "r steps=4 / g budget=50% kind=gain"
    assert study.configurations[-1].recipe.set == {"stages.joint.steps": 8}
    chosen = {"map": "g budget=70% kind=gain", "recipe": "r steps=8"}
    sampled = parse_study(
        content | {"reference": chosen, "random": {"configurations": 3, "seed": 1}}, "small"
    )
    assert len(sampled.configurations) == 3
    assert sampled.configurations[0].name == "r steps=8 / g budget=70% kind=gain"


def test_a_point_is_known_by_what_it_depends_on() -> None:
    def key(overrides: list[str], model: dict[str, Any] | None = None, seed: int = 0) -> str:
        return resolve("train/pico.yaml", overrides, model or {}, seed).key

    plain = key([])
    same = ["checkpoint_every=7", "log_every=1", "calibration.budget=80%", "name=x"]
    assert key(same) == plain
    assert key([], {"tiers.top.routed_scaling_factor": 2.0}) == plain  # what it is anyway
    others = [
        key(["stages.joint.steps=8"]),
        key(["calibration.items=80"]),
        key([], {"norm_topk_prob": False}),
        key([], seed=1),
    ]
    assert len({plain, *others}) == 5
    with pytest.raises(ValueError, match="'step' is not accepted"):
        key(["stages.joint.step=8"])
    with pytest.raises(ValueError, match="norm_topk"):
        key([], {"norm_topk": False})


def test_a_map_is_judged_on_the_test_split_at_equal_cost() -> None:
    result, values = measure_map(model(), MapVariant("gain", budget="50%"))
    rows = result["routers"]
    target = result["mean_activated_params"]
    assert abs(result["budget"]["deviation"]) < 0.05
    assert result["budget"]["realised"] == pytest.approx(target)
    for name in ("length", "entropy", "dataset_oracle", "oracle_at_budget"):
        assert rows[name]["mean_activated_params"] <= target * 1.01
    assert rows["adaptive"]["quality"] > rows["length"]["quality"] + 0.03
    assert rows["adaptive"]["quality"] > rows["entropy"]["quality"] + 0.03
    assert rows["oracle"]["quality"] >= rows["oracle_at_budget"]["quality"]
    assert rows["oracle_at_budget"]["quality"] >= rows["adaptive"]["quality"]
    assert result["mixed_kind"] == "graded"
    assert result["apgr"] > 0.6
    assert result["mixed_kind_apgr"] > 0.6
    assert max(result["ece_by_tier"]) < 0.1  # of 67 requests a bin: mostly chance
    assert sum(map(sum, result["confusion"])) == len(model().parts["test"])
    assert values["adaptive"].mean() == pytest.approx(result["quality"])


def test_maps_over_some_tiers_and_placed_cuts() -> None:
    test = model().parts["test"]
    two = MapFitter(model(), MapVariant("two", "threshold", "50%", tiers=("base", "top"))).fit()
    assert set(two.tiers(test.difficulty)) == {0, 2}
    assert len(two.tier_map.thresholds) == 1
    shares = MapVariant("shares", "threshold", shares=(0.5, 0.3, 0.2))
    placed = MapFitter(model(), shares).fit().tiers(model().parts["calibrate"].difficulty)
    assert np.bincount(placed) / len(placed) == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    cuts = MapVariant("cuts", "threshold", cuts=(0.25, 0.75))
    fitter = MapFitter(model(), cuts)
    assert fitter.limit is None
    assert np.array_equal(
        fitter.fit().tiers(test.difficulty), np.digitize(test.difficulty, [0.25, 0.75])
    )
    assert len(sweep_map(fitter).cost) == 1
    with pytest.raises(ValueError, match="tiers: 'huge' is not one of base, middle, top"):
        MapFitter(model(), replace(cuts, tiers=("base", "huge")))
    with pytest.raises(ValueError, match=r"cuts: .* must have 2 numbers"):
        MapFitter(model(), replace(cuts, cuts=(0.5,)))


def test_a_guard_that_no_budget_can_pay_is_an_error() -> None:
    variant = MapVariant("guard", budget="30%", alpha=0.001)
    with pytest.raises(ValueError, match="cannot be kept"):
        measure_map(model(), variant)


def test_the_model_row_and_the_stored_point(tmp_path: Path) -> None:
    found = measure_model(model())
    assert [tier["name"] for tier in found["tiers"]] == NAMES
    assert found["apgr"]["oracle"] > found["apgr"]["random"]
    point = measure_map(model(), MapVariant("gain", budget="50%"))
    save_point(tmp_path, "key", point)
    results, values = load_point(tmp_path, "key")
    assert results["quality"] == point[0]["quality"]
    assert np.allclose(values["adaptive"], point[1]["adaptive"])


def test_fewer_requests_are_the_first_ones() -> None:
    few = model().first(100)
    assert few.parts["fit"].ids == model().parts["fit"].ids[:100]
    assert len(few.scores["entropy"].calibrate) == 100
    assert len(few.parts["test"]) == len(model().parts["test"])
    with pytest.raises(ValueError, match="items: 601"):
        model().first(601)


def test_the_dataset_oracle_knows_kinds_only() -> None:
    parts = model().parts
    test = parts["test"]
    costs = model().costs(test)
    target = float(costs[:, 1].mean())
    prices = costs.mean(axis=0).tolist()
    rivals = rival_choices(parts["fit"], parts["calibrate"], test, prices, NAMES, costs, target)
    tiers = rivals["dataset_oracle"].tiers
    # `flat` requests gain nothing at a higher tier.
    assert set(tiers[np.array(test.kind) == "flat"]) == {0}
    assert len(np.unique(mean_by_kind(test), axis=0)) == 2
    assert most_mixed_kind(parts["calibrate"]) == "graded"


def test_risk_coverage_of_a_known_order() -> None:
    quality = np.array([1.0, 1.0, 0.0, 0.0])
    right = risk_coverage([0.9, 0.8, 0.2, 0.1], quality, points=4)
    assert right["risk"] == pytest.approx([0.0, 0.0, 1 / 3, 0.5])
    assert right["aurc"] == pytest.approx(right["aurc_oracle"])
    blind = risk_coverage(np.full(4, 0.5), quality, points=4)
    assert blind["risk"] == pytest.approx([0.5] * 4)
    with pytest.raises(ValueError, match=r"\[N >= 1\]"):
        risk_coverage([], [])


def test_paired_intervals_hold_the_seeds_noise() -> None:
    rng = np.random.default_rng(0)
    steady = [rng.normal(0.1, 0.1, 400) for _ in range(3)]
    found = paired(steady, 500)
    assert found["ci95"][0] > 0
    wild = [rng.normal(mean, 0.1, 400) for mean in (-0.2, 0.1, 0.4)]
    apart = paired(wild, 500)
    assert apart["ci95_requests"][0] > 0 > apart["ci95"][0]
    assert apart["ci95_seeds"][0] < 0
    assert spread([1.0, None])["mean"] is None
    assert spread([1.0, 2.0, 3.0])["mean"] == 2.0


def job(folder: Path, name: str, program: str, after: Job | None = None) -> Job:
    done = folder / name
    command = [sys.executable, "-c", program, str(done)]
    return Job(name, command, folder / f"{name}.log", done.is_file, after)


MARK = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x')"


def test_jobs_run_once_and_a_failure_stops_only_what_needs_it(tmp_path: Path) -> None:
    bad = job(tmp_path, "bad", "raise SystemExit('no luck')")
    child = job(tmp_path, "child", MARK, after=bad)
    good = job(tmp_path, "good", MARK)
    heir = job(tmp_path, "heir", MARK, after=good)
    said: list[str] = []
    failed = run_jobs([heir, child, bad, good], 2, said.append)
    assert failed == [bad, child]
    assert heir.is_done()
    assert any("no luck" in line for line in said)
    before = (tmp_path / "good").stat().st_mtime_ns
    assert run_jobs([good, heir], 2, said.append) == []
    assert (tmp_path / "good").stat().st_mtime_ns == before


def test_one_command_at_a_time(tmp_path: Path) -> None:
    message = "another `dvpa ablate`"
    with only_one(tmp_path), pytest.raises(ValueError, match=message), only_one(tmp_path):
        raise AssertionError("entered twice")


def test_bad_input_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(study_of(recipes=[{"name": "a", "set": {"stages.joint.setps": 1}}])))
    assert main(["ablate", str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "recipes: a" in message and "setps" in message
    maps = [{"name": "a", "budget": "60%", "tiers": ["base", "huge"]}]
    path.write_text(json.dumps(study_of(maps=maps)))
    assert main(["ablate", str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "maps: a: tiers: 'huge' is not one of base, middle, top" in message
    assert not (tmp_path / "out").exists()


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    content = load_yaml(REPOSITORY / "configs" / "ablation" / "pico.yaml")
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(json.dumps(content | {"workers": 1}))
    command = [sys.executable, "-m", "dvpa", "ablate", str(study), "--out", str(out)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(out.glob("models/*/point.json"))) == 1)
        wait_for(lambda: len(list(out.glob("models/*/logs/metrics.csv"))) == 2)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not (out / "results.json").exists()
    assert children
    wait_for(lambda: not any(is_running(int(pid)) for pid in children), 10)
    (done,) = out.glob("models/*/point.json")
    before = done.stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "2 trainings (1 done)" in again.stderr
    assert done.stat().st_mtime_ns == before
    results = json.loads((out / "results.json").read_text())
    assert [len(row["frontier"]) for row in results["configurations"]] == [2] * 4
    assert (out / "report.html").stat().st_size > 10_000
    third = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, check=True)
    assert json.loads(third.stdout) == results
