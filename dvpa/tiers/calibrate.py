"""Fitting a tier map: per-tier outcomes of a checkpoint -> TierMap under a budget.

The method is reference/methods.md F6.

Three disjoint splits, made by the caller:

* fit: one isotonic curve per tier, P_t(d);
* calibrate: the guard's bounds (labels), then lambda or the thresholds so that the mean cost there
  is within the budget (difficulties only, so that the guard's bounds stay valid). A min_quality
  budget reads the labels too, unless there is a guard: then the fit split's;
* test: nothing here sees it.

Thresholds are exact for the calibrated quality on the calibrate split; cuts.py has the dynamic
programme.

Left out: knowing whether the splits share requests. Only identical splits are caught.

N requests, T tiers.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.isotonic import IsotonicRegression

from dvpa.tiers.budget import Budget, Split, Traffic
from dvpa.tiers.cuts import MAX_TRANSITIONS
from dvpa.tiers.drift import NUM_BINS
from dvpa.tiers.guard import StayLow, clopper_pearson_upper, fit_guard, losses
from dvpa.tiers.solver import Solver
from dvpa.tiers.tier_map import KINDS, Curve, TierMap

__all__ = [
    "Budget",
    "Split",
    "Traffic",
    "brier_score",
    "clopper_pearson_upper",
    "expected_calibration_error",
    "fit_tier_map",
    "refit_budget",
]

logger = logging.getLogger(__name__)

MIN_REQUESTS = 30  # below this an isotonic curve is noise
ADVISED_REQUESTS = 500  # methods.md F6
STAY_LOW_DELTA = 0.05  # of the bound that the statistics report where there is no guard
_QUALITY_STEPS = 100  # budgets tried for min_quality
_TILT = 1e-5  # of success, what the ends of the top tier's curve slope by; lower tiers' by more

Floats = npt.NDArray[np.float64]


def fit_tier_map(
    fit: Split,
    calibrate: Split,
    costs: Sequence[float],
    budget: Budget,
    tier_names: Sequence[str],
    kind: str = "gain",
    guard_alpha: float | None = None,
    guard_delta: float = 0.05,
    default_tier: int | None = None,
    upper_cut: bool = False,
    traffic: Traffic | None = None,
) -> TierMap:
    """Fit a tier map whose mean cost on the calibrate split is within the budget.

    costs: activated parameters per tier, strictly increasing; they are what lambda prices. The
    budget is met in its own unit, by the calibrate split's `costs` where it has them.
    guard_alpha: let requests stay below the top tier only so that, with probability 1 - guard_delta
    over the calibrate split, at most this share of them loses against it; None for no guard.
    upper_cut: let a threshold map send hopeless requests back to the base tier. traffic: meet the
    budget on these requests instead of the calibrate split's. Raises ValueError for too few
    requests, mismatched tiers, or a budget or guard that cannot be kept.
    """
    costs = tuple(float(cost) for cost in costs)
    num_tiers = len(costs)
    _check_inputs(fit, calibrate, num_tiers, kind, upper_cut)
    template = replace(
        TierMap.untrained(tier_names, costs),
        calibration=tuple(
            _isotonic_curve(fit.difficulty, fit.quality[:, t], _TILT * (num_tiers - t))
            for t in range(num_tiers)
        ),
        default_tier=num_tiers - 1 if default_tier is None else default_tier,
    )
    if guard_alpha is not None:
        guard = fit_guard(template, calibrate, guard_alpha, guard_delta)
        template = replace(template, guard=guard)
    charged = calibrate.traffic if traffic is None else traffic
    solver = Solver(template, charged, kind, upper_cut, budget.unit)
    limit = budget.mean_limit(costs)
    if limit is not None:
        solver.check_limit(limit)
        tier_map = solver.solve(limit)
    else:
        assert budget.min_quality is not None
        judged = calibrate if guard_alpha is None else fit
        tier_map = _cheapest(solver, budget.min_quality, judged)
    statistics = _statistics(tier_map, fit, calibrate)
    if traffic is not None:
        statistics |= _spending(tier_map, traffic)
    return replace(tier_map, budget=budget.to_dict(), statistics=statistics)


def refit_budget(
    tier_map: TierMap,
    traffic: Traffic,
    budget: Budget,
    kind: str | None = None,
    upper_cut: bool = False,
) -> TierMap:
    """The same calibration curves, lambda or thresholds anew so that `traffic` meets the budget.

    kind: "gain" or "threshold"; None: the map's own.

    For traffic whose mix of difficulties has changed and of which no outcomes are known: it trusts
    that P(success | difficulty) has not. A guard's bound was one for the old decisions; it is
    dropped. Raises ValueError for a map without calibration, too few requests, a min_quality
    budget, or a budget that cannot be kept.
    """
    if not tier_map.calibration:
        raise ValueError("tier map: it has no calibration to keep; fit one from outcomes")
    _check_size("traffic", len(traffic))
    limit = budget.mean_limit(tier_map.costs)
    if limit is None:
        raise ValueError("budget: min_quality needs outcomes, not difficulties alone")
    kind = tier_map.kind if kind is None else kind
    _check_kind(kind, upper_cut)
    solver = Solver(replace(tier_map, guard=None), traffic, kind, upper_cut, budget.unit)
    solver.check_limit(limit)
    known = ("num_fit", "num_calibrate", "quality_by_tier", "ece_by_tier", "brier_by_tier")
    kept = {key: (tier_map.statistics or {})[key] for key in known if tier_map.statistics}
    found = solver.solve(limit)
    return replace(found, budget=budget.to_dict(), statistics=kept | _spending(found, traffic))


def _check_kind(kind: str, upper_cut: bool) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    if upper_cut and kind != "threshold":
        raise ValueError("upper_cut: only threshold maps have one; a gain map needs none")


def _check_inputs(fit: Split, calibrate: Split, num_tiers: int, kind: str, upper_cut: bool) -> None:
    _check_kind(kind, upper_cut)
    for name, split in (("fit", fit), ("calibrate", calibrate)):
        if split.quality.shape[1] != num_tiers:
            raise ValueError(
                f"{name} split: quality has {split.quality.shape[1]} tiers, costs has {num_tiers}"
            )
        _check_size(f"{name} split", len(split))
    if np.array_equal(fit.difficulty, calibrate.difficulty) and np.array_equal(
        fit.quality, calibrate.quality
    ):
        raise ValueError("calibrate split: identical to the fit split; they must be disjoint")


def _check_size(name: str, size: int) -> None:
    if size < MIN_REQUESTS:
        raise ValueError(f"{name}: {size} requests are too few; at least {MIN_REQUESTS}")
    if size < ADVISED_REQUESTS:
        logger.warning("%s: %d requests; %d or more are advised", name, size, ADVISED_REQUESTS)


def _isotonic_curve(difficulty: Floats, quality: Floats, tilt: float) -> Curve:
    """Isotonic regression of quality, decreasing in difficulty: knots at its blocks' centres.

    Knots at block centres instead of edges ("centred isotonic regression", Oron and Flournoy 2017)
    leave no flat steps inside: on a step every request would change tier at the same lambda, and
    the map could only jump over the budget instead of meeting it. Beyond the outer centres, where
    half of a large block may lie, it slopes by `tilt` for the same reason: too little to matter as
    success, and not the same for any two tiers, whose differences lambda is compared with.
    """
    model = IsotonicRegression(y_min=0.0, y_max=1.0, increasing=False)
    fitted = model.fit_transform(difficulty, quality)
    # Ascending -P is ascending difficulty.
    levels, block = np.unique(-fitted, return_inverse=True)
    centres = np.bincount(block, weights=difficulty) / np.bincount(block)
    x, y = np.clip(centres, 0.0, 1.0), np.clip(-levels, 0.0, 1.0)
    # Rounding may merge the centres of adjacent blocks; adding 0.0 turns -0.0 into 0.0.
    distinct = np.append(True, x[1:] > np.maximum.accumulate(x)[:-1])
    x, y = x[distinct], y[distinct] + 0.0
    if x[0] > 0.0:
        x, y = np.append(0.0, x), np.append(min(y[0] + tilt, 1.0), y)
    if x[-1] < 1.0:
        x, y = np.append(x, 1.0), np.append(y, max(y[-1] - tilt, 0.0))
    return tuple(x.tolist()), tuple(y.tolist())


def _cheapest(solver: Solver, min_quality: float, judged: Split) -> TierMap:
    """The cheapest of 101 budgets whose map keeps that fraction of the top tier's quality."""
    observed = judged.quality
    target = min_quality * float(observed[:, -1].mean())
    reached = 0.0
    for limit in np.linspace(solver.least, solver.most, _QUALITY_STEPS + 1).tolist():
        tier_map = solver.solve(limit, MAX_TRANSITIONS // 100)  # a hundred of them
        tiers = tier_map.tiers(judged.difficulty)
        quality = float(observed[np.arange(len(tiers)), tiers].mean())
        if quality >= target - 1e-12:
            return tier_map
        reached = max(reached, quality)
    if solver.kind == "threshold":  # always the top tier keeps all of its quality
        zeros = (0.0,) * (tier_map.num_tiers - 1)
        return replace(tier_map, thresholds=zeros, upper_cut=None)
    raise ValueError(
        f"budget: min_quality {min_quality} cannot be kept; on the calibrate split a gain map "
        f"reaches {reached * min_quality / max(target, 1e-12):.3f} of the top tier's quality"
    )


def _statistics(tier_map: TierMap, fit: Split, calibrate: Split) -> dict[str, Any]:
    """What the map does on the calibrate split."""
    tiers, success = tier_map.tiers(calibrate.difficulty), tier_map.success(calibrate.difficulty)
    quality = calibrate.quality
    rows, num_tiers = np.arange(len(tiers)), tier_map.num_tiers
    lost = losses(quality, tiers)
    stay_low = StayLow.of(tiers, quality)
    return {
        "num_fit": len(fit),
        "num_calibrate": len(calibrate),
        "quality": float(quality[rows, tiers].mean()),
        "quality_by_tier": quality.mean(axis=0).tolist(),
        "loss_by_tier": [
            float(lost[tiers == t].mean()) if (tiers == t).any() else 0.0 for t in range(num_tiers)
        ],
        "stay_low": {
            "kept": stay_low.kept,
            "failures": stay_low.failures,
            "bound": stay_low.bound(STAY_LOW_DELTA),
            "delta": STAY_LOW_DELTA,
        },
        "ece_by_tier": [
            expected_calibration_error(success[:, t], quality[:, t]) for t in range(num_tiers)
        ],
        "brier_by_tier": [brier_score(success[:, t], quality[:, t]) for t in range(num_tiers)],
        **_spending(tier_map, calibrate.traffic),
    }


def _spending(tier_map: TierMap, traffic: Traffic) -> dict[str, Any]:
    """What the map spends on requests, and how hard they are."""
    tiers, costs = tier_map.tiers(traffic.difficulty), np.asarray(tier_map.costs)
    spent: dict[str, Any] = {
        "num_traffic": len(traffic),
        "mean_activated": float(costs[tiers].mean()),
        "fraction": float(costs[tiers].mean() / costs[-1]),
        "tier_shares": (np.bincount(tiers, minlength=len(costs)) / len(tiers)).tolist(),
        "difficulty_histogram": _histogram(traffic.difficulty),
    }
    if traffic.costs is not None:  # of each request, in the budget's unit
        spent["mean_cost"] = float(traffic.costs[np.arange(len(tiers)), tiers].mean())
    return spent


def _histogram(difficulty: Floats) -> list[int]:
    """Counts in NUM_BINS equal bins of [0, 1]: what traffic is held against later."""
    counts, _ = np.histogram(difficulty, bins=NUM_BINS, range=(0.0, 1.0))
    return [int(count) for count in counts]


def _paired(p: npt.ArrayLike, outcome: npt.ArrayLike) -> tuple[Floats, Floats]:
    predicted, observed = np.asarray(p, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    if predicted.ndim != 1 or predicted.shape != observed.shape or predicted.size == 0:
        raise ValueError(
            f"p and outcome: shapes {predicted.shape} and {observed.shape} are not both [N >= 1]"
        )
    return predicted, observed


def expected_calibration_error(p: npt.ArrayLike, outcome: npt.ArrayLike, bins: int = 15) -> float:
    """Mean |predicted - observed| over bins of equal mass. p, outcome: [N] in [0, 1].

    Equal predictions are never torn apart by the order of the requests: within a run of them the
    outcomes are replaced by their mean before binning. ValueError for shapes that differ, no
    requests, or bins < 1.
    """
    predicted, observed = _paired(p, outcome)
    if bins < 1:
        raise ValueError(f"bins: {bins} is below 1")
    _, run = np.unique(predicted, return_inverse=True)
    observed = (np.bincount(run, weights=observed) / np.bincount(run))[run]
    gap = (predicted - observed)[np.argsort(predicted, kind="stable")]
    return float(sum(abs(part.sum()) for part in np.array_split(gap, bins)) / gap.size)


def brier_score(p: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Mean squared difference of predicted and observed success. p, outcome: [N] in [0, 1]."""
    predicted, observed = _paired(p, outcome)
    return float(np.mean((predicted - observed) ** 2))
