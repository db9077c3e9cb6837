"""Fitting: budgets, calibration, thresholds, lambda and the metrics."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpa.tiers.calibrate import (
    Budget,
    Split,
    brier_score,
    expected_calibration_error,
    fit_tier_map,
)
from dvpa.tiers.tier_map import NEVER, TierMap

NAMES, COSTS = ("small", "middle", "large"), (1e5, 2.2e5, 5e5)
THETA = np.array([0.35, 0.55, 0.75])  # ability per tier on the scale of d


def make_split(seed: int, size: int = 1500) -> Split:
    """Requests of an ordinal model: easy, graded and hopeless (d near 1) ones."""
    rng = np.random.default_rng(seed)
    d = rng.beta(0.8, 0.8, size)
    success = 1.0 / (1.0 + np.exp(-14.0 * (THETA - d[:, None])))
    return Split(d, (rng.random((size, 1)) < success).astype(float))


FIT, CALIBRATE, TEST = (make_split(seed) for seed in (1, 2, 3))


def realised(tier_map: TierMap, split: Split) -> tuple[float, float]:
    """Mean quality and mean cost of a map on a split."""
    tiers = tier_map.tiers(split.difficulty)
    quality = split.quality[np.arange(len(tiers)), tiers]
    return float(quality.mean()), float(np.asarray(tier_map.costs)[tiers].mean())


def fit(budget: Budget, **options) -> TierMap:
    return fit_tier_map(FIT, CALIBRATE, COSTS, budget, NAMES, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("60%", Budget(fraction=0.6)),
        ("0.6", Budget(fraction=0.6)),
        (".6", Budget(fraction=0.6)),
        ("1", Budget(fraction=1.0)),
        ("100%", Budget(fraction=1.0)),
        ("1.5B", Budget(mean_activated=1.5e9)),
        (" 300k ", Budget(mean_activated=3e5)),
        ("20m", Budget(mean_activated=2e7)),
        ("180e3", Budget(mean_activated=1.8e5)),
        ("250000", Budget(mean_activated=2.5e5)),
        ("quality>=0.97", Budget(min_quality=0.97)),
        ("quality >= 97%", Budget(min_quality=0.97)),
        ("25ms", Budget(mean_ms=25.0)),
        ("2.5 MS", Budget(mean_ms=2.5)),
        ("25M", Budget(mean_activated=2.5e7)),
        ("2.5 GFLOPs", Budget(mean_flops=2.5e9)),
        ("3e6flop", Budget(mean_flops=3e6)),
        ("1TFLOPS", Budget(mean_flops=1e12)),
    ],
)
def test_budget_parse(text, expected):
    assert Budget.parse(text) == expected


BAD_BUDGETS = [
    "",
    "cheap",
    "0",
    "0%",
    "-5%",
    "120%",
    "nan",
    "inf",
    "1e999",
    "60 % B",
    "1.5X",
    "60%%",
]
BAD_QUALITIES = [
    "quality>=2",
    "quality>=25ms",
    "quality>=1 GFLOPs",
    "25 s",
    "0 ms",
    "quality>=1k",
    "quality>0.9",
    "quality<=0.9",
    "0.5.5",
    "\u0661",
]


@pytest.mark.parametrize("text", BAD_BUDGETS + BAD_QUALITIES)
def test_budget_parse_refuses(text):
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "given_fields",
    [
        {},
        {"fraction": 0.5, "min_quality": 0.9},
        {"mean_ms": 1.0, "mean_flops": 1.0},
        {"fraction": float("nan")},
        {"mean_ms": float("inf")},
    ],
)
def test_budget_takes_exactly_one_finite_field(given_fields):
    with pytest.raises(ValueError, match="budget"):
        Budget(**given_fields)


@pytest.mark.parametrize("kind", ["gain", "threshold"])
@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.6, 0.8])
def test_budget_holds_on_calibrate_and_nearly_on_test(kind, fraction):
    tier_map = fit(Budget(fraction=fraction), kind=kind)
    limit = fraction * COSTS[-1]
    _, cost = realised(tier_map, CALIBRATE)
    assert cost <= limit * (1 + 1e-9)
    unconstrained = realised(fit(Budget(fraction=1.0), kind=kind), CALIBRATE)[1]
    assert cost >= min(limit, unconstrained) - 0.01 * COSTS[-1]  # and the budget is used
    assert abs(realised(tier_map, TEST)[1] - cost) < 0.05 * COSTS[-1]
    assert tier_map.budget == {"fraction": fraction}
    assert tier_map.statistics["mean_activated"] == pytest.approx(cost)
    assert tier_map.kind == kind
    assert TierMap.from_json(tier_map.to_json()) == tier_map


def test_fitted_maps_beat_a_random_mix_of_base_and_top_on_test():
    top = TEST.quality[:, -1].mean()
    base = TEST.quality[:, 0].mean()
    for kind, options in (("gain", {}), ("threshold", {"upper_cut": True})):
        quality, cost = realised(fit(Budget(fraction=0.5), kind=kind, **options), TEST)
        mixed = base + (top - base) * (cost - COSTS[0]) / (COSTS[-1] - COSTS[0])
        assert quality > mixed + 0.05
        assert quality > 0.92 * top


def test_hopeless_requests_go_to_base():
    gain = fit(Budget(fraction=0.6))
    cut = fit(Budget(fraction=0.5), kind="threshold", upper_cut=True)
    plain = fit(Budget(fraction=0.5), kind="threshold")
    assert (gain.tier(0.0), gain.tier(0.999)) == (0, 0)
    assert (cut.tier(0.0), cut.tier(0.999)) == (0, 0)
    assert cut.upper_cut is not None
    assert plain.upper_cut is None
    expected = [
        np.take_along_axis(
            m.success(CALIBRATE.difficulty), m.tiers(CALIBRATE.difficulty)[:, None], axis=1
        ).sum()
        for m in (plain, cut)
    ]
    assert expected[1] >= expected[0]  # one more cut cannot hurt what is optimised


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(30, 80),
    st.sampled_from(["gain", "threshold"]),
    st.floats(0.2, 1.0),
    st.booleans(),
    st.booleans(),
)
def test_budget_is_never_exceeded_on_calibrate(seed, size, kind, fraction, ties, upper):
    splits = [make_split(seed + i, size) for i in (0, 20_000)]
    if ties:
        splits = [Split(np.round(s.difficulty, 1), s.quality) for s in splits]
    tier_map = fit_tier_map(
        *splits, COSTS, Budget(fraction=fraction), NAMES, kind, upper_cut=upper and kind != "gain"
    )
    assert realised(tier_map, splits[1])[1] <= fraction * COSTS[-1] * (1 + 1e-9)


def test_threshold_map_is_the_best_ordered_map_for_the_calibrated_quality():
    fit_split, calibrate = make_split(5, 200), make_split(6, 40)
    costs = COSTS[:2]
    split = [Split(s.difficulty, s.quality[:, :2]) for s in (fit_split, calibrate)]
    limit = 0.7 * costs[-1]
    tier_map = fit_tier_map(*split, costs, Budget(fraction=0.7), NAMES[:2], "threshold")
    success, d = tier_map.success(split[1].difficulty), split[1].difficulty

    def value_of(threshold: float) -> float:
        tiers = (d >= threshold).astype(int)
        if np.asarray(costs)[tiers].mean() > limit:
            return -np.inf
        return success[np.arange(len(d)), tiers].sum()

    best = max(value_of(threshold) for threshold in [*d, NEVER])
    assert value_of(tier_map.thresholds[0]) == pytest.approx(best)


@pytest.mark.parametrize("kind", ["gain", "threshold"])
def test_extreme_budgets(kind):
    base = fit(Budget(mean_activated=COSTS[0]), kind=kind)
    assert realised(base, CALIBRATE)[1] == pytest.approx(COSTS[0])
    rich = fit(Budget(mean_activated=10 * COSTS[-1]), kind=kind)
    assert realised(rich, CALIBRATE)[0] >= 0.98 * CALIBRATE.quality[:, -1].mean()
    with pytest.raises(ValueError, match=r"19.0% of the top tier.*base tier costs 100000 \(20.0%"):
        fit(Budget(fraction=0.19), kind=kind)


@pytest.mark.parametrize("kind", ["gain", "threshold"])
def test_min_quality_gives_the_cheapest_map_that_keeps_it(kind):
    top = CALIBRATE.quality[:, -1].mean()
    costs = []
    for fraction in (0.8, 0.9, 0.97):
        tier_map = fit(Budget(min_quality=fraction), kind=kind)
        quality, cost = realised(tier_map, CALIBRATE)
        assert quality >= fraction * top - 1e-9
        cheaper = fit(Budget(mean_activated=cost - 0.02 * COSTS[-1]), kind=kind)
        assert realised(cheaper, CALIBRATE)[0] < fraction * top
        assert realised(tier_map, TEST)[0] >= (fraction - 0.05) * TEST.quality[:, -1].mean()
        costs.append(cost)
    assert costs == sorted(costs)
    assert costs[-1] < COSTS[-1]


def test_min_quality_that_cannot_be_kept():
    # The top tier's advantage on calibrate is the base tier's on fit, so no gain map sees it.
    rng = np.random.default_rng(0)
    d = rng.random(100)
    level = np.ones((100, 2)) * 0.5
    better = level + np.array([0.0, 0.5])
    splits = Split(d, level - np.array([0.0, 0.1])), Split(d, better)
    with pytest.raises(ValueError, match=r"min_quality 1.0 cannot be kept.*reaches 0.500"):
        fit_tier_map(*splits, (1.0, 2.0), Budget(min_quality=1.0), ("a", "b"))
    always_top = fit_tier_map(
        *splits, (1.0, 2.0), Budget(min_quality=1.0), ("a", "b"), kind="threshold"
    )
    assert set(always_top.tiers(d)) == {1}


def test_calibration_is_monotone_and_accurate_on_test():
    tier_map = fit(Budget(fraction=0.6))
    success = tier_map.success(TEST.difficulty)
    for tier in range(3):
        assert expected_calibration_error(success[:, tier], TEST.quality[:, tier]) < 0.06
    raw = np.repeat(TEST.quality.mean(axis=0)[None], len(TEST), axis=0)
    for tier in range(3):
        skill = brier_score(success[:, tier], TEST.quality[:, tier])
        assert skill < 0.6 * brier_score(raw[:, tier], TEST.quality[:, tier])
    assert max(len(x) for x, _ in tier_map.calibration) < 100  # compact
    assert max(tier_map.statistics["ece_by_tier"]) < 0.06


def test_fitting_is_deterministic_and_independent_of_request_order():
    order = np.random.default_rng(0).permutation(len(FIT))
    shuffled = Split(FIT.difficulty[order], FIT.quality[order])
    for kind in ("gain", "threshold"):
        budget = Budget(fraction=0.5)
        first = fit(budget, kind=kind)
        again = fit_tier_map(shuffled, CALIBRATE, COSTS, budget, NAMES, kind)
        assert fit(budget, kind=kind) == first
        assert (again.tiers(TEST.difficulty) == first.tiers(TEST.difficulty)).mean() > 0.999


def test_bad_input_is_named():
    budget = Budget(fraction=0.6)
    few = Split(FIT.difficulty[:29], FIT.quality[:29])
    with pytest.raises(ValueError, match="fit split: 29 requests are too few; at least 30"):
        fit_tier_map(few, CALIBRATE, COSTS, budget, NAMES)
    with pytest.raises(ValueError, match="calibrate split: 29 requests are too few"):
        fit_tier_map(FIT, few, COSTS, budget, NAMES)
    with pytest.raises(ValueError, match="identical"):
        fit_tier_map(FIT, FIT, COSTS, budget, NAMES)
    with pytest.raises(ValueError, match="3 tiers, costs has 2"):
        fit_tier_map(FIT, CALIBRATE, COSTS[:2], budget, NAMES[:2])
    with pytest.raises(ValueError, match=r"costs.*increasing"):
        fit_tier_map(FIT, CALIBRATE, COSTS[::-1], budget, NAMES)
    with pytest.raises(ValueError, match="kind"):
        fit(budget, kind="spline")
    with pytest.raises(ValueError, match="upper_cut"):
        fit(budget, upper_cut=True)
    with pytest.raises(ValueError, match="default_tier"):
        fit(budget, default_tier=3)
    with pytest.raises(ValueError, match="guard_alpha"):
        fit(budget, guard_alpha=1.0)
    with pytest.raises(ValueError, match="difficulty has 1 values"):
        replace(few, difficulty=np.append(few.difficulty[1:], np.nan))
    with pytest.raises(ValueError, match="quality has"):
        replace(few, quality=few.quality * 2)
    with pytest.raises(ValueError, match="shapes"):
        Split(few.difficulty, few.quality[:-1])


def test_one_tier_and_constant_difficulty():
    single = [Split(s.difficulty, s.quality[:, :1]) for s in (FIT, CALIBRATE)]
    for kind in ("gain", "threshold"):
        tier_map = fit_tier_map(*single, (5.0,), Budget(fraction=1.0), ("only",), kind)
        assert set(tier_map.tiers(TEST.difficulty)) == {0}
        flat = [Split(np.full(len(s), 0.5), s.quality) for s in (FIT, CALIBRATE)]
        tier_map = fit_tier_map(*flat, COSTS, Budget(fraction=0.6), NAMES, kind)
        assert realised(tier_map, flat[1])[1] <= 0.6 * COSTS[-1]


def test_expected_calibration_error_and_brier():
    p = np.array([0.0] * 10 + [1.0] * 10)
    assert expected_calibration_error(p, p) == 0.0
    assert expected_calibration_error(p, 1 - p) == 1.0
    half = np.full(100, 0.5)
    outcome = np.arange(100) % 2
    assert expected_calibration_error(half, np.sort(outcome)) == pytest.approx(0.0)
    assert expected_calibration_error(half + 0.2, outcome) == pytest.approx(0.2)
    # Two bins of two: means 0.2 and 0.7 against outcomes 0.5 and 1.0.
    assert expected_calibration_error([0.1, 0.3, 0.6, 0.8], [0, 1, 1, 1], bins=2) == pytest.approx(
        0.3
    )
    assert brier_score([0.5, 1.0], [1, 1]) == pytest.approx(0.125)
    for bad in ([], [[0.5]]):
        with pytest.raises(ValueError, match="shapes"):
            brier_score(bad, bad)
    with pytest.raises(ValueError, match="bins"):
        expected_calibration_error(p, p, bins=0)
