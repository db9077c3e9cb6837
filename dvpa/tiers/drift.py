"""Drift of the difficulty: recent requests against the calibration set, as one number. No HTTP.

The number is the population stability index over groups of bins, C_g and R_g being the shares of
the calibration set and of the recent requests in group g:

    PSI = sum_g (R_g - C_g) ln(R_g / C_g)

No term is negative, equal shares give 0. By custom, below 0.1 traffic is as calibrated, and above
0.25 it is not: the tier map's budget and guard then hold for other requests than those that come.

The histogram's 20 bins are merged to at most 10 groups of equal mass, since the noise of the index
grows with their number: about (groups - 1) (1 / recent + 1 / calibration) without any drift.
"""

import logging
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from math import log

from dvpa.tiers.tier_map import TierMap

logger = logging.getLogger(__name__)

NUM_BINS = 20  # equal bins of [0, 1]: calibrate's histogram has as many
MIN_REQUESTS = 100  # below it noise alone looks like drift (0.09 with 10 groups)
_MAX_GROUPS = 10
_MIN_MASS = 15  # calibration requests in a group
_FLOOR = 0.5  # requests that an empty group counts as


def bin_of(difficulty: float) -> int:
    """The bin of a difficulty in [0, 1]."""
    return min(int(difficulty * NUM_BINS), NUM_BINS - 1)


def stability_index(calibration: Sequence[int], recent: Sequence[int]) -> float:
    """PSI of two histograms over the same bins, each with one request at least; see above.

    Bins outside the calibration's range are groups of their own: nothing was expected there.

    Raises:
        ValueError: the lengths differ, or a histogram is empty.
    """
    if len(calibration) != len(recent):
        raise ValueError(f"recent: {len(recent)} bins must be {len(calibration)}")
    num_expected, num_recent = sum(calibration), sum(recent)
    if num_expected <= 0 or num_recent <= 0:
        raise ValueError(
            f"histograms of {num_expected} and {num_recent} requests must not be empty"
        )
    index = 0.0
    for group in _groups(calibration):
        expected, found = sum(calibration[group]), sum(recent[group])
        if expected or found:
            c = max(expected, _FLOOR) / num_expected
            r = max(found, _FLOOR) / num_recent
            index += (r - c) * log(r / c)
    return index


def _groups(calibration: Sequence[int]) -> list[slice]:
    """All bins in order: those below the calibration's range, groups of equal mass, those above."""
    used = [i for i, count in enumerate(calibration) if count]
    first, last = used[0], used[-1] + 1
    mass = max(sum(calibration) / _MAX_GROUPS, _MIN_MASS)
    edges, in_group = [first], 0
    for i in range(first, last):
        in_group += calibration[i]
        if in_group >= mass:
            edges.append(i + 1)
            in_group = 0
    if in_group and len(edges) > 1:
        edges.pop()  # too few are left for a group of their own: they join the last one
    bounds = sorted({0, *edges, last, len(calibration)})
    return [slice(start, stop) for start, stop in pairwise(bounds)]


class Drift:
    """The difficulties of the last `window` requests that had one.

    Args:
        tier_map: its statistics hold the calibration's histogram, if calibrate recorded one.
    """

    def __init__(self, tier_map: TierMap, window: int = 500) -> None:
        self._window = window
        self._recent: deque[int] = deque()
        self.counts = [0] * NUM_BINS
        self.set_tier_map(tier_map)

    def set_tier_map(self, tier_map: TierMap) -> None:
        """Compare with this map's calibration from now on; the requests seen stay."""
        self.calibration_counts = _histogram(tier_map)

    def add(self, difficulty: float) -> None:
        """Take in one request's difficulty, in [0, 1]."""
        index = bin_of(difficulty)
        self._recent.append(index)
        self.counts[index] += 1
        if len(self._recent) > self._window:
            self.counts[self._recent.popleft()] -= 1

    @property
    def num_requests(self) -> int:
        """Requests in the window."""
        return len(self._recent)

    @property
    def index(self) -> float | None:
        """PSI of the window; None without a calibration histogram or with too few requests."""
        enough = self.num_requests >= min(MIN_REQUESTS, self._window)
        if self.calibration_counts is None or not enough:
            return None
        return stability_index(self.calibration_counts, self.counts)


def _histogram(tier_map: TierMap) -> list[int] | None:
    """The calibration's counts; None for a map without them, or with something else in place."""
    counts = (tier_map.statistics or {}).get("difficulty_histogram")
    if counts is None:
        return None
    is_sound = (
        isinstance(counts, list)
        and len(counts) == NUM_BINS
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts)
        and sum(counts) > 0
    )
    if not is_sound:
        logger.warning(
            "tier map: statistics.difficulty_histogram is not %d counts; drift is unknown", NUM_BINS
        )
        return None
    return list(counts)
