"""Which source a sample comes from, and its number there, computed from the sample's number alone.

A mixture is a periodic pattern in which every source has its share up to less than one sample, at
every moment: Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980).
The counts in front of every place of the pattern are kept, so a position deep in a run costs no
more than the first. (Megatron's `BlendedDataset` replays a greedy rule over all samples into an
index file of their number; its deviation has no such bound.)

Letters: K sources, P samples of a pattern.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
MAX_PERIOD = 10_000  # weights that need a longer pattern are rounded to this many parts


class Mixture:
    """`weights` [K], any positive sum; a source of weight 0 is never drawn.

    Weights are taken as the decimal numbers they are written as: 0.7 and 0.3 make a pattern of
    ten. `shares` [K] are the exact shares that result.

    Raises:
        ValueError: a negative or non-finite weight, or none above 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        parts = _whole_parts(weights)
        self.period = sum(parts)
        self.shares = np.array(parts) / self.period
        self.pattern = _pattern(parts)
        drawn = self.pattern[:, None] == np.arange(len(parts))
        self._before = np.concatenate((np.zeros((1, len(parts)), int), drawn.cumsum(0)))  # [P+1, K]

    def source(self, numbers: IntArray) -> IntArray:
        """The source of samples [N]: int64 [N]."""
        return self.pattern[numbers % self.period]

    def counts(self, numbers: IntArray) -> IntArray:
        """How many of the samples before each of `numbers` [N] every source gives: [N, K]."""
        whole, rest = np.divmod(numbers, self.period)
        counts: IntArray = whole[:, None] * self._before[-1] + self._before[rest]
        return counts


class Schedule:
    """One mixture after the other, for so many samples each; the last one goes on for ever.

    Every source's own numbers go on where the mixture before left them.

    Raises:
        ValueError: no mixture, or mixtures of different numbers of sources.
    """

    def __init__(self, segments: Sequence[tuple[int, Mixture]]) -> None:
        if len({len(mixture.shares) for _, mixture in segments}) != 1:
            raise ValueError("segments: at least one mixture, all of the same sources")
        self.mixtures = [mixture for _, mixture in segments]
        lengths = np.array([length for length, _ in segments], dtype=np.int64)
        self._starts = lengths.cumsum() - lengths
        used = [m.counts(np.array([n]))[0] for n, m in segments]
        self._used = np.cumsum(used, axis=0) - used  # [segments, K] before each segment

    def locate(self, numbers: npt.ArrayLike) -> tuple[IntArray, IntArray]:
        """(source, number within it), int64 [N] each, of samples [N]."""
        wanted = np.asarray(numbers, dtype=np.int64)
        sources, within = np.empty_like(wanted), np.empty_like(wanted)
        segments = np.searchsorted(self._starts, wanted, side="right") - 1
        for segment in np.unique(segments):
            here, mixture = segments == segment, self.mixtures[segment]
            local = wanted[here] - self._starts[segment]
            chosen = mixture.source(local)
            counts = mixture.counts(local) + self._used[segment]
            sources[here] = chosen
            within[here] = counts[np.arange(len(local)), chosen]
        return sources, within


def _whole_parts(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights, their sum at most MAX_PERIOD."""
    numbers = [float(weight) for weight in weights]
    if not all(0 <= w < float("inf") for w in numbers) or not sum(numbers) > 0:
        raise ValueError(f"weights: {numbers} must be 0 or more, one of them above 0")
    exact = [Fraction(repr(w)) for w in numbers]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    used = sum(share > 0 for share in shares)
    if used > MAX_PERIOD:
        raise ValueError(f"weights: {used} sources; at most {MAX_PERIOD} fit")
    # Largest remainders, and at least one part for every source that has a weight.
    least = [int(share > 0) for share in shares]
    ideal = [share * (MAX_PERIOD - used) for share in shares]
    parts = [low + int(want) for low, want in zip(least, ideal, strict=True)]
    rest = sorted(range(len(parts)), key=lambda k: (int(ideal[k]) - ideal[k], k))
    for k in rest[: MAX_PERIOD - sum(parts)]:
        parts[k] += 1
    return parts


def _pattern(parts: Sequence[int]) -> IntArray:
    """The source of every place, int64 [P]; `parts` [K] sum to P.

    Of the sources far enough behind their share, the one whose deadline comes first: the moment at
    which it would be a whole sample (less the bound's slack) behind.
    """
    used = [k for k, part in enumerate(parts) if part]
    period, slack = sum(parts), max(2 * len(used) - 2, 1)
    drawn = dict.fromkeys(used, 0)
    # In units of the period. Distinct quotients of numbers this small are distinct as floats.
    deadline = {k: (slack - 1) / parts[k] for k in used}
    pattern = np.empty(period, dtype=np.int64)
    for place in range(1, period + 1):
        behind = [k for k in used if slack * (parts[k] * place - period * drawn[k]) >= period]
        chosen = min(behind, key=lambda k: (deadline[k], k))
        pattern[place - 1] = chosen
        drawn[chosen] += 1
        deadline[chosen] = (slack - 1 + slack * drawn[chosen]) / parts[chosen]
    return pattern
