"""Reliability curves against a plain loop, and their picture."""

import io

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from dvpa.evaluate.reliability import COLUMNS, reliability, reliability_png
from dvpa.evaluate.table import OutcomeTable
from dvpa.tiers import TierMap
from dvpa.tiers.calibrate import Budget, Split, fit_tier_map


def outcomes(difficulty: np.ndarray, quality: np.ndarray) -> OutcomeTable:
    """A table of these, the rest of it plain."""
    count, tiers = quality.shape
    return OutcomeTable(
        ids=[str(i) for i in range(count)],
        level=np.zeros(count, dtype=np.int64),
        kind=["x"] * count,
        prompt_tokens=np.full(count, 5),
        quality=quality.astype(float),
        nll=np.zeros((count, tiers)),
        difficulty=difficulty,
        completion_tokens=np.full((count, tiers), 3),
    )


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Difficulties, and right or wrong at two tiers."""
    random = np.random.default_rng(seed)
    difficulty = random.random(count)
    success = np.stack([1 - difficulty, 1 - 0.5 * difficulty], axis=1)
    return difficulty, random.random((count, 2)) < success


@pytest.fixture(scope="module")
def tier_map() -> TierMap:
    """Fitted on requests of the same kind."""
    fit, calibrate = (Split(*drawn(600, seed)) for seed in (1, 2))
    return fit_tier_map(fit, calibrate, (1.0, 2.0), Budget(fraction=0.8), ("base", "top"))


@hypothesis.settings(max_examples=25)
@given(seed=st.integers(0, 50), count=st.integers(1, 120), bins=st.integers(1, 20))
def test_curves_equal_a_loop_over_the_requests(
    seed: int, count: int, bins: int, tier_map: TierMap
) -> None:
    difficulty, quality = drawn(count, seed)
    table = reliability(tier_map, outcomes(difficulty, quality), bins)
    assert list(table) == list(COLUMNS)
    predicted = tier_map.success(difficulty)
    for tier, name in enumerate(tier_map.tier_names):
        lines = [i for i, of in enumerate(table["tier"]) if of == name]
        assert 1 <= len(lines) <= bins
        assert sum(table["requests"][i] for i in lines) == count
        # Bins are runs of the requests in order of prediction, and never part equal ones.
        order = sorted(range(count), key=lambda i: predicted[i, tier])
        start, seen = 0, set()
        for i in lines:
            size = table["requests"][i]
            own = order[start : start + size]
            values = {predicted[j, tier] for j in own}
            assert not values & seen
            seen |= values
            assert table["predicted"][i] == pytest.approx(
                np.mean([predicted[j, tier] for j in own])
            )
            right = sum(bool(quality[j, tier]) for j in own)
            assert table["observed"][i] == pytest.approx(right / size)
            exact = binomtest(right, size).proportion_ci(method="exact")
            assert (table["low"][i], table["high"][i]) == pytest.approx((exact.low, exact.high))
            start += size


def test_a_map_that_promises_too_much_lies_below_the_diagonal(tier_map: TierMap) -> None:
    difficulty, quality = drawn(4000, 3)
    honest = reliability(tier_map, outcomes(difficulty, quality))
    harder = reliability(tier_map, outcomes(difficulty, quality & (difficulty < 0.3)[:, None]))

    def covered(table: dict[str, list[float]]) -> float:
        hits = [
            low <= predicted <= high
            for low, predicted, high in zip(
                table["low"], table["predicted"], table["high"], strict=True
            )
        ]
        return sum(hits) / len(hits)

    assert covered(honest) > 0.6
    assert covered(harder) < 0.5
    assert all(o <= p + 0.1 for o, p in zip(harder["observed"], harder["predicted"], strict=True))


def test_what_has_no_curve(tier_map: TierMap) -> None:
    difficulty, quality = drawn(50, 0)
    difficulty[:10] = np.nan
    table = reliability(tier_map, outcomes(difficulty, quality))
    assert sum(table["requests"]) == 2 * 40
    untrained = TierMap.untrained(("base", "top"), (1.0, 2.0))
    assert not reliability(untrained, outcomes(difficulty, quality))["tier"]
    with pytest.raises(ValueError, match="3 tiers, the tier map has 2"):
        reliability(tier_map, outcomes(difficulty, np.ones((50, 3))))
    with pytest.raises(ValueError, match="bins: 0"):
        reliability(tier_map, outcomes(difficulty, quality), bins=0)


def test_the_picture_has_a_panel_per_tier(tier_map: TierMap) -> None:
    table = reliability(tier_map, outcomes(*drawn(500, 4)))
    picture = Image.open(io.BytesIO(reliability_png(table, {"base": 0.01, "top": 0.02})))
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = pixels[..., 2] - pixels[..., 0] > 100  # the curves
    left, right = np.array_split(blue, 2, axis=1)
    assert left.sum() > 200
    assert right.sum() > 200
