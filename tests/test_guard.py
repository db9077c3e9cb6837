"""The guard: its bound against the binomial, and its promise over many calibration sets."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from request_world import COSTS, NAMES, draw
from scipy.stats import binom

from dvpa.tiers.budget import Split
from dvpa.tiers.calibrate import Budget, clopper_pearson_upper, fit_tier_map
from dvpa.tiers.guard import StayLow, fit_guard, requests_needed
from dvpa.tiers.solver import Solver
from dvpa.tiers.tier_map import TierMap, guard_allows

ALPHA, DELTA = 0.05, 0.1
RESAMPLES = 200


def fitted(fit: Split) -> TierMap:
    """The calibration alone."""
    tier_map = fit_tier_map(fit, draw(0, 200).split, COSTS, Budget(fraction=1.0), NAMES)
    return replace(tier_map, statistics=None)


@pytest.fixture(scope="module")
def template() -> TierMap:
    return fitted(draw(1, 1500).split)


@pytest.mark.parametrize("size", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_failures_exceed_alpha_in_at_most_delta_of_the_calibration_sets(
    template: TierMap, size: int
) -> None:
    """What counts is what the finished map does, at budgets from the least to a generous one."""
    drawn = draw(99, 5_000)
    # Draws are nested, so this is P(the top tier is right and the tier is not).
    population, losing = drawn.split, drawn.chance[:, -1:] - drawn.chance
    exceeded: dict[tuple[str, float], int] = {}
    for seed in range(RESAMPLES):
        calibrate = draw(1000 + seed, size).split
        guarded = replace(template, guard=fit_guard(template, calibrate, ALPHA, DELTA))
        for kind in ("gain", "threshold"):
            solver = Solver(guarded, calibrate.traffic, kind)
            for share in (0.0, 0.3):
                limit = solver.least + share * (solver.most - solver.least)
                tiers = solver.solve(limit, max_transitions=100_000).tiers(population.difficulty)
                low = tiers < 2
                rate = losing[np.arange(len(tiers)), tiers][low].mean() if low.any() else 0.0
                exceeded[kind, share] = exceeded.get((kind, share), 0) + (rate > ALPHA)
    assert max(exceeded.values()) <= DELTA * RESAMPLES, exceeded


def test_the_guard_is_of_use(template: TierMap) -> None:
    """It lets most requests that lose nothing stay low, hopeless ones among them."""
    calibrate = draw(7, 2000).split
    guard = fit_guard(template, calibrate, ALPHA, DELTA)
    tiers = guard_allows(template.success(calibrate.difficulty), guard["cuts"]).argmax(axis=1)
    assert (tiers < 2).mean() > 0.6
    assert (tiers[calibrate.difficulty > 0.95] == 0).all()  # hopeless
    unguarded = StayLow.of(np.zeros(len(calibrate), dtype=np.int64), calibrate.quality)
    assert unguarded.failures / unguarded.kept > ALPHA  # always base would break it
    assert 0 < guard["bound"] <= ALPHA
    assert guard["failures"] < ALPHA * guard["kept"]


def test_a_bound_per_tier_would_not_hold_for_decisions(template: TierMap) -> None:
    """Why decisions are bounded: the middle tier's region is safe, what the tier gets is not."""
    drawn = draw(99, 20_000)
    population, losing = drawn.split, drawn.chance[:, -1:] - drawn.chance
    success = template.success(population.difficulty)
    loss = success[:, -1:] - success[:, :-1]
    regions = []
    for tier in range(2):  # the largest region whose rate is at most alpha, outcomes known
        order = np.argsort(loss[:, tier])
        rates = np.cumsum(losing[order, tier]) / np.arange(1, len(order) + 1)
        regions.append(loss[order[np.flatnonzero(rates <= ALPHA)[-1]], tier])
    inside = loss <= np.array(regions)
    for tier in range(2):
        assert losing[inside[:, tier], tier].mean() <= ALPHA + 1e-3
    middle = inside[:, 1] & ~inside[:, 0]
    assert losing[middle, 1].mean() > 2 * ALPHA


def test_a_map_uses_only_what_the_guard_allows() -> None:
    fit, calibrate = draw(1, 1500).split, draw(2, 1500).split
    for kind in ("gain", "threshold"):
        tier_map = fit_tier_map(
            fit, calibrate, COSTS, Budget(fraction=0.7), NAMES, kind,
            guard_alpha=ALPHA, guard_delta=DELTA,
        )  # fmt: skip
        guard, stay_low = tier_map.guard, tier_map.statistics["stay_low"]
        assert (guard["alpha"], guard["delta"]) == (ALPHA, DELTA)
        test = draw(3, 1500).split
        tiers = tier_map.tiers(test.difficulty)
        success = tier_map.success(test.difficulty)
        assert guard_allows(success, guard["cuts"])[np.arange(len(tiers)), tiers].all()
        tiers = tier_map.tiers(calibrate.difficulty)
        assert np.asarray(COSTS)[tiers].mean() <= 0.7 * COSTS[-1] * (1 + 1e-9)
        found = StayLow.of(tiers, calibrate.quality)
        assert (stay_low["kept"], stay_low["failures"]) == (found.kept, found.failures)
        assert TierMap.from_json(tier_map.to_json()) == tier_map


def test_a_guard_that_does_not_fit_the_budget_says_so() -> None:
    fit, calibrate = draw(1, 1500).split, draw(2, 500).split
    with pytest.raises(ValueError, match=r"the guard needs .*%\)"):
        fit_tier_map(fit, calibrate, COSTS, Budget(fraction=0.3), NAMES, guard_alpha=0.02)
    strict = fit_tier_map(fit, calibrate, COSTS, Budget(fraction=1.0), NAMES, guard_alpha=1e-9)
    assert strict.guard["cuts"] == [-1.0, -1.0]
    assert set(strict.tiers(draw(3, 500).split.difficulty)) == {2}


def test_a_quality_floor_under_a_guard_reads_the_other_split() -> None:
    """The guard's bound is one for labels that nothing else has chosen by."""
    fit, calibrate = draw(1, 1500).split, draw(2, 1500).split
    budget, options = Budget(min_quality=0.9), {"guard_alpha": 0.2, "guard_delta": DELTA}
    found = fit_tier_map(fit, calibrate, COSTS, budget, NAMES, **options)
    noise = replace(calibrate, quality=np.round(np.random.default_rng(0).random((1500, 3))))
    other = fit_tier_map(fit, noise, COSTS, budget, NAMES)
    assert other.gain_lambda != found.gain_lambda  # without a guard it reads them
    blind = replace(found, guard=None, statistics=None)
    strictest = fit_tier_map(fit, calibrate, COSTS, budget, NAMES, guard_alpha=0.999)
    assert set(blind.tiers(calibrate.difficulty)) == {0, 1, 2}
    assert strictest.guard["cuts"] == [1.0, 1.0]


@pytest.mark.parametrize(("failures", "trials"), [(0, 59), (3, 100), (40, 50)])
def test_clopper_pearson_inverts_the_binomial(failures: int, trials: int) -> None:
    bound = clopper_pearson_upper(failures, trials, 0.05)
    assert binom.cdf(failures, trials, bound) == pytest.approx(0.05)
    assert clopper_pearson_upper(trials, trials, 0.05) == 1.0
    assert clopper_pearson_upper(0, 0, 0.05) == 1.0


@given(st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.integers(0, 5))
def test_requests_needed_is_the_fewest(alpha: float, delta: float, failures: int) -> None:
    needed = requests_needed(alpha, delta, failures)
    assert clopper_pearson_upper(failures, needed, delta) <= alpha
    assert clopper_pearson_upper(failures, needed - 1, delta) > alpha


@pytest.mark.parametrize("levels", [{"alpha": 0.0}, {"alpha": 1.0}, {"delta": float("nan")}])
def test_levels_outside_their_range_are_named(template: TierMap, levels: dict[str, float]) -> None:
    given_levels = {"alpha": ALPHA, "delta": DELTA, **levels}
    with pytest.raises(ValueError, match=f"guard_{next(iter(levels))}"):
        fit_guard(template, draw(2, 300).split, **given_levels)
