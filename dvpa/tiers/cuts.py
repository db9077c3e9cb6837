"""The best ordered cuts under a budget: dynamic programming over requests sorted by difficulty.

Requests, sorted by difficulty and grouped where it ties, are split into consecutive segments.
Segment s has a fixed tier, so item i in it has value[s, i] and cost[s, i]; segments may be empty.
Wanted: the split of largest total value with total cost <= budget.

1. For a price per unit of cost the unconstrained optimum is a DP in O(S M). Bisecting the price
   gives a feasible split and, by weak duality, an upper bound for every partial split. Alone it is
   not enough: ordered cuts must pay for the hopeless tail before they reach the middle, so the
   optimum is often far inside the convex hull.
2. A forward DP over segments keeps, per boundary, the nondominated (cost, value) pairs that can
   still meet the budget and whose upper bound reaches the best split known. Boundaries through
   which no split reaches it are left out beforehand. The last cut is a range maximum. It is exact.
3. Where that is too large, branch and bound over boxes of boundaries takes over (`boxes`): exact as
   well, in a second or two for a million items.

S segments, M items, boundaries 0 .. M, L labels.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dvpa.tiers.boxes import TOLERANCE, search_boxes
from dvpa.tiers.budget import ROUNDING

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_COARSE = 16_384  # boundaries that a first guess of the price is made on
MAX_TRANSITIONS = 4_000_000  # of one segment: about a second and 150 MB


@dataclass(frozen=True)
class Cuts:
    """A split into segments: `boundaries[s]`, one of S - 1, is the first item after segment s."""

    boundaries: tuple[int, ...]
    value: float
    cost: float
    is_exact: bool  # proved optimal; otherwise the best of the boxes looked into
    bound: float  # no split under the budget is worth more


@dataclass(frozen=True)
class _Problem:
    """Prefix sums over items, [S, M + 1], with a leading zero."""

    value: Floats
    cost: Floats

    def at(self, grid: Ints) -> "_Problem":
        """The same problem with cuts only at some boundaries, the first and last among them."""
        return _Problem(self.value[:, grid], self.cost[:, grid])


def solve_cuts(
    value: Floats, cost: Floats, budget: float, max_transitions: int = MAX_TRANSITIONS
) -> Cuts:
    """The best split under the budget; value, cost: [S, M], M >= 1. ValueError if none fits.

    The items of the last segment must all cost at least, or all at most, what they cost in the one
    before.
    """
    zero = np.zeros((value.shape[0], 1))
    problem = _Problem(*(np.concatenate([zero, a.cumsum(axis=1)], axis=1) for a in (value, cost)))
    limit = budget + ROUNDING * abs(budget)  # meeting the budget exactly must count
    cheapest = -_completion(problem, 0.0, -1.0)[0, 0]
    if cheapest > limit:
        raise ValueError(
            f"budget: {budget:g} is below the cheapest possible total cost {cheapest:g}"
        )
    price, best = _bisect_price(problem, limit)
    if len(value) == 1:
        return replace(best, is_exact=True)
    exact = _label_setting(problem, limit, price, best.value, max_transitions)
    if exact is None:
        return _search_boxes(problem, limit, price, best, max_transitions)
    return replace(exact, bound=min(best.bound, exact.value))


def _search_boxes(
    problem: _Problem, budget: float, price: float, best: Cuts, max_transitions: int
) -> Cuts:
    """What is at least as good as `best`, and how good anything can be: see `boxes`. S >= 3."""
    last_cut = _LastCut(problem)

    def close(firsts: Ints) -> tuple[float, tuple[int, ...]] | None:
        at = np.hstack([np.zeros((len(firsts), 1), dtype=np.int64), firsts])
        segments = np.arange(firsts.shape[1])
        value, cost = (
            (sums[segments, at[:, 1:]] - sums[segments, at[:, :-1]]).sum(axis=1)
            for sums in (problem.value, problem.cost)
        )
        label, cut, value, cost = last_cut(budget, at[:, -1], value, cost)
        if not label.size:
            return None
        first = int(np.lexsort((cost, -value))[0])
        return float(value[first]), (*firsts[label[first]].tolist(), int(cut[first]))

    # A few boxes cost nothing, whatever is allowed.
    max_boxes = max(16, max_transitions // (4 << len(problem.value)))
    found = search_boxes(problem.value, problem.cost, budget, price, best.value, close, max_boxes)
    if found.boundaries is not None:
        value, cost = _totals(problem, found.boundaries)
        best = Cuts(found.boundaries, value, cost, False, best.bound)
    is_exact = found.bound <= best.value + TOLERANCE * max(1.0, abs(best.value))
    bound = best.value if is_exact else min(best.bound, found.bound)
    return replace(best, is_exact=is_exact, bound=bound)


def _completion(problem: _Problem, value_weight: float, cost_weight: float) -> Floats:
    """[S, M + 1]: the best weighted total over items b.. when item b may still be in segment s."""
    weighted = value_weight * problem.value + cost_weight * problem.cost
    best = np.empty_like(weighted)
    best[-1] = weighted[-1, -1] - weighted[-1]
    for s in range(len(weighted) - 2, -1, -1):
        leave = weighted[s] + best[s + 1]
        best[s] = np.maximum.accumulate(leave[::-1])[::-1] - weighted[s]
    return best


def _approach(problem: _Problem, value_weight: float, cost_weight: float) -> Floats:
    """[S, M + 1]: the best weighted total over items .. b - 1 when segment s ends at b."""
    weighted = value_weight * problem.value + cost_weight * problem.cost
    best = np.empty_like(weighted)
    best[0] = weighted[0]
    for s in range(1, len(weighted)):
        best[s] = weighted[s] + np.maximum.accumulate(best[s - 1] - weighted[s])
    return best


def _trace(problem: _Problem, value_weight: float, cost_weight: float) -> tuple[int, ...]:
    """The boundaries of a split that attains _completion(...)[0, 0]."""
    weighted = value_weight * problem.value + cost_weight * problem.cost
    best = _completion(problem, value_weight, cost_weight)
    boundaries: list[int] = []
    at = 0
    for s in range(len(weighted) - 1):
        leave = weighted[s, at:] + best[s + 1, at:]
        at += int(
            leave.size - 1 - leave[::-1].argmax()
        )  # the last one: stay in the cheaper segment on a tie
        boundaries.append(at)
    return tuple(boundaries)


def _totals(problem: _Problem, boundaries: tuple[int, ...]) -> tuple[float, float]:
    """Total value and cost of a split."""
    ends = np.array([*boundaries, problem.value.shape[1] - 1])
    starts, segment = np.array([0, *boundaries]), np.arange(len(ends))
    return (
        float((problem.value[segment, ends] - problem.value[segment, starts]).sum()),
        float((problem.cost[segment, ends] - problem.cost[segment, starts]).sum()),
    )


def _bisect_price(problem: _Problem, budget: float) -> tuple[float, Cuts]:
    """The price of the smallest dual bound met, and the best feasible split met on the way."""
    cheapest = _trace(problem, 0.0, -1.0)
    best = Cuts(cheapest, *_totals(problem, cheapest), False, np.inf)
    best_price, bound = 0.0, np.inf

    def is_feasible(price: float) -> bool:
        nonlocal best, best_price, bound
        boundaries = _trace(problem, 1.0, -price)
        value, cost = _totals(problem, boundaries)
        dual = value + price * (budget - cost)
        if dual < bound:
            best_price, bound = price, dual
        if cost <= budget and (value, -cost) > (best.value, -best.cost):
            best = Cuts(boundaries, value, cost, False, np.inf)
        return cost <= budget

    if is_feasible(0.0):
        return best_price, replace(best, bound=bound)
    low, high, num_halvings = 0.0, 1.0, 40
    last = problem.value.shape[1] - 1
    if last > 2 * _COARSE:  # a part of the boundaries tells nearly the same price
        grid = np.append(np.arange(0, last, last // _COARSE), last)
        guess = _bisect_price(problem.at(grid), budget)[0]
        low, high, num_halvings = guess * (1 - 1e-3), guess * (1 + 1e-3) + 1e-12, 12
        while low > 1e-9 and is_feasible(low):
            low, high = low / 2, low
    while high < 1e12 and not is_feasible(high):
        low, high = high, high * 4.0
    for _ in range(num_halvings):
        price = (low + high) / 2
        low, high = (low, price) if is_feasible(price) else (price, high)
    return best_price, replace(best, bound=bound)


def _label_setting(
    problem: _Problem, budget: float, price: float, known: float, max_transitions: int
) -> Cuts | None:
    """The exact optimum of at least the known value; None if too large or none fits. S >= 2."""
    completion, approach = _completion(problem, 1.0, -price), _approach(problem, 1.0, -price)
    cheapest = -_completion(problem, 0.0, -1.0)
    known -= 1e-9 * max(1.0, abs(known))  # keep ties, whatever their rounding
    num_segments = problem.value.shape[0]
    at, value, cost = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    parents: list[Ints] = []
    positions: list[Ints] = []
    for s in range(num_segments - 2):
        ends = np.nonzero(approach[s] + completion[s + 1] + price * budget >= known)[0]
        if at.size * ends.size > max_transitions:
            return None
        new_value = value[:, None] + problem.value[s, ends] - problem.value[s, at][:, None]
        new_cost = cost[:, None] + problem.cost[s, ends] - problem.cost[s, at][:, None]
        bound = new_value - price * (new_cost - budget) + completion[s + 1, ends]
        is_affordable = new_cost + cheapest[s + 1, ends] <= budget
        parent, end = np.nonzero((ends >= at[:, None]) & (bound >= known) & is_affordable)
        at, value, cost = ends[end], new_value[parent, end], new_cost[parent, end]
        kept = _nondominated(at, value, cost)
        parent, at, value, cost = parent[kept], at[kept], value[kept], cost[kept]
        parents.append(parent)
        positions.append(at)
    label, cut, value, cost = _LastCut(problem)(budget, at, value, cost)
    if label.size == 0:
        return None
    best = int(np.lexsort((cost, -value))[0])
    boundaries = [int(cut[best])]
    index = int(label[best])
    for parent, position in zip(reversed(parents), reversed(positions), strict=True):
        boundaries.append(int(position[index]))
        index = int(parent[index])
    total = float(value[best])
    return Cuts(tuple(reversed(boundaries)), total, float(cost[best]), True, total)


class _LastCut:
    """Completes splits whose last cut is still open."""

    def __init__(self, problem: _Problem) -> None:
        self._problem = problem
        # What changes when the cut between the last two segments moves; the cost monotonically.
        self._gain, self._spent = (a[-2] - a[-1] for a in (problem.value, problem.cost))
        self._largest = _RangeArgmax(self._gain)

    def __call__(
        self, budget: float, at: Ints, value: Floats, cost: Floats
    ) -> tuple[Ints, Ints, Floats, Floats]:
        """(label, cut, value, cost) of the labels [L] that fit, each with its best last cut."""
        ends, last = self._problem, len(self._gain) - 1
        base_value = value - ends.value[-2, at] + ends.value[-1, -1]
        base_cost = cost - ends.cost[-2, at] + ends.cost[-1, -1]
        room = budget - base_cost
        if self._spent[-1] <= 0.0:  # a later cut is cheaper: from some boundary on it fits
            first = last + 1 - np.searchsorted(self._spent[::-1], room, side="right")
            low, high = np.maximum(at, first), np.full(at.size, last)
        else:
            low, high = at, np.searchsorted(self._spent, room, side="right") - 1
        label = np.nonzero(low <= high)[0]
        cut = self._largest(low[label], high[label])
        return label, cut, base_value[label] + self._gain[cut], base_cost[label] + self._spent[cut]


class _RangeArgmax:
    """Index of the largest of values[low .. high], inclusive, for many ranges (sparse table)."""

    def __init__(self, values: Floats) -> None:
        self._values, self._table = values, [np.arange(len(values), dtype=np.int32)]
        while 2 ** len(self._table) <= len(values):
            half = 2 ** (len(self._table) - 1)
            left, right = self._table[-1][:-half], self._table[-1][half:]
            self._table.append(np.where(values[left] >= values[right], left, right))

    def __call__(self, low: Ints, high: Ints) -> Ints:
        best = np.empty(low.size, dtype=np.int64)
        level = np.frexp(high - low + 1)[1] - 1
        for k in np.unique(level):
            here, row = level == k, self._table[k]
            left, right = row[low[here]], row[high[here] - 2**k + 1]
            best[here] = np.where(self._values[left] >= self._values[right], left, right)
        return best


def _nondominated(at: Ints, value: Floats, cost: Floats) -> Ints:
    """Indices of the labels that no label at the same boundary beats in both value and cost."""
    order = np.lexsort((-value, cost, at))
    sorted_at, sorted_value = at[order], value[order]
    # Along rising cost, a label survives if its value exceeds every earlier one at its boundary.
    # Shifting each boundary by more than the range of values makes one running maximum serve all of
    # them (and ties values that differ by less than about 1e-10).
    span = np.ptp(value) + 1.0 if value.size else 1.0
    rank = np.unique(sorted_at, return_inverse=True)[1]
    shifted = sorted_value - (value.min() if value.size else 0.0) + rank * span
    first = np.ones(order.size, dtype=np.bool_)
    first[1:] = shifted[1:] > np.maximum.accumulate(shifted)[:-1]
    survivors: Ints = order[first]
    return survivors
