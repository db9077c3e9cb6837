"""The guard: of the requests that may stay below the top tier, few lose against it.

A failure is to lose against the top tier, not to be wrong: on a hopeless request staying low loses
nothing. A map may use a tier below the top only where the calibrated loss P_top - P_t is at most a
cut, the same for every tier. What is bounded are decisions: each request of the calibrate split at
the cheapest tier that the cut accepts. Per tier it would not do: a middle tier's region holds the
easy requests that the base tier answers, and its rate is lower than that of the ones it gets.

Cuts are tried from strict to loose, each bound (Clopper, Pearson) at the full delta, up to the
first that fails: fixed-sequence testing, so that all accepted ones hold together with probability
1 - delta ("learn then test", arXiv 2110.01052). Neither the cuts nor the first one tried depend on
outcomes of the calibrate split.

A budget that allows more than the cheapest tiers lifts some of those requests, which loses less.

N requests, T tiers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

from dvpa.tiers.budget import Split
from dvpa.tiers.tier_map import TierMap, guard_allows

LOSS_TOLERANCE = 0.1  # a failure is to be this much below the top tier
# Calibrated losses that may be accepted, in multiples of alpha: the rate is a mean over requests
# whose losses differ, so the largest of them may be several times as large.
_MULTIPLES = np.geomspace(0.2, 20.0, 28)
_SPARE_FAILURES = 3  # the first cut tried holds with so many failures: chance alone ends few runs
NOTHING = -1.0  # a cut that no loss is below

Floats = npt.NDArray[np.float64]
Tiers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def clopper_pearson_upper(failures: int, trials: int, delta: float) -> float:
    """Upper bound on a failure rate, valid with probability 1 - delta (Clopper, Pearson 1934)."""
    if failures >= trials:
        return 1.0
    return float(beta.ppf(1.0 - delta, failures + 1, trials - failures))


def requests_needed(alpha: float, delta: float, failures: int = 0) -> int:
    """The fewest trials in which so many failures still prove a rate of at most alpha."""
    low, high = failures, failures + 1
    while clopper_pearson_upper(failures, high, delta) > alpha:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = clopper_pearson_upper(failures, middle, delta) <= alpha
        low, high = (low, middle) if is_enough else (middle, high)
    return high


@dataclass(frozen=True)
class StayLow:
    """Requests kept below the top tier on a split, and how many of them lose against it."""

    kept: int
    failures: int

    @classmethod
    def of(cls, tiers: Tiers, quality: Floats) -> "StayLow":
        """Of the choice `tiers` [N], given what every tier reached: quality [N, T]."""
        low = tiers < quality.shape[1] - 1
        lost = losses(quality, tiers)
        return cls(int(low.sum()), int((lost & low).sum()))

    def bound(self, delta: float) -> float:
        """Upper bound on the failure rate; 0 if none is kept: there is nothing to fail."""
        return clopper_pearson_upper(self.failures, self.kept, delta) if self.kept else 0.0


def losses(quality: Floats, tiers: Tiers) -> Bools:
    """Bool [N]: requests that lose against the top tier at the given tiers [N]."""
    chosen = quality[np.arange(len(tiers)), tiers]
    lost: Bools = quality[:, -1] - chosen > LOSS_TOLERANCE
    return lost


def fit_guard(template: TierMap, calibrate: Split, alpha: float, delta: float) -> dict[str, Any]:
    """The loosest guard whose failures are bounded by alpha, with probability 1 - delta.

    `template` has the calibration, fitted on other requests. Returns {alpha, delta, tolerance,
    cuts [T - 1], kept, failures, bound}; with cuts below 0 no request may stay low. ValueError for
    alpha or delta outside (0, 1).
    """
    for name, level in (("guard_alpha", alpha), ("guard_delta", delta)):
        if not 0.0 < level < 1.0:
            raise ValueError(f"{name}: {level} is outside (0, 1)")
    success, num_lower = template.success(calibrate.difficulty), template.num_tiers - 1
    enough = min(requests_needed(alpha, delta, _SPARE_FAILURES), len(calibrate) // 2)
    best, found = NOTHING, StayLow(0, 0)
    for cut in np.minimum(_MULTIPLES * alpha, 1.0).tolist():
        cheapest = guard_allows(success, [cut] * num_lower).argmax(axis=1)
        tried = StayLow.of(cheapest, calibrate.quality)
        if tried.kept < enough:
            continue
        if tried.bound(delta) > alpha:
            break
        best, found = cut, tried
    guard: dict[str, Any] = {"alpha": alpha, "delta": delta, "tolerance": LOSS_TOLERANCE}
    guard |= {"cuts": [best] * num_lower, "kept": found.kept, "failures": found.failures}
    return guard | {"bound": found.bound(delta)}
