"""From an outcome table to a tier map and its report: what `dvpa calibrate` does.

The table's requests are split at random, by seed: fit (the curves), calibrate (lambda or the cuts,
the guard) and test, which only the report sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.evaluate.report import build_report
from dvpa.evaluate.routing import adaptive_tiers
from dvpa.evaluate.table import OutcomeTable
from dvpa.pricing import ModelPrice
from dvpa.tiers.budget import Budget, Split
from dvpa.tiers.calibrate import expected_calibration_error, fit_tier_map
from dvpa.tiers.guard import StayLow
from dvpa.tiers.tier_map import TierMap

FloatArray = npt.NDArray[np.float64]

FRACTIONS = (0.4, 0.3, 0.3)  # fit, calibrate, test


@dataclass(frozen=True)
class CalibrationOptions:
    """How a tier map is fitted; see `fit_tier_map`. alpha None: no guard.

    kind None: a gain map, or what the map was that is recalibrated.
    """

    budget: Budget
    kind: str | None = None
    alpha: float | None = None
    delta: float = 0.1
    upper_cut: bool = False
    seed: int = 0


def calibrate_table(
    table: OutcomeTable,
    model_price: ModelPrice,
    options: CalibrationOptions,
    *,
    title: str = "Calibration",
    questions: Mapping[str, str] | None = None,
    num_resamples: int = 2000,
) -> tuple[TierMap, dict[str, Any]]:
    """Fit a tier map on a part of the table and report on another.

    Requests without a difficulty are left out and counted. The report is `build_report`'s with a
    section `calibration`: budget stated and realised, guard, head, what was left out.

    Raises:
        ValueError: the table has other tiers than the model or too few requests, no difficulties,
            no costs in the budget's unit; or the budget or guard cannot be kept.
    """
    names = [tier.name for tier in model_price.tiers]
    if table.num_tiers != len(names):
        raise ValueError(
            f"outcomes: {table.num_tiers} tiers, the checkpoint has {len(names)} "
            f"({', '.join(names)})"
        )
    known = np.isfinite(table.difficulty)
    if not known.any():
        raise ValueError(
            "outcomes: no request has a difficulty: the checkpoint has no difficulty head, or "
            "its head gives NaN"
        )
    kept = table.select(known)
    whole = [float(tier.activated_params) for tier in model_price.tiers]
    activated = request_costs(kept, whole, "activated_params")
    charged = request_costs(kept, whole, options.budget.unit)
    parts = np.random.default_rng(options.seed).permutation(len(kept))
    cuts = np.round(np.cumsum(FRACTIONS[:-1]) * len(kept)).astype(int)
    fit_rows, calibrate_rows, test_rows = np.split(parts, cuts)
    fit, calibrate, test = (kept.select(rows) for rows in (fit_rows, calibrate_rows, test_rows))
    tier_map = fit_tier_map(
        Split(fit.difficulty, fit.quality),
        Split(calibrate.difficulty, calibrate.quality, charged[calibrate_rows]),
        costs=activated.mean(axis=0).tolist(),
        budget=of_whole(options.budget, whole[-1]),
        tier_names=names,
        kind=options.kind or "gain",
        guard_alpha=options.alpha,
        guard_delta=options.delta,
        upper_cut=options.upper_cut,
    )
    tier_map = replace(tier_map, budget=options.budget.to_dict())
    report = build_report(
        fit,
        calibrate,
        test,
        tier_map,
        seed=options.seed,
        questions=questions,
        overhead=_overhead(test),
        request_costs=activated[test_rows],
        whole_costs=whole,
        title=title,
        num_resamples=num_resamples,
    )
    for entry, ms in zip(report["tiers"], test.ms.mean(axis=0).tolist(), strict=True):
        entry["ms_per_request"] = ms  # NaN where it was not measured
    report["calibration"] = {
        "kind": tier_map.kind,
        "budget": _spent(options.budget, whole[-1], tier_map, test, charged[test_rows]),
        "stay_low": _stay_low(tier_map, test),
        "head": _head(tier_map, test),
        "without_difficulty": int((~known).sum()),
    }
    return tier_map, report


def request_costs(table: OutcomeTable, activated: Sequence[float], unit: str) -> FloatArray:
    """What each request costs at each tier [N, T], in a budget's unit.

    activated_params: scaled so that the mean over requests is the mean over tokens, a long request
    costing more than a short one. flops, ms: as measured. ValueError if they were not.
    """
    if unit != "activated_params":
        costs = table.flops if unit == "flops" else table.ms
        if not bool(np.isfinite(costs).all()):
            raise ValueError(
                f"budget: the outcomes have no {unit}; collect them through the engine (--tasks)"
            )
        return costs
    params = np.where(np.isfinite(table.activated_params), table.activated_params, activated)
    tokens = table.tokens
    return np.asarray(params * tokens / tokens.mean(axis=0))


def of_whole(budget: Budget, top: float) -> Budget:
    """A fraction is one of the top tier as it costs alone, whoever reads the prompt."""
    return budget if budget.fraction is None else Budget(mean_activated=budget.fraction * top)


def _overhead(table: OutcomeTable) -> list[float] | None:
    """Activated parameters per token that scoring adds, by chosen tier; None if not measured."""
    if not bool(np.isfinite(table.flops).all()):
        return None
    extra = table.flops / 2 - table.activated_params * table.tokens
    return np.asarray(np.maximum(extra, 0.0).mean(axis=0) / table.tokens.mean(axis=0)).tolist()


def _spent(
    budget: Budget, top: float, tier_map: TierMap, test: OutcomeTable, charged: FloatArray
) -> dict[str, Any]:
    """The budget as stated, on the calibrate split and on fresh requests."""
    tiers = adaptive_tiers(tier_map, test.difficulty)
    rows = np.arange(len(tiers))
    statistics = tier_map.statistics or {}
    found: dict[str, Any] = {
        "stated": budget.to_dict(),
        "unit": budget.unit,
        "calibrate": statistics.get("mean_cost"),
        "test": float(charged[rows, tiers].mean()),
        "top": float(charged[:, -1].mean()),
    }
    limit = of_whole(budget, top).mean_limit(tier_map.costs)
    if limit is not None:
        return found | {"limit": limit, "deviation": found["test"] / limit - 1.0}
    reached = float(test.quality[rows, tiers].mean())
    best = float(test.quality[:, -1].mean())
    return found | {"quality_kept": reached / best if best > 0 else float("nan")}


def _stay_low(tier_map: TierMap, test: OutcomeTable) -> dict[str, Any]:
    """Requests kept below the top tier: what the guard promises, and what the test split shows."""
    guard, statistics = tier_map.guard, tier_map.statistics or {}
    found = StayLow.of(adaptive_tiers(tier_map, test.difficulty), test.quality)
    return {
        "guard": None if guard is None else {**guard, "cut": guard["cuts"][0]},
        "calibrate": statistics.get("stay_low"),
        "test": {
            "kept": found.kept,
            "failures": found.failures,
            "rate": found.failures / found.kept if found.kept else 0.0,
        },
    }


def _head(tier_map: TierMap, test: OutcomeTable) -> dict[str, float]:
    """Calibration error of P(base suffices): the head's own, 1 - difficulty, and the map's."""
    calibrated = tier_map.success(test.difficulty)[:, 0]
    return {
        "ece_base_raw": expected_calibration_error(1 - test.difficulty, test.quality[:, 0]),
        "ece_base": expected_calibration_error(calibrated, test.quality[:, 0]),
    }
