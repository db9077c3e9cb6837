"""Points -> results: per configuration means over seeds, paired differences, the goals.

Three intervals of a difference. `ci95`: bootstrap over seeds and, inside each, over requests.
`ci95_requests`: requests only, these very checkpoints held fixed. `ci95_seeds`: a t interval over
the seeds' means. All are of differences on the same requests.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from dvpa.ablate.details import reference_details
from dvpa.ablate.load import read_load
from dvpa.ablate.measure import POINTS, Point, load_point, model_key, point_key
from dvpa.ablate.models import DONE
from dvpa.ablate.run import MODELS, Points
from dvpa.ablate.study import Configuration, Study
from dvpa.evaluate.metrics import bootstrap_means, percentile_interval
from dvpa.evaluate.report import describe_environment, finite

FloatArray = npt.NDArray[np.float64]

_NUMBERS = (
    "quality", "mean_activated_params", "relative_cost", "quality_kept", "pgr", "apgr",
    "mixed_kind_apgr", "gap_at_oracle",
)  # fmt: skip
GOALS = {"apgr": 0.80, "mixed_kind_apgr": 0.70, "ece": 0.05, "deviation": 0.05}
RIVALS = ("random", "length", "tfidf", "cascade")  # that adaptive must beat


def summarise(study: Study, out: Path, points: Points) -> dict[str, Any]:
    """The results of a finished study, in plain JSON values."""
    models = {}
    for (recipe, seed), point in points.items():
        if any(recipe == other.name for other in study.recipes):
            models[recipe, seed] = _model(out, recipe, seed, point.key)
    loaded = {
        (c.name, seed): load_point(
            out / POINTS, point_key(points[c.recipe.name, seed].key, c.map)
        )
        for c in study.configurations
        for seed in study.seeds
    }  # fmt: skip
    reference = study.configurations[0]
    configurations = []
    for configuration in study.configurations:
        own = [loaded[configuration.name, seed] for seed in study.seeds]
        row = _configuration(configuration, own, study)
        if configuration is not reference and "quality" in row:
            row["minus_reference"] = _against(study, configuration, reference, loaded, models)
        configurations.append(row)
    same_map = {
        c.recipe.name: [loaded[c.name, seed] for seed in study.seeds]
        for c in study.configurations
        if c.map.name == reference.map.name
    }
    folders = [out / MODELS / points[reference.recipe.name, seed].key for seed in study.seeds]
    details = reference_details(same_map[reference.recipe.name], same_map, folders)
    return finite(
        {
            "title": f"Ablation {study.name}",
            "study": {
                "name": study.name,
                "recipe": study.recipe,
                "resamples": study.resamples,
                "workers": study.workers,
            },
            "seeds": list(study.seeds),
            "reference": reference.name,
            "goals": GOALS,
            "configurations": configurations,
            **details,
            "models": [
                {key: value for key, value in model.items() if key != "requests"}
                for model in models.values()
            ],
            "environment": describe_environment(),
        }
    )


def _model(out: Path, recipe: str, seed: int, key: str) -> dict[str, Any]:
    """A training point: what it cost and what it can do."""
    done = json.loads((out / MODELS / key / DONE).read_text())
    return {
        "recipe": recipe,
        "key": key,
        **json.loads((out / POINTS / f"{model_key(key)}.json").read_text()),
        "seed": seed,
        "total_params": done["total_params"],
        "training_flops": done["training_flops"],
        "stage_seconds": sum(stage["seconds"] for stage in done["stages"]),
        "load": read_load(out / MODELS / key),
    }


def _configuration(
    configuration: Configuration, points: Sequence[Point], study: Study
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": configuration.name,
        "recipe": configuration.recipe.name,
        "map": configuration.map.name,
        "budget": configuration.map.budget,
        "notes": [n for n in (configuration.recipe.note, configuration.map.note) if n],
    }
    results = [point[0] for point in points]
    for result in results:
        if "infeasible" in result:
            return row | {"infeasible": result["infeasible"]}
    for name in _NUMBERS:
        row[name] = spread([result[name] for result in results])
    row["budget_deviation"] = spread([result["budget"]["deviation"] for result in results])
    row["aurc"] = spread([result["risk_coverage"]["aurc"] for result in results])
    row["stay_low_rate"] = spread([result["stay_low"]["rate"] for result in results])
    row["cpt"] = {
        percent: spread([result["cpt"][percent] for result in results])
        for percent in results[0]["cpt"]
    }
    for name in ("ece_by_tier", "brier_by_tier"):
        row[name] = [
            spread(list(values)) for values in zip(*(r[name] for r in results), strict=True)
        ]
    row["map_tiers"] = results[0]["map_tiers"]
    row["mixed_kind"] = [result["mixed_kind"] for result in results]
    row["tier_share"] = _mean([result["routers"]["adaptive"]["tier_share"] for result in results])
    row["confusion"] = np.sum([result["confusion"] for result in results], axis=0).tolist()
    row["frontier"] = [result["frontier"] for result in results]
    row["routers"] = _routers(points, study)
    row["goals"] = _goals(row, results)
    return row


def _routers(points: Sequence[Point], study: Study) -> dict[str, Any]:
    rows = {}
    for name in points[0][0]["routers"]:
        if any(name not in results["routers"] for results, _ in points):
            continue  # one seed had too few failures to train it on
        own = [results["routers"][name] for results, _ in points]
        row: dict[str, Any] = {"quality": spread([r["quality"] for r in own])}
        if all("mean_activated_params" in r for r in own):
            row["relative_cost"] = spread([r["relative_cost"] for r in own])
            row["mean_activated_params"] = spread([r["mean_activated_params"] for r in own])
        if name != "adaptive":
            differences = [values["adaptive"] - values[name] for _, values in points]
            row["adaptive_minus"] = paired(differences, study.resamples)
        rows[name] = row
    return rows


def _against(
    study: Study,
    configuration: Configuration,
    reference: Configuration,
    loaded: Mapping[tuple[str, int], Point],
    models: Mapping[tuple[str, int], Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Quality, cost and APGR minus the reference's, seed by seed; None where that cannot be."""
    differences, costs, apgrs = [], [], []
    for seed in study.seeds:
        own, other = loaded[configuration.name, seed], loaded[reference.name, seed]
        pair = [models[c.recipe.name, seed]["requests"] for c in (configuration, reference)]
        if "infeasible" in other[0] or pair[0] != pair[1]:
            return None
        differences.append(own[1]["adaptive"] - other[1]["adaptive"])
        costs.append(own[0]["relative_cost"] - other[0]["relative_cost"])
        apgrs.append(_minus(own[0]["apgr"], other[0]["apgr"]))
    return {
        "quality": paired(differences, study.resamples),
        "relative_cost": spread(costs),
        "apgr": spread(apgrs),
    }


def _goals(row: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The acceptance of one configuration: value, bound, whether it holds; None: undefined."""
    worst = [max(result["ece_by_tier"]) for result in results]
    deviation = row["budget_deviation"]["mean"]
    per_seed = [abs(d) for d in row["budget_deviation"]["per_seed"] if d is not None]
    goals: dict[str, Any] = {
        "apgr": _goal(row["apgr"]["mean"], GOALS["apgr"]),
        "mixed_kind_apgr": _goal(row["mixed_kind_apgr"]["mean"], GOALS["mixed_kind_apgr"]),
        "worst_ece": _goal(max(worst), GOALS["ece"], is_most=True),
        "worst_budget_deviation": _goal(
            max(per_seed) if deviation is not None else None, GOALS["deviation"], is_most=True
        ),
    }
    for name in RIVALS:
        if name in row["routers"]:
            found = row["routers"][name]["adaptive_minus"]
            goals[f"beats_{name}"] = {
                "value": found["difference"],
                "ci95": found["ci95"],
                "holds": found["ci95"][0] > 0,
            }
    return goals


def _goal(value: float | None, bound: float, is_most: bool = False) -> dict[str, Any]:
    holds = None
    if value is not None:
        holds = value <= bound if is_most else value >= bound
    return {"value": value, "bound": bound, "holds": holds}


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, t interval over seeds, and the values; None where any seed's is undefined."""
    if any(value is None or not math.isfinite(value) for value in values):
        return {"mean": None, "ci95": None, "per_seed": list(values)}
    numbers = np.array(values, dtype=float)
    return {
        "mean": float(numbers.mean()),
        "ci95": _t_interval(numbers),
        "per_seed": numbers.tolist(),
    }


def paired(differences: Sequence[FloatArray], resamples: int = 2000) -> dict[str, Any]:
    """Mean of per-request differences [N] of several seeds, with the three intervals."""
    means = np.array([difference.mean() for difference in differences])
    by_seed = np.stack(
        [
            bootstrap_means(difference[:, None], resamples, seed)[:, 0]
            for seed, difference in enumerate(differences)
        ]
    )  # [seeds, resamples]
    rng = np.random.default_rng(len(differences))
    chosen = rng.integers(len(means), size=by_seed.shape)
    columns = rng.permuted(np.tile(np.arange(resamples), (len(means), 1)), axis=1)
    both = by_seed[chosen, columns].mean(axis=0)
    return {
        "difference": float(means.mean()),
        "ci95": list(percentile_interval(both)),
        "ci95_requests": list(percentile_interval(by_seed.mean(axis=0))),
        "ci95_seeds": _t_interval(means),
        "per_seed": means.tolist(),
    }


def _t_interval(values: FloatArray) -> list[float] | None:
    if len(values) < 2:
        return None
    half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return np.mean(np.array(rows, dtype=float), axis=0).tolist()


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
