"""Drift: an index that is 0 for the same mix, never negative, and large for another one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_events import tier_map

from dvpa.tiers.drift import MIN_REQUESTS, NUM_BINS, Drift, _groups, bin_of, stability_index

histograms = st.lists(st.integers(0, 300), min_size=NUM_BINS, max_size=NUM_BINS).filter(any)


def counts_of(difficulties: Sequence[float]) -> list[int]:
    return np.histogram(difficulties, bins=NUM_BINS, range=(0.0, 1.0))[0].tolist()


def mix(a: float, b: float, size: int, seed: int = 0) -> list[float]:
    """Difficulties drawn from a beta distribution."""
    return np.random.default_rng(seed).beta(a, b, size).tolist()


@given(histograms, histograms)
def test_index_is_never_negative(calibration: list[int], recent: list[int]) -> None:
    assert stability_index(calibration, recent) >= 0.0


@given(histograms, st.integers(1, 50))
def test_the_same_mix_gives_zero(calibration: list[int], times: int) -> None:
    assert stability_index(calibration, [times * count for count in calibration]) == 0.0


@given(histograms)
def test_groups_cover_all_bins_once_with_mass_in_each(calibration: list[int]) -> None:
    groups = _groups(calibration)
    assert [i for group in groups for i in range(NUM_BINS)[group]] == list(range(NUM_BINS))
    masses = [sum(calibration[group]) for group in groups]
    used = [mass for mass in masses if mass]
    assert 1 <= len(used) <= 10
    assert len(used) == 1 or min(used) >= max(sum(calibration) / 10, 15)
    assert 0 not in masses[1:-1]  # only below and above the calibration's range


def test_index_by_hand() -> None:
    calibration, recent = [50, 50, *[0] * 18], [80, 20, *[0] * 18]
    expected = (0.8 - 0.5) * np.log(0.8 / 0.5) + (0.2 - 0.5) * np.log(0.2 / 0.5)
    assert stability_index(calibration, recent) == pytest.approx(expected)


def test_an_empty_group_counts_as_half_a_request() -> None:
    calibration, recent = [50, 50, *[0] * 18], [100, *[0] * 19]
    expected = (1 - 0.5) * np.log(1 / 0.5) + (0.005 - 0.5) * np.log(0.005 / 0.5)
    assert stability_index(calibration, recent) == pytest.approx(expected)


@pytest.mark.parametrize("bin_index", [0, 7, 19])
def test_what_was_never_seen_in_calibration_counts(bin_index: int) -> None:
    calibration = [0] * NUM_BINS
    calibration[10] = 400
    recent = [0] * NUM_BINS
    recent[bin_index] = 200
    assert stability_index(calibration, recent) > 1.0


@pytest.mark.parametrize(
    ("calibration", "recent", "message"),
    [
        ([1] * 20, [1] * 19, "19 bins must be 20"),
        ([0] * 20, [1] * 20, "must not be empty"),
        ([1] * 20, [0] * 20, "must not be empty"),
    ],
)
def test_histograms_that_cannot_be_compared(
    calibration: list[int], recent: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stability_index(calibration, recent)


@pytest.mark.parametrize("seed", range(5))
def test_a_shifted_mix_is_told_from_the_same_one(seed: int) -> None:
    drift = Drift(tier_map(counts_of(mix(2, 3, 2000))))
    for difficulty in mix(2, 3, 500, seed + 1):
        drift.add(difficulty)
    assert drift.index is not None and drift.index < 0.1
    for difficulty in mix(4, 2, 500, seed + 1):
        drift.add(difficulty)
    assert drift.index is not None and drift.index > 0.25


@pytest.mark.parametrize("num_calibrate", [30, 60, 2000])
def test_noise_alone_is_no_alarm(num_calibrate: int) -> None:
    """With the fewest requests that are judged, of the same mix, the index stays below 0.25."""
    found = []
    for seed in range(40):
        drift = Drift(tier_map(counts_of(mix(2, 3, num_calibrate, 1000 + seed))))
        for difficulty in mix(2, 3, MIN_REQUESTS, seed):
            drift.add(difficulty)
        assert drift.index is not None
        found.append(drift.index)
    assert np.median(found) < 0.15
    assert np.mean(np.array(found) > 0.25) <= 0.1


def test_too_few_requests_tell_nothing() -> None:
    drift = Drift(tier_map([100] * NUM_BINS))
    for _ in range(MIN_REQUESTS - 1):
        drift.add(0.9)
    assert (drift.index, drift.num_requests) == (None, MIN_REQUESTS - 1)
    drift.add(0.9)
    assert drift.index is not None and drift.index > 1.0


def test_a_short_window_is_judged_when_it_is_full() -> None:
    drift = Drift(tier_map([100] * NUM_BINS), window=10)
    for _ in range(10):
        assert drift.index is None
        drift.add(0.9)
    assert drift.index is not None


@given(st.lists(st.floats(0.0, 1.0), max_size=60), st.integers(1, 20))
def test_the_window_holds_the_last_difficulties(difficulties: list[float], window: int) -> None:
    drift = Drift(tier_map(), window)
    for difficulty in difficulties:
        drift.add(difficulty)
    last = difficulties[-window:]
    assert drift.num_requests == len(last) == sum(drift.counts)
    assert drift.counts == [sum(bin_of(d) == i for d in last) for i in range(NUM_BINS)]


def test_bins_are_equal_and_closed_at_the_end() -> None:
    assert [bin_of(d) for d in (0.0, 0.049, 0.05, 0.5, 0.99, 1.0)] == [0, 0, 1, 10, 19, 19]
    rng = np.random.default_rng(0)
    for difficulty in rng.random(500).tolist():
        assert counts_of([difficulty]).index(1) == bin_of(difficulty)


def test_without_a_calibration_histogram_drift_is_unknown() -> None:
    drift = Drift(tier_map())
    for _ in range(MIN_REQUESTS):
        drift.add(0.5)
    assert drift.calibration_counts is None
    assert drift.index is None


@pytest.mark.parametrize(
    "histogram",
    [[], [1] * 19, [0] * 20, [-1, *[1] * 19], [0.5] * 20, [True] * 20, ["1"] * 20, [[1]] * 20],
)
def test_a_histogram_that_is_none_is_ignored_with_a_warning(
    histogram: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    drift = Drift(tier_map(histogram))
    assert drift.calibration_counts is None
    assert "difficulty_histogram" in caplog.text


def test_a_new_map_changes_what_is_compared_and_keeps_the_requests() -> None:
    drift = Drift(tier_map([400, *[0] * 19]))
    for _ in range(MIN_REQUESTS):
        drift.add(0.975)
    assert drift.index is not None and drift.index > 1.0
    drift.set_tier_map(tier_map([*[0] * 19, 400]))
    assert drift.index == 0.0
    assert drift.num_requests == MIN_REQUESTS
    drift.set_tier_map(tier_map())
    assert drift.index is None
