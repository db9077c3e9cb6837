"""Lambda or thresholds under a budget, for given calibration curves: no outcome is looked at.

N requests, T tiers.
"""

import logging
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dvpa.tiers.budget import ROUNDING, Traffic
from dvpa.tiers.cuts import MAX_TRANSITIONS, solve_cuts
from dvpa.tiers.tier_map import NEVER, TierMap, gain_choice, guard_allows, raise_to_allowed

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
_MEANING = {
    "activated_params": "activated parameters", "flops": "FLOPs per request",
    "ms": "milliseconds per request",
}  # fmt: skip


class Solver:
    """Chooses lambda or the cuts so that a mean cost over `traffic` is met.

    Args:
        template: its calibration, and its guard's cuts if it has one.
        traffic: the requests whose mean cost counts.
        unit: of the traffic's costs, see `Budget.unit`.
    """

    def __init__(
        self,
        template: TierMap,
        traffic: Traffic,
        kind: str,
        upper_cut: bool = False,
        unit: str = "activated_params",
    ) -> None:
        self.template, self.traffic = template, traffic
        self.kind, self.upper_cut, self.unit = kind, upper_cut, unit
        self.relative = np.asarray(template.costs) / template.costs[-1]
        self.costs = _costs_of(template, traffic, unit)
        self.success = template.success(traffic.difficulty)
        cuts = None if template.guard is None else template.guard["cuts"]
        self.allowed = guard_allows(self.success, cuts)

    @property
    def least(self) -> float:
        """The smallest mean cost of any map."""
        return self.mean_cost(self.allowed.argmax(axis=1))

    @property
    def most(self) -> float:
        """The mean cost of always the top tier."""
        return float(self.costs[:, -1].mean())

    def mean_cost(self, tiers: npt.NDArray[np.int64]) -> float:
        """Of the choice `tiers` [N]."""
        return float(self.costs[np.arange(len(tiers)), tiers].mean())

    def check_limit(self, limit: float) -> None:
        """ValueError if no map can have so small a mean cost."""
        if limit < self.least * (1.0 - ROUNDING):
            why = "the guard needs" if not self.allowed.all() else "the base tier costs"
            raise ValueError(
                f"budget: a mean of {limit:g} {_MEANING[self.unit]} ({limit / self.most:.1%} of "
                f"the top tier) cannot be kept; {why} {self.least:g} "
                f"({self.least / self.most:.1%})"
            )

    def solve(self, limit: float, max_transitions: int = MAX_TRANSITIONS) -> TierMap:
        """The best map whose mean cost over the traffic is at most `limit`."""
        if self.kind == "gain":
            return self._gain(limit)
        return self._threshold(limit, max_transitions)

    def _gain(self, limit: float) -> TierMap:
        """Bisect the smallest lambda whose mean cost is within the limit."""

        def fits(gain_lambda: float) -> bool:
            chosen = gain_choice(self.success, self.relative, gain_lambda, self.allowed)
            return self.mean_cost(chosen) <= limit * (1.0 + ROUNDING)

        low, high = 0.0, 0.0  # the mean cost never rises with lambda, where higher tiers cost more
        if not fits(0.0) and len(self.relative) > 1:
            # From here on no gain, at most 1, pays for even the smallest step in cost.
            high = 1.0 / float(np.diff(self.relative).min()) + 1.0
            while high - low > 1e-15 * high and low < (middle := (low + high) / 2) < high:
                low, high = (low, middle) if fits(middle) else (middle, high)
        return replace(self.template, kind="gain", thresholds=(), upper_cut=None, gain_lambda=high)

    def _threshold(self, limit: float, max_transitions: int) -> TierMap:
        """Exact cuts for the calibrated quality, with the guard's effect on value and cost."""
        num_tiers = len(self.relative)
        values, group, counts = np.unique(
            self.traffic.difficulty, return_inverse=True, return_counts=True
        )
        first = np.unique(group, return_index=True)[1]
        segments = [*range(num_tiers), *([0] if self.upper_cut and num_tiers > 1 else [])]
        rows = np.arange(len(values))
        success, allowed = self.success[first], self.allowed[first]
        # Grouped where difficulty ties. The solver wants costs that rise with the tier: an answer
        # that is shorter at a higher tier counts as if it were not.
        rising = np.maximum.accumulate(self.costs, axis=1) / self.most
        total = np.stack(
            [np.bincount(group, rising[:, t], minlength=len(values)) for t in range(num_tiers)]
        )
        value, cost = np.empty((2, len(segments), len(values)))
        for s, tier in enumerate(segments):
            effective = raise_to_allowed(np.full(len(values), tier, dtype=np.int64), allowed)
            value[s] = counts * success[rows, effective]
            cost[s] = total[effective, rows]
        found = solve_cuts(value, cost, limit / self.most * len(self.traffic), max_transitions)
        if not found.is_exact:
            gap = (found.bound - found.value) / max(found.bound, 1e-12)
            logger.debug("thresholds: not proved exact, at most %.1e below the best", gap)
        boundaries = found.boundaries[: num_tiers - 1]
        hopeless = found.boundaries[num_tiers - 1] if len(segments) > num_tiers else len(values)
        # A tier with nothing between its cut and the hopeless region is never used.
        thresholds = tuple(_between(values, b) if b < hopeless else NEVER for b in boundaries)
        upper = None
        if 0 < hopeless < len(values):
            # The cut is exclusive (d > upper_cut), thresholds are inclusive.
            upper = float(np.nextafter(_between(values, hopeless), 0.0))
        return replace(
            self.template,
            kind="threshold",
            thresholds=thresholds,
            upper_cut=upper,
            gain_lambda=None,
        )


def _costs_of(template: TierMap, traffic: Traffic, unit: str) -> Floats:
    """[N, T] in the unit. ValueError if they are missing, or do not rise with the tier."""
    num_tiers = template.num_tiers
    if traffic.costs is None:
        if unit != "activated_params":
            raise ValueError(f"budget: {_MEANING[unit]} need the costs of each request, none given")
        return np.tile(np.asarray(template.costs), (len(traffic), 1))
    if traffic.costs.shape[1] != num_tiers:
        raise ValueError(f"costs: {traffic.costs.shape[1]} tiers, the tier map has {num_tiers}")
    mean = traffic.costs.mean(axis=0)
    if bool((np.diff(mean) <= 0.0).any()):
        shown = ", ".join(
            f"{name} {m:g}" for name, m in zip(template.tier_names, mean, strict=True)
        )
        raise ValueError(
            f"costs: must rise with the tier, the mean {_MEANING[unit]} are {shown}: there is "
            "nothing to save"
        )
    return traffic.costs


def _between(values: Floats, boundary: int) -> float:
    """A threshold t with values[boundary - 1] < t <= values[boundary]; 0 below the first value."""
    if boundary == 0:
        return 0.0
    middle = float((values[boundary - 1] + values[boundary]) / 2)
    return middle if middle > values[boundary - 1] else float(values[boundary])
