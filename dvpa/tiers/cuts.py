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
3. Where that is too large, it runs on a grid of boundaries, then on ever finer windows around the
   cuts found; what that finds may leave so few boundaries that step 2 fits after all.

S segments, M items, boundaries 0 .. M, L labels.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

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
    is_exact: bool  # proved optimal; otherwise the best found on a refined grid
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
        best = _search_grid(problem, limit, price, best, max_transitions)
        exact = _label_setting(problem, limit, price, best.value, max_transitions)
    return best if exact is None else replace(exact, bound=min(best.bound, exact.value))


def _search_grid(
    problem: _Problem, budget: float, price: float, best: Cuts, max_transitions: int
) -> Cuts:
    """Label setting on a grid of boundaries, then on windows of finer spacing around each cut."""
    num_segments, last = problem.value.shape[0], problem.value.shape[1] - 1
    size = int(max_transitions ** (1.0 / max(num_segments - 2, 1))) - 1
    spacing = max(1, -(-last // max(size, 1)))
    reach = max(1, size // (2 * num_segments))  # points on each side of a cut
    grid = np.append(np.arange(0, last, spacing), last)
    while True:
        found = _label_setting(problem.at(grid), budget, price, best.value, max_transitions)
        if found is not None and found.value > best.value:
            boundaries = tuple(grid[list(found.boundaries)].tolist())
            best = Cuts(boundaries, found.value, found.cost, False, best.bound)
        if spacing == 1:
            return best
        spacing = max(1, min(spacing // 2, -(-2 * spacing // reach)))
        window = np.array(best.boundaries)[:, None] + spacing * np.arange(-reach, reach + 1)
        grid = np.unique(np.clip(np.append(window, [0, last]), 0, last))


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
    label, cut, value, cost = _last_cut(problem, budget, at, value, cost)
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


def _last_cut(
    problem: _Problem, budget: float, at: Ints, value: Floats, cost: Floats
) -> tuple[Ints, Ints, Floats, Floats]:
    """Close every label [L] with its best last cut: (label, cut, value, cost) of those that fit."""
    # What changes when the cut between the last two segments moves; the cost changes monotonically.
    gain, spent = (a[-2] - a[-1] for a in (problem.value, problem.cost))
    base_value = value - problem.value[-2, at] + problem.value[-1, -1]
    base_cost = cost - problem.cost[-2, at] + problem.cost[-1, -1]
    room, last = budget - base_cost, len(gain) - 1
    if spent[-1] <= 0.0:  # a later cut is cheaper: from some boundary on it fits
        first = last + 1 - np.searchsorted(spent[::-1], room, side="right")
        low, high = np.maximum(at, first), np.full(at.size, last)
    else:
        low, high = at, np.searchsorted(spent, room, side="right") - 1
    label = np.nonzero(low <= high)[0]
    cut = _range_argmax(gain, low[label], high[label])
    return label, cut, base_value[label] + gain[cut], base_cost[label] + spent[cut]


def _range_argmax(values: Floats, low: Ints, high: Ints) -> Ints:
    """Index of the largest values[low .. high], inclusive, for each range (sparse table)."""
    table = [np.arange(len(values))]
    while 2 ** len(table) <= len(values):
        half = 2 ** (len(table) - 1)
        left, right = table[-1][:-half], table[-1][half:]
        table.append(np.where(values[left] >= values[right], left, right))
    best = np.empty_like(low)
    level = np.frexp(high - low + 1)[1] - 1
    for k, row in enumerate(table):
        here = level == k
        left, right = row[low[here]], row[high[here] - 2**k + 1]
        best[here] = np.where(values[left] >= values[right], left, right)
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
