"""One tier map on one model's outcomes: what it does on fresh requests, beside what others do.

A map is fitted on the fit and calibrate splits and judged on the test split. Its price holds
everything that a routed request costs, scoring included, so the budget does too. N requests, T
tiers.

`python -m dvpa.ablate.measure OUT MODEL` measures every map of OUT/study.json on one model, and
skips what is there. A point is two files: `KEY.npz`, the quality of each test request under each
router, then `KEY.json`, whose presence says that the point is complete.
"""

import io
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.ablate.escalated import answer_escalating
from dvpa.ablate.models import MeasuredModel, load_model
from dvpa.ablate.study import MEASURE_VERSION, MapVariant, digest
from dvpa.ablate.sweep import Fitted, MapFitter, most_mixed_kind, sweep_map
from dvpa.engine.escalation import EscalationParams
from dvpa.evaluate.baselines import random_mix, spent
from dvpa.evaluate.metrics import apgr, cpt, pgr
from dvpa.evaluate.reliability import reliability
from dvpa.evaluate.replacing import write_atomically
from dvpa.evaluate.report import calibration_errors, finite
from dvpa.evaluate.rivals import Choice, rival_choices
from dvpa.evaluate.routing import difficulty_metrics, routing_frontier
from dvpa.evaluate.selective import risk_coverage
from dvpa.tiers.guard import StayLow
from dvpa.tiers.tier_map import TierMap

FloatArray = npt.NDArray[np.float64]
POINTS = "points"
Point = tuple[dict[str, Any], dict[str, FloatArray]]


def measure_map(model: MeasuredModel, variant: MapVariant, folder: Path | None = None) -> Point:
    """The numbers of one map point, and the quality of each test request [N] by router.

    `folder`: the model's, for variants with escalation. Their budget, frontier, APGR and
    calibration are of the map alone; everything else is of what the engine did.

    Raises:
        ValueError: the variant names other tiers than the model has, or its budget or guard cannot
            be kept.
    """
    model = model.first(variant.items) if variant.items else model
    test = model.parts["test"]
    fitter = MapFitter(model, variant)
    fitted = fitter.fit()
    tiers = fitted.tiers(test.difficulty)
    costs = model.costs(test)
    adaptive = Choice(tiers, costs + model.overhead)
    planned, escalated = spent(adaptive.prices, tiers), None
    if variant.escalation is not None:
        assert folder is not None
        params = EscalationParams(**variant.escalation)
        escalated = answer_escalating(folder, model, fitted.tier_map, params)
        tiers = escalated.tiers
        adaptive = Choice(tiers, np.repeat(escalated.cost[:, None], len(model.tier_names), axis=1))
    target = spent(adaptive.prices, tiers)
    choices, values = _choices(model, adaptive, target)
    if escalated is not None:
        values["adaptive"] = escalated.quality
    oracle = test.quality.argmax(axis=1)  # the cheapest tier that does best
    whole = model.whole.quality.mean(axis=0)
    base, top = ((model.whole_costs[t], float(whole[t])) for t in (0, -1))
    curve = sweep_map(fitter)
    kind = most_mixed_kind(model.parts["calibrate"])
    quality = float(values["adaptive"].mean())
    limit = fitter.limit
    result: dict[str, Any] = {
        "seed": model.seed,
        "budget": {
            "limit": limit,
            "realised": planned,
            "deviation": None if limit is None else planned / limit - 1.0,
        },
        "quality": quality,
        "mean_activated_params": target,
        "relative_cost": target / top[0],
        "quality_kept": quality / top[1] if top[1] > 0 else None,
        "pgr": pgr(quality, base[1], top[1]),
        "apgr": apgr(curve.cost, curve.quality, base, top),
        "cpt": {str(p): cpt(curve.cost, curve.quality, base, top, p) for p in (50, 80, 95)},
        "mixed_kind": kind,
        "mixed_kind_apgr": curve.apgr_within(kind),
        "gap_at_oracle": float(values["oracle_at_budget"].mean()) - quality,
        **_calibration(model, fitted),
        "stay_low": _stay_low(tiers, test.quality),
        "routers": {
            name: _row(values[name], choice, len(model.tier_names), top[0])
            for name, choice in choices.items()
        },
        "confusion": _confusion(tiers, oracle, len(model.tier_names)),
        "frontier": {"cost": curve.cost, "quality": curve.quality},
        "tier_map": json.loads(fitted.tier_map.to_json()),
        "map_tiers": [model.tier_names[t] for t in fitted.columns],
    }
    if escalated is not None:
        share = float((escalated.times > 0).mean())
        result["escalation"] = {**asdict(params), "share_escalated": share}
    return result, values


def measure_model(model: MeasuredModel) -> dict[str, Any]:
    """What does not depend on the tier map: tiers, difficulty, the frontiers of others."""
    test, whole = model.parts["test"], model.whole
    levels = sorted(set(test.level.tolist()))
    tfidf = model.scores.get("tfidf")
    costs = model.costs(test)
    names = model.tier_names
    prices = model.costs(model.parts["calibrate"]).mean(axis=0).tolist()
    untrained = replace(TierMap.untrained(names, prices), kind="gain")
    curves = routing_frontier(
        model.parts["fit"], model.parts["calibrate"], test, untrained,
        overhead=model.overhead.tolist(), request_costs=costs, seed=model.seed,
    )  # fmt: skip
    mean = whole.quality.mean(axis=0)
    base, top = ((model.whole_costs[t], float(mean[t])) for t in (0, -1))
    return {
        "seed": model.seed,
        "requests": digest(test.ids),
        "num_requests": {name: len(table) for name, table in model.parts.items()},
        "levels": levels,
        "tiers": [
            {
                "name": name,
                "activated_params": model.whole_costs[t],
                "quality": float(mean[t]),
                "quality_read_by_base": float(test.quality[:, t].mean()),
                "quality_by_level": [
                    float(whole.quality[whole.level == level, t].mean()) for level in levels
                ],
                "nll": float(whole.nll[:, t].mean()),
            }
            for t, name in enumerate(names)
        ],
        "overhead": model.overhead.tolist(),
        "difficulty": difficulty_metrics(test, None if tfidf is None else tfidf.test),
        "frontier": curves,
        "apgr": {
            name: apgr(curve["cost"], curve["quality"], base, top) for name, curve in curves.items()
        },
    }


def _choices(
    model: MeasuredModel, adaptive: Choice, target: float
) -> tuple[dict[str, Choice | None], dict[str, FloatArray]]:
    """Every router, and the quality of each test request under it; None for the coin's choice."""
    parts, test = model.parts, model.parts["test"]
    costs = model.costs(test)
    prices = model.costs(parts["calibrate"]).mean(axis=0).tolist()
    whole_prices = np.asarray(model.whole_costs)
    rivals = rival_choices(
        parts["fit"], parts["calibrate"], test, prices, model.tier_names, costs, target,
        scores=model.scores, seed=model.seed,
    )  # fmt: skip
    choices: dict[str, Choice | None] = {"adaptive": adaptive, "random": None, **rivals}
    values = {
        name: choice.quality(test.quality) for name, choice in choices.items() if choice is not None
    }
    mix = random_mix(costs.mean(axis=0), target)
    values["random"] = mix.expected(test.quality)
    for tier, name in enumerate(model.tier_names):
        always = Choice(np.full(len(test), tier, dtype=np.int64), whole_prices)
        choices[f"always_{name}"] = always
        values[f"always_{name}"] = always.quality(model.whole.quality)
    return choices, values


def _row(quality: FloatArray, choice: Choice | None, num_tiers: int, top: float) -> dict[str, Any]:
    """One router; the coin spends what adaptive does, by construction."""
    row: dict[str, Any] = {"quality": float(quality.mean())}
    if choice is not None:
        cost = spent(choice.prices, choice.tiers)
        share = np.bincount(choice.tiers, minlength=num_tiers) / len(choice.tiers)
        row |= {"mean_activated_params": cost, "relative_cost": cost / top}
        row["tier_share"] = share.tolist()
    return row


def _calibration(model: MeasuredModel, fitted: Fitted) -> dict[str, Any]:
    """Errors and curves of the success that the map promises, for the tiers it may use."""
    test = fitted.narrow(model.parts["test"])
    errors = calibration_errors(fitted.tier_map, test)
    success = fitted.tier_map.success(test.difficulty)
    chosen = fitted.tier_map.tiers(test.difficulty)
    rows = np.arange(len(chosen))
    return {
        **errors,
        "reliability": reliability(fitted.tier_map, test),
        "risk_coverage": risk_coverage(success[rows, chosen], test.quality[rows, chosen]),
    }


def _stay_low(tiers: npt.NDArray[np.int64], quality: FloatArray) -> dict[str, Any]:
    found = StayLow.of(tiers, quality)
    rate = found.failures / found.kept if found.kept else None
    return {"kept": found.kept, "failures": found.failures, "rate": rate}


def _confusion(
    tiers: npt.NDArray[np.int64], oracle: npt.NDArray[np.int64], num_tiers: int
) -> list[list[int]]:
    """Requests by the oracle's tier (rows) and the map's (columns)."""
    table = np.zeros((num_tiers, num_tiers), dtype=np.int64)
    np.add.at(table, (oracle, tiers), 1)
    return table.tolist()


def save_point(folder: Path, key: str, point: Point) -> None:
    """Write a point; the JSON file last."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    columns = {name: values.astype(np.float32) for name, values in point[1].items()}
    np.savez_compressed(buffer, allow_pickle=False, **columns)
    write_atomically(folder / f"{key}.npz", buffer.getvalue())
    write_atomically(folder / f"{key}.json", json.dumps(finite(point[0]), allow_nan=False))


def load_point(folder: Path, key: str) -> Point:
    """Read what `save_point` wrote."""
    with np.load(folder / f"{key}.npz", allow_pickle=False) as columns:
        values = {name: columns[name].astype(float) for name in columns.files}
    return json.loads((folder / f"{key}.json").read_text()), values


def point_key(model: str, variant: MapVariant) -> str:
    """Of the files of a map point."""
    return f"{model}-{variant.key()}"


def model_key(model: str) -> str:
    """Of the file of a model."""
    return f"{model}-v{MEASURE_VERSION}"


def measure_folder(out: Path, model: str, variants: Mapping[str, Any]) -> None:
    """Measure every map variant of a model, and the model itself, where that is not done yet."""
    folder = out / POINTS
    maps = [MapVariant(**{k: _tuple(v) for k, v in item.items()}) for item in variants["maps"]]
    missing = [variant for variant in maps if not is_measured(out, model, variant)]
    if not missing and (folder / f"{model_key(model)}.json").is_file():
        return
    measured = load_model(out / "models" / model)
    folder.mkdir(parents=True, exist_ok=True)
    for variant in missing:
        began = time.perf_counter()
        try:
            point = measure_map(measured, variant, out / "models" / model)
        except ValueError as error:
            # Whether a budget can be kept depends on the model: a result, not a reason to stop.
            point = {"seed": measured.seed, "infeasible": str(error)}, {}
        point[0]["seconds"] = time.perf_counter() - began
        save_point(folder, point_key(model, variant), point)
    content = finite(measure_model(measured))
    write_atomically(folder / f"{model_key(model)}.json", json.dumps(content, allow_nan=False))


def is_measured(out: Path, model: str, variant: MapVariant) -> bool:
    """Whether a map point is complete."""
    return (out / POINTS / f"{point_key(model, variant)}.json").is_file()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def main(out: str, model: str) -> int:
    """The program."""
    plan = json.loads((Path(out) / "plan.json").read_text())
    try:
        measure_folder(Path(out), model, plan[model])
    except (ValueError, OSError) as error:
        sys.stderr.write(f"dvpa: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1], sys.argv[2]))
