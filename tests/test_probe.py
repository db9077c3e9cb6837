"""The head over a prompt in pieces gives what it gives over the whole."""

import math

import pytest
import torch
from engine_oracle import oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpa.engine.probe import Reading, difficulty, read_on

LENGTH = 17


def head_and_states(scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states_ND = scale * torch.randn(LENGTH, 32, generator=generator)
    return states_ND, torch.randn(64, generator=generator)


@settings(max_examples=40)
@given(
    cuts=st.sets(st.integers(1, LENGTH - 1), max_size=6),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    sharpness=st.sampled_from([1.0, 40.0]),
)
@torch.inference_mode()
def test_any_pieces_give_the_score_of_the_whole(
    cuts: set[int], scale: float, sharpness: float
) -> None:
    head = oracle().model.difficulty_head
    assert head is not None
    states_ND, logits_V = head_and_states(scale)
    weight = head.query.weight.clone()
    try:
        head.query.weight.mul_(sharpness)  # so that one position can outweigh all before it
        mask = torch.ones(1, LENGTH, dtype=torch.bool)
        whole = head(states_ND[None], mask, logits_V[None])
        reading, ends = None, [*sorted(cuts), LENGTH]
        for first, end in zip([0, *ends], ends, strict=False):
            [reading] = read_on(head, reading, states_ND[first:end], [end - first])
        assert reading is not None
        assert math.isclose(
            difficulty(head, reading, logits_V), float(whole.difficulty), abs_tol=1e-5
        )
        several = read_on(head, None, states_ND, ends)  # the same on the way
        for end, on_the_way in zip(ends, several, strict=True):
            part = head(states_ND[None, :end], mask[:, :end], logits_V[None])
            found = difficulty(head, on_the_way, logits_V)
            assert math.isclose(found, float(part.difficulty), abs_tol=1e-5)
    finally:
        head.query.weight.copy_(weight)


@torch.inference_mode()
def test_a_reading_outlives_the_states_it_was_made_from() -> None:
    head = oracle().model.difficulty_head
    assert head is not None
    states_ND, logits_V = head_and_states(1.0)
    readings = read_on(head, None, states_ND, [4, LENGTH])
    before = [difficulty(head, reading, logits_V) for reading in readings]
    states_ND.fill_(float("nan"))
    assert [difficulty(head, reading, logits_V) for reading in readings] == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@torch.inference_mode()
def test_states_that_are_not_finite_give_nan(value: float) -> None:
    head = oracle().model.difficulty_head
    assert head is not None
    states_ND, logits_V = head_and_states(1.0)
    states_ND[5, 3] = value
    reading: Reading | None = None
    for first in (0, 9):
        [reading] = read_on(head, reading, states_ND[first : first + 9], [min(9, LENGTH - first)])
    assert reading is not None and math.isnan(difficulty(head, reading, logits_V))
