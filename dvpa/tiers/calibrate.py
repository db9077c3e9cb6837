"""Fitting a tier map: per-tier outcomes of a checkpoint -> TierMap under a budget.

The method is reference/methods.md F6.

Three disjoint splits, made by the caller:

* fit: one isotonic curve per tier, P_t(d), and the candidate cuts of the guard;
* calibrate: the guard's bounds (labels), then lambda or the thresholds so that the mean cost there
  is within the budget (difficulties only, so that the guard's bounds stay valid). A min_quality
  budget reads the labels too;
* test: nothing here sees it.

Thresholds are exact for the calibrated quality on the calibrate split; cuts.py has the dynamic
programme.

Left out: knowing whether the splits share requests. Only identical splits are caught.

N requests, T tiers.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import beta
from sklearn.isotonic import IsotonicRegression

from dvpa.tiers.budget import Budget, Split
from dvpa.tiers.cuts import MAX_TRANSITIONS, solve_cuts
from dvpa.tiers.tier_map import (
    KINDS,
    NEVER,
    Curve,
    TierMap,
    gain_choice,
    guard_allows,
    raise_to_allowed,
)

__all__ = [
    "Budget",
    "Split",
    "brier_score",
    "clopper_pearson_upper",
    "expected_calibration_error",
    "fit_tier_map",
]

logger = logging.getLogger(__name__)

MIN_REQUESTS = 30  # below this an isotonic curve is noise
ADVISED_REQUESTS = 500  # methods.md F6
LOSS_TOLERANCE = 0.1  # the guard calls it a failure to be this much below the top tier
HISTOGRAM_BINS = 20
_GUARD_CUTS = 16  # candidate cuts per tier; the bounds are corrected for trying all of them
_QUALITY_STEPS = 100  # budgets tried for min_quality

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


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
) -> TierMap:
    """Fit a tier map whose mean cost on the calibrate split is within the budget.

    costs: activated parameters per tier, strictly increasing. guard_alpha: use a tier below the top
    only where, with probability 1 - guard_delta over the calibrate split, at most this share of
    requests loses against the top tier; None for no guard. upper_cut: let a threshold map send
    hopeless requests back to the base tier. Raises ValueError for too few requests, mismatched
    tiers, or a budget or guard that cannot be kept.
    """
    costs = tuple(float(cost) for cost in costs)
    num_tiers = len(costs)
    _check_inputs(fit, calibrate, num_tiers, kind, upper_cut)
    template = replace(
        TierMap.untrained(tier_names, costs),
        calibration=tuple(
            _isotonic_curve(fit.difficulty, fit.quality[:, t]) for t in range(num_tiers)
        ),
        default_tier=num_tiers - 1 if default_tier is None else default_tier,
    )
    if guard_alpha is not None:
        guard = _fit_guard(template, fit, calibrate, guard_alpha, guard_delta)
        template = replace(template, guard=guard)
    limit = budget.mean_limit(costs)
    solver = _Solver(template, calibrate, kind, upper_cut)
    if limit is not None:
        solver.check_limit(limit)
        tier_map = solver.solve(limit)
    else:
        assert budget.min_quality is not None
        tier_map = solver.cheapest(budget.min_quality)
    recorded = {name: value for name, value in asdict(budget).items() if value is not None}
    return replace(tier_map, budget=recorded, statistics=_statistics(tier_map, fit, calibrate))


def _check_inputs(fit: Split, calibrate: Split, num_tiers: int, kind: str, upper_cut: bool) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    if upper_cut and kind != "threshold":
        raise ValueError("upper_cut: only threshold maps have one; a gain map needs none")
    for name, split in (("fit", fit), ("calibrate", calibrate)):
        if split.quality.shape[1] != num_tiers:
            raise ValueError(
                f"{name} split: quality has {split.quality.shape[1]} tiers, costs has {num_tiers}"
            )
        if len(split) < MIN_REQUESTS:
            raise ValueError(
                f"{name} split: {len(split)} requests are too few; at least {MIN_REQUESTS}"
            )
        if len(split) < ADVISED_REQUESTS:
            logger.warning(
                "%s split: %d requests; %d or more are advised", name, len(split), ADVISED_REQUESTS
            )
    if np.array_equal(fit.difficulty, calibrate.difficulty) and np.array_equal(
        fit.quality, calibrate.quality
    ):
        raise ValueError("calibrate split: identical to the fit split; they must be disjoint")


def _isotonic_curve(difficulty: Floats, quality: Floats) -> Curve:
    """Isotonic regression of quality, decreasing in difficulty: knots at its blocks' centres.

    Knots at block centres instead of edges ("centred isotonic regression", Oron and Flournoy 2017)
    leave no flat steps inside: on a step every request would change tier at the same lambda, and
    the map could only jump over the budget instead of meeting it.
    """
    model = IsotonicRegression(y_min=0.0, y_max=1.0, increasing=False)
    fitted = model.fit_transform(difficulty, quality)
    # Ascending -P is ascending difficulty.
    levels, block = np.unique(-fitted, return_inverse=True)
    centres = np.bincount(block, weights=difficulty) / np.bincount(block)
    x, y = np.clip(centres, 0.0, 1.0), np.clip(-levels, 0.0, 1.0)
    # Rounding may merge the centres of adjacent blocks; adding 0.0 turns -0.0 into 0.0.
    distinct = np.append(True, x[1:] > np.maximum.accumulate(x)[:-1])
    return tuple(x[distinct].tolist()), tuple((y[distinct] + 0.0).tolist())


def clopper_pearson_upper(failures: int, trials: int, delta: float) -> float:
    """Upper bound on a failure rate, valid with probability 1 - delta (Clopper, Pearson 1934)."""
    if failures >= trials:
        return 1.0
    return float(beta.ppf(1.0 - delta, failures + 1, trials - failures))


def _losses(quality: Floats, tier: int) -> Bools:
    """Bool [N]: requests on which a tier falls short of the top tier."""
    lost: Bools = quality[:, -1] - quality[:, tier] > LOSS_TOLERANCE
    return lost


def _fit_guard(
    template: TierMap, fit: Split, calibrate: Split, alpha: float, delta: float
) -> dict[str, Any]:
    """Per tier below the top, the largest loss P_top - P_t whose failure bound is <= alpha.

    A failure is to lose against the top tier, not to be wrong: on a hopeless request staying low
    loses nothing. The candidate cuts come from the fit split, so one bound per cut at delta /
    (tiers * cuts) holds for all.
    """
    for name, level in (("guard_alpha", alpha), ("guard_delta", delta)):
        if not 0.0 < level < 1.0:
            raise ValueError(f"{name}: {level} is outside (0, 1)")
    expected_fit = template.success(fit.difficulty)
    expected = template.success(calibrate.difficulty)
    guard: dict[str, Any] = {"alpha": alpha, "delta": delta, "tolerance": LOSS_TOLERANCE}
    guard |= {"cuts": [], "bounds": [], "accepted": []}
    for tier in range(template.num_tiers - 1):
        loss_fit = expected_fit[:, -1] - expected_fit[:, tier]
        loss, failed = expected[:, -1] - expected[:, tier], _losses(calibrate.quality, tier)
        candidates = np.unique(np.quantile(loss_fit, np.linspace(0.0, 1.0, _GUARD_CUTS)))
        share = delta / (template.num_tiers - 1) / len(candidates)
        cut, bound, accepted = -1.0, 0.0, 0  # -1: no loss is ever accepted
        for candidate in candidates.tolist():
            inside = loss <= candidate
            candidate_bound = clopper_pearson_upper(
                int(failed[inside].sum()), int(inside.sum()), share
            )
            if candidate_bound <= alpha:
                cut, bound, accepted = candidate, candidate_bound, int(inside.sum())
        for key, value in (("cuts", cut), ("bounds", bound), ("accepted", accepted)):
            guard[key].append(value)
    return guard


class _Solver:
    """Chooses lambda or the cuts on one calibrate split, under a mean of activated parameters."""

    def __init__(self, template: TierMap, calibrate: Split, kind: str, upper_cut: bool) -> None:
        self.template, self.calibrate = template, calibrate
        self.kind, self.upper_cut = kind, upper_cut
        self.costs = np.asarray(template.costs)
        self.relative = self.costs / self.costs[-1]
        self.success = template.success(calibrate.difficulty)
        cuts = None if template.guard is None else template.guard["cuts"]
        self.allowed = guard_allows(self.success, cuts)

    def check_limit(self, limit: float) -> None:
        """ValueError if no map can have so small a mean cost."""
        top = self.template.costs[-1]
        least = float(self.costs[self.allowed.argmax(axis=1)].mean())
        if limit < least * (1.0 - 1e-12):
            why = "the guard needs" if not self.allowed.all() else "the base tier costs"
            raise ValueError(
                f"budget: a mean of {limit:g} activated parameters ({limit / top:.1%} of the top "
                f"tier) cannot be kept; {why} {least:g} ({least / top:.1%})"
            )

    def solve(self, limit: float, max_transitions: int = MAX_TRANSITIONS) -> TierMap:
        """The best map whose mean cost on the calibrate split is at most `limit`."""
        if self.kind == "gain":
            return self._gain(limit)
        return self._threshold(limit, max_transitions)

    def cheapest(self, min_quality: float) -> TierMap:
        """The cheapest of 101 budgets whose map keeps that fraction of the top tier's quality."""
        observed = self.calibrate.quality
        target = min_quality * float(observed[:, -1].mean())
        least = float(self.costs[self.allowed.argmax(axis=1)].mean())
        reached = 0.0
        for limit in np.linspace(least, self.costs[-1], _QUALITY_STEPS + 1).tolist():
            tier_map = self.solve(limit, MAX_TRANSITIONS // 100)  # a hundred of them
            tiers = tier_map.tiers(self.calibrate.difficulty)
            quality = float(observed[np.arange(len(tiers)), tiers].mean())
            if quality >= target - 1e-12:
                return tier_map
            reached = max(reached, quality)
        if self.kind == "threshold":  # always the top tier keeps all of its quality
            return replace(tier_map, thresholds=(0.0,) * (len(self.costs) - 1), upper_cut=None)
        raise ValueError(
            f"budget: min_quality {min_quality} cannot be kept; on the calibrate split a gain map "
            f"reaches {reached * min_quality / max(target, 1e-12):.3f} of the top tier's quality"
        )

    def _gain(self, limit: float) -> TierMap:
        """Bisect the smallest lambda whose mean cost is within the limit."""

        def fits(gain_lambda: float) -> bool:
            chosen = gain_choice(self.success, self.relative, gain_lambda, self.allowed)
            return bool(self.costs[chosen].mean() <= limit * (1.0 + 1e-12))

        low, high = 0.0, 0.0  # the mean cost never rises with lambda
        if not fits(0.0) and len(self.costs) > 1:
            # From here on no gain, at most 1, pays for even the smallest step in cost.
            high = 1.0 / float(np.diff(self.relative).min()) + 1.0
            while high - low > 1e-15 * high and low < (middle := (low + high) / 2) < high:
                low, high = (low, middle) if fits(middle) else (middle, high)
        return replace(self.template, kind="gain", gain_lambda=high)

    def _threshold(self, limit: float, max_transitions: int) -> TierMap:
        """Exact cuts for the calibrated quality, with the guard's effect on value and cost."""
        num_tiers = len(self.costs)
        values, group, counts = np.unique(
            self.calibrate.difficulty, return_inverse=True, return_counts=True
        )
        first = np.unique(group, return_index=True)[1]
        segments = [*range(num_tiers), *([0] if self.upper_cut and num_tiers > 1 else [])]
        rows = np.arange(len(values))
        success, allowed = self.success[first], self.allowed[first]
        value, cost = np.empty((2, len(segments), len(values)))
        for s, tier in enumerate(segments):
            effective = raise_to_allowed(np.full(len(values), tier, dtype=np.int64), allowed)
            value[s] = counts * success[rows, effective]
            cost[s] = counts * self.relative[effective]
        total = limit / float(self.costs[-1]) * len(self.calibrate)
        found = solve_cuts(value, cost, total, max_transitions)
        if not found.is_exact:
            logger.debug("thresholds: exact search too large, found on a refined grid")
        boundaries = found.boundaries[: num_tiers - 1]
        hopeless = found.boundaries[num_tiers - 1] if len(segments) > num_tiers else len(values)
        # A tier with nothing between its cut and the hopeless region is never used.
        thresholds = tuple(_between(values, b) if b < hopeless else NEVER for b in boundaries)
        upper = None
        if 0 < hopeless < len(values):
            # The cut is exclusive (d > upper_cut), thresholds are inclusive.
            upper = float(np.nextafter(_between(values, hopeless), 0.0))
        return replace(self.template, kind="threshold", thresholds=thresholds, upper_cut=upper)


def _between(values: Floats, boundary: int) -> float:
    """A threshold t with values[boundary - 1] < t <= values[boundary]; 0 below the first value."""
    if boundary == 0:
        return 0.0
    middle = float((values[boundary - 1] + values[boundary]) / 2)
    return middle if middle > values[boundary - 1] else float(values[boundary])


def _statistics(tier_map: TierMap, fit: Split, calibrate: Split) -> dict[str, Any]:
    """What the map does on the calibrate split."""
    tiers, success = tier_map.tiers(calibrate.difficulty), tier_map.success(calibrate.difficulty)
    quality, costs = calibrate.quality, np.asarray(tier_map.costs)
    rows, num_tiers = np.arange(len(tiers)), tier_map.num_tiers
    lost = [int(_losses(quality[tiers == t], t).sum()) for t in range(num_tiers)]
    count = [int((tiers == t).sum()) for t in range(num_tiers)]
    return {
        "num_fit": len(fit),
        "num_calibrate": len(calibrate),
        "mean_activated": float(costs[tiers].mean()),
        "fraction": float(costs[tiers].mean() / costs[-1]),
        "quality": float(quality[rows, tiers].mean()),
        "quality_by_tier": quality.mean(axis=0).tolist(),
        "tier_shares": [n / len(tiers) for n in count],
        "loss_by_tier": [k / n if n else 0.0 for k, n in zip(lost, count, strict=True)],
        "difficulty_histogram": _histogram(calibrate.difficulty),
        "ece_by_tier": [
            expected_calibration_error(success[:, t], quality[:, t]) for t in range(num_tiers)
        ],
        "brier_by_tier": [brier_score(success[:, t], quality[:, t]) for t in range(num_tiers)],
    }


def _histogram(difficulty: Floats) -> list[int]:
    """Counts in HISTOGRAM_BINS equal bins of [0, 1]: what traffic is held against later."""
    counts, _ = np.histogram(difficulty, bins=HISTOGRAM_BINS, range=(0.0, 1.0))
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
