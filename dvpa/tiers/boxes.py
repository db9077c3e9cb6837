"""The best ordered cuts among many items: branch and bound over boxes of boundaries.

For `cuts.solve_cuts`, where its labels are too many. A split's value is a sum over its cuts, and so
is its cost: cut s at boundary b adds value[s, b] - value[s + 1, b] of prefix sums. So the most that
any split with cut s inside of block k[s] can be worth is bounded by the blocks' largest values of
that at a price per unit of cost, plus the price of the budget (weak duality). Within a box of
blocks the duality gap shrinks with the boxes, however far the optimum lies inside the convex hull.
Boxes that cannot beat the best split known are dropped, the others halved in every direction; what
is left at the end is enumerated, its last cut by a range maximum.

S segments, D = S - 1 cuts, boundaries 0 .. M, P prices, boxes [n, D] of block numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# Completes splits whose last cut is open, boundaries [n, D - 1]: the best one's value and split.
Close = Callable[[Ints], tuple[float, tuple[int, ...]] | None]

TOLERANCE = 1e-12  # of the value: what rounding may hide
_FIRST = 8  # blocks in each direction to begin with
_PRICES = 24
_TRIED = 256  # of the most promising boxes, a split each
_SPLITS_PER_BOX = 256  # that may be enumerated at the end


@dataclass(frozen=True)
class Found:
    """The best split, None if none was found that is worth more than what was known.

    No split at all is worth more than `bound`.
    """

    value: float
    boundaries: tuple[int, ...] | None
    bound: float


def search_boxes(
    value: Floats,
    cost: Floats,
    budget: float,
    price: float,
    known: float,
    close: Close,
    max_boxes: int,
    leaf: int | None = None,
) -> Found:
    """The best split of at most the budget that is worth more than `known`.

    Where its `bound` is its value (or `known`), it is proved to be the best. Of more than
    `max_boxes` open boxes the most promising are looked into, and the bound has the others'.

    Args:
        value, cost: prefix sums [S, M + 1], S >= 3.
        price: about what a unit of cost is worth.
        leaf: boundaries of a block that is not halved any more.
    """
    gains, costs = value[:-1] - value[1:], cost[:-1] - cost[1:]  # [D, M + 1] by cut
    num_cuts = len(gains)
    leaf = leaf or (16 if num_cuts <= 3 else 8)
    fixed, room = float(value[-1, -1]), budget - float(cost[-1, -1])
    best: tuple[int, ...] | None = None
    left_out = -np.inf  # the largest bound of a box that nobody looked into
    prices = np.append(0.0, max(price, 1e-9) * np.geomspace(1 / 16, 16, _PRICES - 1))
    pyramid = _pyramid(gains, costs, prices, leaf)
    blocks = pyramid[-1][1].shape[-1]
    boxes = np.array(list(combinations_with_replacement(range(blocks), num_cuts)), dtype=np.int64)
    max_last = max(1, max_boxes * _SPLITS_PER_BOX // leaf ** (num_cuts - 1))
    for level in range(len(pyramid) - 1, -1, -1):
        largest, cheapest = pyramid[level]
        if level < len(pyramid) - 1:
            boxes = _halves(boxes, cheapest.shape[-1])
        boxes = boxes[_sum(cheapest[None], boxes)[:, 0] <= room]
        bounds = fixed + (_sum(largest, boxes) + prices * room).min(axis=1, initial=np.inf)
        order = np.argsort(-bounds, kind="stable")
        boxes, bounds = boxes[order], bounds[order]
        found = close(np.unique(boxes[:_TRIED, :-1] * (leaf << level), axis=0))
        if found is not None and found[0] > known:
            known, best = found
        is_open = bounds > known + TOLERANCE * max(1.0, abs(known))
        boxes, bounds = boxes[is_open], bounds[is_open]
        kept = max_boxes if level else min(max_boxes, max_last)
        left_out = max(left_out, bounds[kept:].max(initial=-np.inf))
        boxes = boxes[:kept]
    for splits in _leaves(boxes, leaf, value.shape[1]):
        found = close(splits)
        if found is not None and found[0] > known:
            known, best = found
    return Found(known, best, max(known, float(left_out)))


def _pyramid(
    gains: Floats, costs: Floats, prices: Floats, leaf: int
) -> list[tuple[Floats, Floats]]:
    """By level, finest first: per block the largest gain at each price [P, D, blocks], and the
    least cost [D, blocks].
    """
    num_cuts, size = gains.shape
    blocks = -(-size // leaf)
    padding = ((0, 0), (0, blocks * leaf - size))
    shaped = (num_cuts, blocks, leaf)
    gains = np.pad(gains, padding, constant_values=-np.inf).reshape(shaped)
    padded = np.pad(costs, padding, constant_values=np.inf).reshape(shaped)
    finite = np.pad(costs, padding).reshape(shaped)  # times a price of 0
    largest = np.stack([(gains - price * finite).max(axis=2) for price in prices])
    levels = [(largest, padded.min(axis=2))]
    while levels[-1][1].shape[-1] > _FIRST:
        largest, cheapest = levels[-1]
        if odd := cheapest.shape[-1] % 2:
            largest = np.pad(largest, ((0, 0), (0, 0), (0, odd)), constant_values=-np.inf)
            cheapest = np.pad(cheapest, ((0, 0), (0, odd)), constant_values=np.inf)
        pairs = (*largest.shape[:2], -1, 2), (num_cuts, -1, 2)
        levels.append((largest.reshape(pairs[0]).max(axis=3), cheapest.reshape(pairs[1]).min(2)))
    return levels


def _sum(tables: Floats, boxes: Ints) -> Floats:
    """[n, P]: over the cuts, what [P, D, blocks] says of each box's blocks."""
    total = np.zeros((len(boxes), len(tables)))
    for cut in range(boxes.shape[1]):
        total += tables[:, cut, boxes[:, cut]].T
    return total


def _halves(boxes: Ints, blocks: int) -> Ints:
    """Every box as its 2^D parts; those that no ordered split is in are left out."""
    parts = np.array(list(product((0, 1), repeat=boxes.shape[1])), dtype=np.int64)
    halves = (2 * boxes[:, None] + parts).reshape(-1, boxes.shape[1])
    is_ordered = (np.diff(halves, axis=1) >= 0).all(axis=1)
    return halves[is_ordered & (halves < blocks).all(axis=1)]


def _leaves(boxes: Ints, leaf: int, size: int) -> Iterator[Ints]:
    """All ordered boundaries of the boxes' cuts but the last, [n, D - 1], some at a time."""
    firsts = np.unique(boxes[:, :-1], axis=0) * leaf
    offsets = np.array(list(product(range(leaf), repeat=firsts.shape[1])), dtype=np.int64)
    step = max(1, (1 << 20) // len(offsets))
    for start in range(0, len(firsts), step):
        at = (firsts[start : start + step, None] + offsets).reshape(-1, firsts.shape[1])
        is_split = (np.diff(at, axis=1) >= 0).all(axis=1) & (at < size).all(axis=1)
        yield at[is_split]
