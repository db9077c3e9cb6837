"""The report of `dvpa ablate`: what it draws is what the points hold."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ablate_world import NAMES, model, study_of
from PIL import Image

from dvpa.ablate.load import read_load
from dvpa.ablate.measure import measure_folder
from dvpa.ablate.models import DONE, MeasuredModel
from dvpa.ablate.report import write_study
from dvpa.ablate.study import Study, parse_study
from dvpa.ablate.summary import summarise
from dvpa.ablate.surface import STEPS, threshold_surfaces

FIGURES = ("frontier", "calibration", "risk_coverage", "confusion", "thresholds", "load")


def leave(folder: Path, own: MeasuredModel) -> None:
    """What a training point of `own` leaves behind."""
    for part, table in {**own.parts, "test_whole": own.whole}.items():
        table.save_jsonl(folder / "outcomes" / f"{part}.jsonl")
    content: dict[str, Any] = {
        "seed": own.seed, "tier_names": own.tier_names, "whole_costs": own.whole_costs,
        "total_params": 1000, "overhead": own.overhead.tolist(), "training_flops": 1e9,
        "stages": [{"seconds": 1.0}],
        "scores": {name: {p: getattr(scores, p).tolist() for p in ("fit", "calibrate", "test")}
                   for name, scores in own.scores.items()},
    }  # fmt: skip
    (folder / DONE).write_text(json.dumps(content))
    (folder / "logs" / "load").mkdir(parents=True)
    with (folder / "logs" / "load" / "step-00000009.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "tier", "group", "expert", "rows"])
        for layer in (1, 2):
            for tier, name in enumerate(NAMES):
                for expert in range(2 * (tier + 1)):
                    writer.writerow([layer, name, expert // 2, expert, 10 + layer * expert])
    lines = ["step,balance/max_violation/base,balance/max_violation/top", "5,0.5,", "9,0.25,0.75"]
    (folder / "logs" / "metrics.csv").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path, dict[str, Any]]:
    """A study of one recipe, two maps and two seeds, with all that its report needs."""
    out = tmp_path_factory.mktemp("study")
    study = parse_study(
        study_of(recipes=[{"name": "default"}], seeds=[0, 1], resamples=100), "small"
    )
    points = {}
    for seed in study.seeds:
        leave(out / "models" / f"m{seed}", model(seed))
        points["default", seed] = SimpleNamespace(key=f"m{seed}")
        variants = {"maps": [asdict(variant) for variant in study.maps_of("default")]}
        measure_folder(out, f"m{seed}", variants)
    return study, out, summarise(study, out, points)  # type: ignore[arg-type]


def test_a_report_has_every_figure_in_both_appearances(
    finished: tuple[Study, Path, dict[str, Any]],
) -> None:
    _, out, results = finished
    files = write_study(results, out)
    assert set(files) == {"results.json", "report.html", *(f"{name}.png" for name in FIGURES)}
    page = files["report.html"].read_text()
    assert page.count("<img ") == len(FIGURES)
    assert page.count("prefers-color-scheme: dark") >= len(FIGURES)
    for name in FIGURES:
        with Image.open(files[f"{name}.png"]) as image:
            assert image.width > 1000
            assert len(image.getcolors(1 << 24) or ()) > 20
    assert json.loads(files["results.json"].read_text()) == results
    for words in ("seeds 0, 1", "MaxVio", "middle in the middle"):
        assert words in page


def test_what_is_drawn_of_the_reference(finished: tuple[Study, Path, dict[str, Any]]) -> None:
    _, _, results = finished
    (risk,) = results["risk_coverage"]
    row = results["configurations"][0]
    for seed in (0, 1):
        assert risk["risk"][seed][-1] == pytest.approx(1 - row["quality"]["per_seed"][seed])
        assert risk["oracle"][seed][-1] == pytest.approx(risk["risk"][seed][-1], abs=1e-6)
        assert np.all(np.array(risk["oracle"][seed]) <= np.array(risk["risk"][seed]) + 1e-6)
        assert set(results["calibration"][seed]["tier"]) == set(NAMES)
    (surface,) = results["surfaces"]
    assert surface["best"]["relative_cost"] <= row["relative_cost"]["mean"]
    low, high = surface["at_this_cost"]
    assert low <= high <= surface["best"]["quality"]


def test_a_surface_holds_what_its_two_cuts_give() -> None:
    own = model(0)
    (surface,) = threshold_surfaces([own], cost=0.5)
    test, share = own.parts["test"], surface["share"]
    prices = own.costs(test) + own.overhead
    calibrate = np.sort(own.parts["calibrate"].difficulty)
    for i, j in ((4, 12), (0, 10), (7, 7), (3, STEPS)):
        quality, cost = 0.0, 0.0
        for row, difficulty in enumerate(test.difficulty):
            first, second = (
                {0.0: -np.inf, 1.0: np.inf}.get(s, np.quantile(calibrate, s))
                for s in (share[i], share[j])
            )
            tier = 0 if difficulty < first else 1 if difficulty < second else 2
            quality += test.quality[row, tier] / len(test)
            cost += prices[row, tier] / len(test) / own.whole_costs[-1]
        assert surface["quality"][i][j] == pytest.approx(quality, abs=1e-5)
        assert surface["relative_cost"][i][j] == pytest.approx(cost, abs=1e-5)
    assert surface["quality"][5][4] is None
    assert surface["cut"][0] is None and surface["cut"][-1] is None


def test_load_of_a_known_log(tmp_path: Path) -> None:
    assert read_load(tmp_path) == {}
    leave(tmp_path, model(0))
    load = read_load(tmp_path)["base"]  # rows 10, 11 in layer 1 and 10, 12 in layer 2
    assert load["max_violation"] == pytest.approx((11 / 10.5 + 12 / 11) / 2 - 1)
    assert load["worst_layer"] == pytest.approx(12 / 11 - 1)
    assert (load["dead_experts"], load["experts"]) == (0, 4)
    assert load["group_share"] == [1.0]
    assert (load["steps"], load["violation"]) == ([5, 9], [0.5, 0.25])
    assert read_load(tmp_path)["top"]["steps"] == [9]
    assert sum(read_load(tmp_path)["top"]["group_share"]) == pytest.approx(1.0, abs=1e-4)
