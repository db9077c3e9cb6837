"""Ordered cuts under a budget: exact, against exhaustive search."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpa.tiers.boxes import search_boxes
from dvpa.tiers.cuts import MAX_TRANSITIONS, solve_cuts

COSTS = np.array([0.2, 0.44, 1.0])
THETA = np.array([0.35, 0.55, 0.75])  # ability per tier on the scale of d


def brute_force(value, cost, budget):
    """The best value of any ordered split within the budget, and the least cost that reaches it."""
    num_segments, num_items = value.shape
    best = (-np.inf, np.inf)
    for cuts in combinations_with_replacement(range(num_items + 1), num_segments - 1):
        total, spent = totals(value, cost, cuts)
        if spent <= budget + 1e-12 and (total, -spent) > (best[0] + 1e-9, -best[1]):
            best = (total, spent)
    return best


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_cuts_equal_brute_force(seed, num_items, num_segments, binary):
    rng = np.random.default_rng(seed)
    value = rng.random((num_segments, num_items))
    if binary:  # many ties, and values as in raw outcomes
        value = np.round(value)
    cost = np.sort(rng.random(num_segments))[:, None] + np.zeros(num_items)
    if num_segments > 2 and seed % 2:
        cost[-1] = cost[0]  # the hopeless segment: base again
    budget = rng.uniform(cost.min(axis=0).sum(), cost.max(axis=0).sum() + 0.1)
    found = solve_cuts(value, cost, budget)
    segment = np.searchsorted(found.boundaries, np.arange(num_items), side="right")
    items = np.arange(num_items)
    assert value[segment, items].sum() == pytest.approx(found.value)
    assert cost[segment, items].sum() == pytest.approx(found.cost)
    assert found.cost <= budget + 1e-9
    assert found.value == pytest.approx(brute_force(value, cost, budget)[0], abs=1e-9)
    assert found.is_exact


@pytest.mark.parametrize("hopeless", [False, True])
def test_cuts_of_a_search_cut_short_come_close_to_exact(hopeless):
    # Expected gains with a hopeless tail: far from the convex hull unless the last segment is base.
    success = 1.0 / (1.0 + np.exp(-14.0 * (THETA[:, None] - np.linspace(0, 1, 120))))
    order = [0, 1, 2, 0] if hopeless else [0, 1, 2]
    value = success[order]
    cost = COSTS[order, None] + np.zeros(120)
    for budget in (40.0, 60.0, 90.0):
        exact = solve_cuts(value, cost, budget)
        coarse = solve_cuts(value, cost, budget, max_transitions=200 if hopeless else 20)
        assert exact.is_exact
        assert coarse.cost <= budget + 1e-9
        assert exact.value - 0.2 <= coarse.value <= exact.value + 1e-9
    assert MAX_TRANSITIONS > 120**2


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_items=st.integers(1, 12),
    num_segments=st.integers(3, 5),
    leaf=st.sampled_from([1, 2, 3, 8]),
    max_boxes=st.sampled_from([1, 3, 10**6]),
    binary=st.booleans(),
)
def test_boxes_equal_brute_force(seed, num_items, num_segments, leaf, max_boxes, binary):
    """With all boxes looked into, the best; with a few, something feasible and a bound that holds.

    The last cut is found by trying all.
    """
    rng = np.random.default_rng(seed)
    value = rng.random((num_segments, num_items))
    if binary:
        value = np.round(value)
    cost = np.sort(rng.random((num_segments, num_items)), axis=0)
    if seed % 2:
        cost[-1] = cost[0]
    budget = rng.uniform(cost.min(axis=0).sum(), cost.max(axis=0).sum() + 0.1)
    best = brute_force(value, cost, budget)[0]
    sums = [
        np.hstack([np.zeros((num_segments, 1)), table.cumsum(axis=1)]) for table in (value, cost)
    ]

    def close(firsts):
        found = [
            (total, tuple(split))
            for first in firsts.tolist()
            for last in range(first[-1], num_items + 1)
            for split in [[*first, last]]
            for total, spent in [totals(value, cost, split)]
            if spent <= budget + 1e-12
        ]
        return max(found, default=None)

    known = rng.choice([-1.0, best - 0.1, best])
    found = search_boxes(*sums, budget + 1e-12, rng.random(), known, close, max_boxes, leaf)
    assert best - 1e-9 <= found.bound
    if found.boundaries is None:
        assert found.value == known
    else:
        total, spent = totals(value, cost, found.boundaries)
        assert spent <= budget + 1e-9
        assert total == pytest.approx(found.value)
    if max_boxes == 10**6 and np.isfinite(best):
        assert found.value == pytest.approx(best, abs=1e-9)
        assert found.bound == found.value


def totals(value, cost, cuts):
    """Value and cost of a split, item by item."""
    items = np.arange(value.shape[1])
    segment = np.searchsorted(cuts, items, side="right")
    return value[segment, items].sum(), cost[segment, items].sum()


def test_cuts_refuse_an_infeasible_budget():
    with pytest.raises(ValueError, match="cheapest possible total cost 2"):
        solve_cuts(np.ones((2, 2)), np.array([[1.0, 1.0], [3.0, 3.0]]), 1.9)


@pytest.mark.parametrize("hopeless", [False, True])
@pytest.mark.parametrize("budget", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("max_transitions", [MAX_TRANSITIONS, 4_000])
def test_many_items_are_exact_too(hopeless: bool, budget: float, max_transitions: int) -> None:
    """Thousands of items, where only what can still win is looked at: boundaries, or boxes."""
    rng = np.random.default_rng(0)
    num_items = 4000
    d = np.sort(rng.beta(1.0, 1.5, num_items))
    success = 1.0 / (1.0 + np.exp(-14.0 * (THETA[:, None] - d)))
    order = [0, 1, 0] if hopeless else [0, 1, 2]
    # Requests differ in length: no two cost the same.
    cost = COSTS[order, None] * rng.uniform(0.5, 1.5, num_items)
    value, limit = success[order], budget * num_items * COSTS[order].max()
    found = solve_cuts(value, cost, limit, max_transitions)
    totals = [np.concatenate([[0.0], row.cumsum()]) for row in (*value, *cost)]
    gain = [totals[0] - totals[1], totals[1] - totals[2]]
    spent = [totals[3] - totals[4], totals[4] - totals[5]]
    best = -np.inf
    for first in range(0, num_items + 1):  # both cuts, exhaustively
        cut_value = gain[0][first] + gain[1][first:] + totals[2][-1]
        cut_cost = spent[0][first] + spent[1][first:] + totals[5][-1]
        fitting = cut_value[cut_cost <= limit + 1e-9]
        best = max(best, fitting.max(initial=-np.inf))
    assert found.is_exact
    assert found.value == pytest.approx(best, abs=1e-7)
    assert found.cost <= limit + 1e-6


def test_the_bound_holds_where_the_search_is_cut_short() -> None:
    success = 1.0 / (1.0 + np.exp(-14.0 * (THETA[:, None] - np.linspace(0, 1, 120))))
    value, cost = success[[0, 1, 2, 0]], COSTS[[0, 1, 2, 0], None] + np.zeros(120)
    for budget in (40.0, 60.0, 90.0):
        exact = solve_cuts(value, cost, budget)
        coarse = solve_cuts(value, cost, budget, max_transitions=200)
        assert exact.bound == exact.value
        assert coarse.value <= exact.value <= coarse.bound + 1e-9
