"""Routing metrics and baselines against independent formulas, libraries and exhaustive search."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dvpa.evaluate import routing
from dvpa.evaluate.table import OutcomeTable
from dvpa.tiers.calibrate import Budget, Split, fit_tier_map
from dvpa.tiers.tier_map import TierMap

NAMES = ("base", "middle", "top")
COSTS = (100.0, 180.0, 300.0)


def synthetic(seed: int, size: int = 600) -> OutcomeTable:
    """Easy, graded and hopeless requests; length says little, the difficulty much."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 3, size)
    z = np.array([-4.0, 0.5, 7.0])[level] + rng.normal(0, 0.8, size)
    success = 1 / (1 + np.exp(-2 * (np.array([0.0, 0.7, 1.5]) - z[:, None])))
    quality = (0.5 * rng.random((size, 1)) + 0.5 * rng.random((size, 3)) < success).astype(float)
    return OutcomeTable(
        ids=[f"{seed}-{row}" for row in range(size)],
        level=level,
        kind=[("copy", "sum", "noise")[at] for at in level],
        prompt_tokens=np.clip(np.round(12 + 0.5 * z + rng.normal(0, 4, size)), 2, None).astype(int),
        quality=quality,
        nll=-np.log(np.clip(success, 1e-3, 1)),
        difficulty=1 / (1 + np.exp(-(z + rng.normal(0, 0.4, size)) / 2)),
        completion_tokens=np.full((size, 3), 4),
        uncertainty=1 - success[:, 0] + rng.random(size),
    )


def fitted(fit: OutcomeTable, calibrate: OutcomeTable, **options: Any) -> TierMap:
    return fit_tier_map(
        Split(fit.difficulty, fit.quality),
        Split(calibrate.difficulty, calibrate.quality),
        COSTS,
        Budget.parse("60%"),
        NAMES,
        **options,
    )


@pytest.fixture(scope="module")
def tables() -> tuple[OutcomeTable, OutcomeTable, OutcomeTable]:
    return synthetic(1), synthetic(2), synthetic(3)


@pytest.fixture(scope="module")
def rows(tables: tuple[OutcomeTable, ...]) -> dict[str, dict[str, Any]]:
    fit, calibrate, test = tables
    words = {"copy": "say it again", "sum": "add these", "noise": "add this noise"}
    questions = {
        key: f"{words[kind]} {'x' * tokens}"
        for table in tables
        for key, kind, tokens in zip(table.ids, table.kind, table.prompt_tokens, strict=True)
    }
    return routing.compare_routers(
        fit,
        calibrate,
        test,
        fitted(fit, calibrate),
        questions=questions,
        ms={"whole": [1.0, 2.0, 4.0], "routed": [1.5, 2.5, 3.5], "adaptive": [1.75, 2.75, 3.75]},
    )


# Baselines


def test_random_mix_spends_the_cost_it_is_given() -> None:
    quality = synthetic(4, 500).quality
    mix = routing.random_mix(COSTS, 220.0)
    assert (mix.low, mix.high) == (1, 2) and mix.share == pytest.approx(1 / 3)
    expected = quality[:, 1].mean() * 2 / 3 + quality[:, 2].mean() / 3
    assert mix.expected(quality).mean() == pytest.approx(expected)
    draws = mix.draws(quality, 400, seed=0)
    assert draws.mean() == pytest.approx(expected, abs=2e-3)
    marked = np.tile([0.0, 0.0, 1.0], (500, 1))
    assert set(mix.draws(marked, 20, seed=0).sum(axis=0)) == {167.0}  # exactly a third each time
    for cost, tier in ((50.0, 0), (100.0, 0), (180.0, 1), (999.0, 2)):
        at = routing.random_mix(COSTS, cost).expected(quality).mean()
        assert at == pytest.approx(quality[:, tier].mean())


def test_the_cascade_pays_both_calls() -> None:
    assert routing.cascade_costs(COSTS).tolist() == [100.0, 280.0, 400.0]


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 3), min_size=1, max_size=6),
    st.floats(100, 300),
)
def test_oracles_against_exhaustive_search(rows: list[tuple[float, ...]], budget: float) -> None:
    quality = np.array(rows)
    costs = np.array(COSTS)
    every = np.array(list(itertools.product(range(3), repeat=len(rows))))
    reached = quality[np.arange(len(rows)), every].mean(axis=1)
    spent = costs[every].mean(axis=1)
    free = routing.realised(quality, COSTS, routing.oracle_tiers(quality))
    assert free[0] == pytest.approx(reached.max())
    assert free[1] == pytest.approx(spent[reached >= reached.max() - 1e-9].min())
    best = reached[spent <= budget + 1e-9].max()
    got, cost = routing.realised(
        quality, COSTS, routing.oracle_tiers_at_budget(quality, COSTS, budget)
    )
    assert cost <= budget + 1e-6
    # The LP relaxation loses at most one request's gain.
    assert best - 1 / len(rows) - 1e-9 <= got <= best + 1e-9


def test_oracle_refuses_a_budget_below_the_base_tier() -> None:
    with pytest.raises(ValueError, match="base tier"):
        routing.oracle_tiers_at_budget(np.ones((3, 3)), COSTS, 99.0)


def of_lengths(tokens: np.ndarray, fails: np.ndarray) -> OutcomeTable:
    """A table of two tiers: the base tier fails where told, the top tier never does."""
    count = len(tokens)
    return OutcomeTable(
        ids=[str(i) for i in range(count)],
        level=np.zeros(count, dtype=np.int64),
        kind=["x"] * count,
        prompt_tokens=tokens,
        quality=np.stack([1.0 - fails, np.ones(count)], axis=1),
        nll=np.zeros((count, 2)),
        difficulty=np.full(count, np.nan),
        completion_tokens=np.ones((count, 2), dtype=np.int64),
    )


@pytest.mark.parametrize("hard", [range(5, 8), range(15, 20), range(9, 13)])
def test_length_scores_find_the_hard_lengths_wherever_they_are(hard: range) -> None:
    """Short, long or in between: a router on length beats the coin by what length tells."""
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(3):
        tokens = rng.integers(5, 20, 2000)
        chance = np.where(np.isin(tokens, list(hard)), 0.9, 0.1)
        parts.append(of_lengths(tokens, (rng.random(2000) < chance).astype(float)))
    fit, calibrate, test = parts
    scores = routing.length_scores(fit, calibrate, test, seed=0)
    assert ((scores.test >= 0) & (scores.test <= 1)).all()
    inside = np.isin(test.prompt_tokens, list(hard))
    assert scores.test[inside].min() >= scores.test[~inside].max()
    costs = [1.0, 2.0]
    target = 1.0 + float(inside.mean())
    tiers = routing.route_by_score(scores, fit, calibrate, costs, ["a", "b"], target, "gain")
    quality, cost = routing.realised(test.quality, costs, tiers)
    assert cost == pytest.approx(target, abs=0.01)
    coin = routing.random_mix(costs, cost).expected(test.quality).mean()
    assert quality > coin + 0.5 * float((1 - test.quality[inside, 0]).mean()) * inside.mean()


def test_length_scores_do_not_make_something_of_nothing() -> None:
    """Where length tells nothing, the length router is a coin."""
    rng = np.random.default_rng(1)
    parts = [
        of_lengths(rng.integers(5, 9, 4000), (rng.random(4000) < 0.4).astype(float))
        for _ in range(3)
    ]
    scores = routing.length_scores(*parts, seed=0)
    tiers = routing.route_by_score(scores, *parts[:2], [1.0, 2.0], ["a", "b"], 1.5, "gain")
    quality, cost = routing.realised(parts[2].quality, [1.0, 2.0], tiers)
    coin = routing.random_mix([1.0, 2.0], cost).expected(parts[2].quality).mean()
    assert abs(quality - coin) < 0.02


def test_tfidf_is_out_of_fold_on_the_fit_split() -> None:
    rng = np.random.default_rng(5)
    texts = ["".join(rng.choice(list("abcdefgh"), 8)) for _ in range(200)]
    noise = rng.random(200) < 0.5
    scores = routing.tfidf_scores(texts, texts[:20], texts[:20], noise)
    assert scores is not None
    assert routing.auroc(scores.fit, noise) < 0.65  # labels are noise: anything else is a leak
    told = np.array(["a" in text for text in texts])
    scores = routing.tfidf_scores(texts, texts[:20], texts, told)
    assert scores is not None and routing.auroc(scores.fit, told) > 0.9
    assert routing.tfidf_scores(texts, [], [], np.zeros(200, dtype=bool)) is None


# The comparison


def test_every_router_is_there_and_spends_what_adaptive_spends(rows: dict[str, Any]) -> None:
    matched = {"random", "length", "tfidf", "cascade"}
    assert set(rows) == matched | {f"always_{name}" for name in NAMES} | {
        "adaptive",
        "oracle",
        "oracle_at_budget",
        "dataset_oracle",
    }
    target = rows["adaptive"]["mean_activated_params"]
    for name in matched:
        assert rows[name]["mean_activated_params"] == pytest.approx(target, rel=0.01), name
    assert rows["oracle_at_budget"]["mean_activated_params"] <= target + 1e-6
    assert target <= 0.63 * COSTS[-1]


def test_no_router_beats_the_oracle_and_adaptive_beats_the_blind(rows: dict[str, Any]) -> None:
    for name, row in rows.items():
        assert row["quality"] <= rows["oracle"]["quality"] + 1e-12, name
        assert row["ci95"][0] <= row["quality"] <= row["ci95"][1], name
        assert sum(row["tier_share"]) == pytest.approx(1)
        if row["mean_activated_params"] <= rows["oracle_at_budget"]["mean_activated_params"]:
            assert row["quality"] <= rows["oracle_at_budget"]["quality"] + 1 / 600, name
    for name in ("random", "length", "cascade"):
        pair = rows[name]["adaptive_minus"]
        assert pair["difference"] == pytest.approx(
            rows["adaptive"]["quality"] - rows[name]["quality"]
        )
        assert pair["ci95"][0] > 0, name


def test_rows_are_what_the_choice_costs(
    rows: dict[str, Any], tables: tuple[OutcomeTable, ...]
) -> None:
    fit, calibrate, test = tables
    tier_map = fitted(fit, calibrate)
    tiers = tier_map.tiers(test.difficulty)
    quality, cost = routing.realised(test.quality, COSTS, tiers)
    assert rows["adaptive"]["quality"] == pytest.approx(quality)
    assert rows["adaptive"]["mean_activated_params"] == pytest.approx(cost)
    share = np.bincount(tiers, minlength=3) / len(tiers)
    assert rows["adaptive"]["ms_per_request"] == pytest.approx(share @ [1.75, 2.75, 3.75])
    cascade = rows["cascade"]
    stayed = cascade["tier_share"][0]
    once = np.array(cascade["tier_share"]) @ COSTS
    assert cascade["mean_activated_params"] == pytest.approx(once + (1 - stayed) * COSTS[0])
    once = np.array(cascade["tier_share"]) @ [1.5, 2.5, 3.5]
    assert cascade["ms_per_request"] == pytest.approx(once + (1 - stayed) * 1.5)
    assert rows["always_top"]["ms_per_request"] == pytest.approx(4.0)
    low, high = test.quality[:, 1].mean(), test.quality[:, 0].mean()
    assert min(low, high) <= rows["random"]["quality"] <= test.quality[:, 2].mean()


def test_overhead_is_charged_to_adaptive_and_granted_to_the_rest(
    tables: tuple[OutcomeTable, ...], rows: dict[str, Any]
) -> None:
    fit, calibrate, test = tables
    charged = routing.compare_routers(
        fit, calibrate, test, fitted(fit, calibrate), overhead=[5.0, 5.0, 5.0], num_resamples=64
    )
    before = rows["adaptive"]["mean_activated_params"]
    assert charged["adaptive"]["mean_activated_params"] == pytest.approx(before + 5)
    assert charged["random"]["mean_activated_params"] == pytest.approx(before + 5)
    assert charged["adaptive"]["quality"] == rows["adaptive"]["quality"]
    assert "tfidf" not in charged


def test_long_answers_cost_more_than_short_ones(tables: tuple[OutcomeTable, ...]) -> None:
    """Every row is charged for its own requests' tokens, and matched to adaptive in those."""
    fit, calibrate, test = tables
    tokens = np.random.default_rng(0).integers(1, 9, len(test)).astype(float)
    request_costs = tokens[:, None] * np.asarray(COSTS) / tokens.mean()
    tier_map = fitted(fit, calibrate)
    rows = routing.compare_routers(
        fit, calibrate, test, tier_map, request_costs=request_costs, num_resamples=64
    )
    chosen = tier_map.tiers(test.difficulty)
    paid = sum(COSTS[t] * n for t, n in zip(chosen, tokens, strict=True)) / tokens.sum()
    assert rows["adaptive"]["mean_activated_params"] == pytest.approx(paid)
    assert paid != pytest.approx(np.asarray(COSTS)[chosen].mean(), rel=1e-3)
    for name in ("random", "length", "cascade"):
        assert rows[name]["mean_activated_params"] == pytest.approx(paid, rel=5e-3), name
    assert rows["oracle_at_budget"]["mean_activated_params"] <= paid * (1 + 1e-9)
    curves = routing.routing_frontier(
        fit, calibrate, test, tier_map, request_costs=request_costs, num_points=3
    )
    assert curves["random"]["cost"] == pytest.approx(COSTS)
    with pytest.raises(ValueError, match="request_costs must have shape"):
        routing.compare_routers(fit, calibrate, test, tier_map, request_costs=request_costs[:5])


def test_requests_without_a_difficulty_go_to_the_default_tier(
    tables: tuple[OutcomeTable, ...],
) -> None:
    tier_map = fitted(tables[0], tables[1])
    difficulty = np.array([np.nan, 0.0, np.inf])
    assert routing.adaptive_tiers(tier_map, difficulty).tolist()[::2] == [2, 2]
    assert routing.adaptive_tiers(tier_map, difficulty)[1] == tier_map.tier(0.0)


def test_tables_must_fit_the_tier_map(tables: tuple[OutcomeTable, ...]) -> None:
    narrow = TierMap.untrained(NAMES[:2], COSTS[:2])
    with pytest.raises(ValueError, match="fit table has 3 tiers, the tier map 2"):
        routing.compare_routers(*tables, narrow)


def test_frontier_starts_at_the_base_tier_and_climbs(tables: tuple[OutcomeTable, ...]) -> None:
    fit, calibrate, test = tables
    curves = routing.routing_frontier(fit, calibrate, test, fitted(fit, calibrate), num_points=5)
    assert set(curves) == {"random", "oracle", "length", "adaptive"}
    for name in ("adaptive", "length", "oracle"):
        assert curves[name]["cost"][0] == pytest.approx(COSTS[0], rel=0.01)
        base_quality = test.quality[:, 0].mean()
        assert curves[name]["quality"][0] == pytest.approx(base_quality, abs=0.01)
    assert curves["oracle"]["quality"][-1] == pytest.approx(test.quality.max(axis=1).mean())
    ends = (COSTS[0], test.quality[:, 0].mean()), (COSTS[2], test.quality[:, 2].mean())
    scores = {n: routing.apgr(c["cost"], c["quality"], *ends) for n, c in curves.items()}
    assert scores["oracle"] > scores["adaptive"] > scores["length"] > 0.3


def test_difficulty_metrics_see_through_length_and_kind(tables: tuple[OutcomeTable, ...]) -> None:
    test = tables[2]
    metrics = routing.difficulty_metrics(test)
    fails = test.quality < 0.5
    for tier in range(3):
        assert metrics["auroc_by_tier"][tier] == pytest.approx(
            roc_auc_score(fails[:, tier], test.difficulty)
        )
        assert metrics["auroc_by_tier"][tier] > metrics["length_auroc_by_tier"][tier]
        assert metrics["partial_spearman_by_tier"][tier] > 0.3
    kinds = {entry["kind"]: entry for entry in metrics["by_kind"]}
    assert sum(entry["num_requests"] for entry in kinds.values()) == len(test)
    assert 0.5 < kinds["sum"]["auroc_base"] < metrics["auroc_by_tier"][0]
