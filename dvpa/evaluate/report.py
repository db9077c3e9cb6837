"""From outcome tables to report.json, report.html and frontier.png.

`build_report` computes one seed's report (design.md section 6, extra keys allowed),
`aggregate_reports` joins seeds, `write_report` writes the three files. NaN and infinity become null
in JSON.
"""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.evaluate.aggregate import aggregate_reports
from dvpa.evaluate.baselines import question_scores
from dvpa.evaluate.figure import DARK, LIGHT, frontier_png
from dvpa.evaluate.metrics import apgr, cpt
from dvpa.evaluate.page import render_page
from dvpa.evaluate.replacing import write_atomically
from dvpa.evaluate.routing import (
    compare_routers,
    difficulty_metrics,
    routing_frontier,
)
from dvpa.evaluate.table import OutcomeTable
from dvpa.tiers.calibrate import brier_score, expected_calibration_error
from dvpa.tiers.tier_map import TierMap

__all__ = ["aggregate_reports", "build_report", "describe_environment", "write_report"]


def build_report(
    fit: OutcomeTable,
    calibrate: OutcomeTable,
    test: OutcomeTable,
    tier_map: TierMap,
    *,
    seed: int,
    questions: Mapping[str, str] | None = None,
    overhead: Sequence[float] | None = None,
    request_costs: npt.NDArray[np.float64] | None = None,
    ms: Mapping[str, Sequence[float]] | None = None,
    whole: OutcomeTable | None = None,
    whole_costs: Sequence[float] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    wall_seconds: float | None = None,
    title: str = "dvpa demo",
    num_resamples: int = 2000,
) -> dict[str, Any]:
    """The report of one seed; all qualities are on `test`, which neither the head nor the tier map
    has seen.

    `questions`, `overhead`, `request_costs`, `ms`, `whole`, `whole_costs`: see `compare_routers`. A
    sample: {question, text, expected, telemetry}.
    """
    costs, names = list(tier_map.costs), list(tier_map.tier_names)
    tfidf = None
    if questions is not None:
        tfidf = question_scores(fit, calibrate, test, questions, seed)
    routers = compare_routers(
        fit,
        calibrate,
        test,
        tier_map,
        tfidf=tfidf,
        overhead=overhead,
        request_costs=request_costs,
        ms=ms,
        whole=whole,
        whole_costs=whole_costs,
        num_resamples=num_resamples,
        seed=seed,
    )
    frontier = routing_frontier(
        fit,
        calibrate,
        test,
        tier_map,
        overhead=overhead,
        request_costs=request_costs,
        seed=seed,
    )
    whole = test if whole is None else whole
    costs = costs if whole_costs is None else list(whole_costs)
    mean_quality = whole.quality.mean(axis=0)
    base = (float(costs[0]), float(mean_quality[0]))
    top = (float(costs[-1]), float(mean_quality[-1]))
    # Without difficulties there is no sweep: the adaptive curve is its one operating point.
    swept = frontier.get("adaptive")
    row = routers["adaptive"]
    curve = swept or {"cost": [row["mean_activated_params"]], "quality": [row["quality"]]}
    levels = sorted(set(test.level.tolist()))
    tiers = []
    for tier, name in enumerate(names):
        by_level = [float(whole.quality[whole.level == level, tier].mean()) for level in levels]
        entry: dict[str, Any] = {
            "name": name,
            "activated_params": float(costs[tier]),
            "quality": float(mean_quality[tier]),
            "quality_by_level": by_level,
            "nll": float(whole.nll[:, tier].mean()),
        }
        if ms is not None:
            entry["ms_per_request"] = float(ms["whole"][tier])
        tiers.append(entry)
    report: dict[str, Any] = {
        "title": title,
        "tiers": tiers,
        # What every router, the coin included, chooses between.
        "read_by_base": [
            {"name": name, "quality": float(quality), "mean_activated_params": float(cost)}
            for name, quality, cost in zip(
                names, test.quality.mean(axis=0), frontier["random"]["cost"], strict=True
            )
        ],
        "levels": levels,
        "routers": routers,
        "apgr": apgr(curve["cost"], curve["quality"], base, top),
        "random_apgr": apgr(frontier["random"]["cost"], frontier["random"]["quality"], base, top),
        "length_apgr": apgr(frontier["length"]["cost"], frontier["length"]["quality"], base, top),
        "cpt": {
            str(percent): cpt(curve["cost"], curve["quality"], base, top, percent)
            for percent in (50, 80, 95)
        },
        "quality_kept": row["quality"] / top[1] if top[1] > 0 else float("nan"),
        "gap_at_oracle": routers["oracle"]["quality"] - row["quality"],
        **calibration_errors(tier_map, test),
        "difficulty": difficulty_metrics(test, None if tfidf is None else tfidf.test),
        "frontier": frontier,
        "num_requests": {
            "fit": len(fit),
            "calibrate": len(calibrate),
            "test": len(test),
            "test_by_level": [int((test.level == level).sum()) for level in levels],
        },
        "budget": tier_map.budget,
        "samples": [dict(sample) for sample in samples],
        "seeds": [seed],
        "wall_seconds": wall_seconds,
        "environment": describe_environment(),
    }
    return report


def describe_environment() -> dict[str, str]:
    """Versions and processor; no host name, user or path."""
    packages = ("dvpa", "torch", "transformers", "numpy", "scikit-learn")
    described = {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }
    for package in packages:
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            described[package] = "not installed"
    return described


def write_report(report: Mapping[str, Any], out_dir: str | Path) -> dict[str, Path]:
    """Write report.json, report.html (one self-contained file) and frontier.png; returns their
    paths by name.

    ValueError if a key of the schema is missing.
    """
    required = ("tiers", "routers", "apgr", "ece_by_tier", "seeds", "wall_seconds", "environment")
    missing = [key for key in required if key not in report]
    if missing:
        raise ValueError(f"report must hold {', '.join(required)}; missing: {', '.join(missing)}")
    folder = Path(out_dir)
    plain = finite(report)
    light, dark = frontier_png(plain, LIGHT), frontier_png(plain, DARK)
    contents = {
        "report.json": (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode(),
        "report.html": render_page(plain, light, dark).encode(),
        "frontier.png": light,
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return {name: folder / name for name in contents}


def finite(value: Any) -> Any:
    """A copy in plain JSON types, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def calibration_errors(tier_map: TierMap, test: OutcomeTable) -> dict[str, list[float]]:
    """ECE and Brier score per tier of the calibrated success; NaN without calibration or
    difficulties.
    """
    known = np.isfinite(test.difficulty)
    success = tier_map.success(test.difficulty[known])
    undefined = [float("nan")] * test.num_tiers
    if success.shape != (int(known.sum()), test.num_tiers) or len(success) == 0:
        return {"ece_by_tier": undefined, "brier_by_tier": undefined}
    outcome = test.quality[known]
    tiers = range(test.num_tiers)
    return {
        "ece_by_tier": [
            float(expected_calibration_error(success[:, t], outcome[:, t])) for t in tiers
        ],
        "brier_by_tier": [float(brier_score(success[:, t], outcome[:, t])) for t in tiers],
    }
