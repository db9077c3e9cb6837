"""Mixtures of prepared folders: shares at every moment, and where each stage goes on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpa_train.mixture import MAX_PERIOD, Mixture, Schedule

weights_of = st.lists(st.floats(0.0, 10.0), min_size=1, max_size=7).filter(lambda w: sum(w) > 1e-3)


@settings(max_examples=40)
@given(weights=weights_of)
def test_shares_are_kept_to_less_than_one_sample_at_every_moment(weights: list[float]) -> None:
    mixture = Mixture(weights)
    wanted = np.array(weights) / sum(weights)
    assert np.abs(mixture.shares - wanted).max() <= len(weights) / MAX_PERIOD
    assert ((mixture.shares > 0) == (np.array(weights) > 0)).all()
    numbers = np.arange(2 * mixture.period + 1)
    counts = mixture.counts(numbers)
    drawn = mixture.source(numbers)[:, None] == np.arange(len(weights))
    assert (np.diff(counts, axis=0) == drawn[:-1]).all()
    assert np.abs(counts - numbers[:, None] * mixture.shares).max() < 1


def test_plain_weights_are_exact() -> None:
    assert Mixture([0.7, 0.2, 0.1]).period == 10
    assert Mixture([1, 1, 1]).pattern.tolist() == [0, 1, 2]
    assert Mixture([3]).pattern.tolist() == [0]
    with pytest.raises(ValueError, match="one of them above 0"):
        Mixture([0.0, 0.0])
    with pytest.raises(ValueError, match="0 or more"):
        Mixture([1.0, -1.0])
    with pytest.raises(ValueError, match="segments"):
        Schedule([])


@given(
    segments=st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.integers(0, 4), min_size=3, max_size=3)).filter(
            lambda s: sum(s[1]) > 0
        ),
        min_size=1,
        max_size=4,
    ),
    start=st.integers(0, 200),
)
def test_every_source_goes_on_where_the_stage_before_left_it(
    segments: list[tuple[int, list[int]]], start: int
) -> None:
    schedule = Schedule([(length, Mixture(weights)) for length, weights in segments])
    sources, within = schedule.locate(np.arange(300))
    seen = [0, 0, 0]
    for source, number in zip(sources.tolist(), within.tolist(), strict=True):  # the replay
        assert number == seen[source]
        seen[source] += 1
    ends = np.cumsum([length for length, _ in segments])
    for i, source in enumerate(sources.tolist()):
        segment = min(int(np.searchsorted(ends, i, side="right")), len(segments) - 1)
        assert segments[segment][1][source] > 0  # a stage draws from its own sources only
    again = schedule.locate(np.arange(start, start + 50))  # no replay
    assert again[0].tolist() == sources[start : start + 50].tolist()
    assert again[1].tolist() == within[start : start + 50].tolist()
