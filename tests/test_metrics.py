"""Metrics of routing and difficulty against SciPy, scikit-learn and what they must mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from dvpa.evaluate import routing


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_sklearns(pairs: list[tuple[int, bool]]) -> None:
    score, label = zip(*pairs, strict=True)
    if len(set(label)) == 1:
        assert np.isnan(routing.auroc(score, label))
    else:
        assert routing.auroc(score, label) == pytest.approx(roc_auc_score(label, score))


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, 200)
    y = x + rng.integers(0, 9, 200)
    assert routing.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(routing.spearman(x, np.ones(200)))
    assert np.isnan(routing.spearman([1.0, np.nan], [1.0, 2.0]))


def test_partial_spearman_is_the_correlation_of_residuals() -> None:
    rng = np.random.default_rng(1)
    length = rng.integers(1, 60, 300)
    x = 0.3 * length + rng.normal(0, 4, 300)
    y = 0.2 * length + 0.5 * x + rng.normal(0, 3, 300)
    design = np.stack([np.ones(300), rankdata(length)], axis=1)
    residuals = [
        rankdata(v) - design @ np.linalg.lstsq(design, rankdata(v), rcond=None)[0] for v in (x, y)
    ]
    expected = pearsonr(*residuals).statistic
    assert routing.partial_spearman(x, y, np.log(length)) == pytest.approx(expected)
    # A score that is nothing but length has no partial correlation left, however large its own.
    assert np.isnan(routing.partial_spearman(length, y, length))
    assert routing.partial_spearman(x, y, np.ones(300)) == pytest.approx(routing.spearman(x, y))


def test_a_random_mix_has_apgr_one_half_and_an_oracle_more() -> None:
    share = np.linspace(0, 1, 7)
    base, top = (100.0, 0.4), (300.0, 0.9)
    mix = (100 + 200 * share, 0.4 + 0.5 * share)
    assert routing.apgr(*mix, base, top) == pytest.approx(0.5, abs=1e-12)
    assert routing.cpt(*mix, base, top, 80) == pytest.approx(0.8, abs=2e-3)
    assert routing.apgr([150.0], [0.95], base, top) > 0.9
    # PGR by hand: (0.6 - 0.4) / 0.5 at a quarter of the way, reached at 20 % of the cost axis.
    at = routing.pgr_curve([140.0], [0.6], base, top, [0.1, 0.2, 1.0])
    np.testing.assert_allclose(at, [0.2, 0.4, 1.0])
    assert routing.pgr(0.6, 0.4, 0.9) == pytest.approx(0.4)
    # A point below the line is never worse than not moving; an undefined gap is NaN.
    assert routing.pgr_curve([200.0], [0.1], base, top, [0.5])[0] == pytest.approx(0.0)
    assert np.isnan(routing.apgr(*mix, base, (300.0, 0.4)))
    assert np.isnan(routing.cpt([100.0], [0.2], base, (300.0, 0.3), 50))
    with pytest.raises(ValueError, match="cost more"):
        routing.apgr(*mix, base, (100.0, 0.9))


def test_bootstrap_intervals_cover_and_are_seeded() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(120):
        low, high = routing.bootstrap_ci(rng.random(200) < 0.3, num_resamples=400, seed=trial)
        covered += low <= 0.3 <= high
    assert 105 <= covered <= 120  # nominal 114; binomial standard deviation 2.4
    values = rng.random(50)
    assert routing.bootstrap_ci(values, 300, 7) == routing.bootstrap_ci(values, 300, 7)
    assert routing.bootstrap_ci(values, 300, 7) != routing.bootstrap_ci(values, 300, 8)
    spread = routing.bootstrap_means(values[:, None], 4000, 0).std()
    assert spread == pytest.approx(values.std() / np.sqrt(50), rel=0.06)


def test_pairing_removes_what_both_routers_share() -> None:
    rng = np.random.default_rng(3)
    shared = rng.random(400)
    better = shared + 0.02 + rng.normal(0, 0.01, 400)
    difference, low, high = routing.paired_bootstrap(better, shared, 1000, 0)
    assert difference == pytest.approx(float((better - shared).mean()))
    assert 0.015 < low < difference < high < 0.025
    assert routing.bootstrap_ci(shared)[1] > routing.bootstrap_ci(better)[0]  # unpaired: overlap
