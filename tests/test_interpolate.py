"""Chunks combined with NumPy against the naive formula in PyTorch, to the bit."""

import numpy as np
import pytest
import torch
from assembly_world import bits, formula
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpa.checkpoint.interpolate import PAD, Scratch, Sums, combine

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def padded(tensor: Tensor) -> np.ndarray:
    raw = bits(tensor).numpy()
    return np.concatenate([raw, np.zeros(-raw.size % PAD, np.uint8)])


def run(
    dtype: str, tensors: list[Tensor], shares: list[float], base: int = 0
) -> tuple[Tensor, Sums]:
    parts = {i: padded(t) for i, t in enumerate(tensors) if i == base or shares[i]}
    out = np.empty_like(parts[base])
    size = tensors[0].numel() * tensors[0].itemsize
    (sums,) = combine(dtype, parts, [size], base, shares, out, Scratch())
    return torch.from_numpy(out[:size]).view(tensors[0].dtype), sums


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    count=st.integers(2, 4),
    size=st.sampled_from([1, 2, 3, 5, 100, 8191, 8192, 20_001]),
    power=st.integers(-12, 12),
    seed=st.integers(0, 10_000),
)
def test_any_parents_any_shares(dtype: str, count: int, size: int, power: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 5, (count,), generator=generator).double()
    drawn[int(seed) % count] += 1
    shares = (drawn / drawn.sum()).tolist()
    base = seed % 3 % count
    tensors = [
        (torch.randn(size, generator=generator, dtype=torch.float64) * 2.0**power).to(DTYPES[dtype])
        for _ in range(count)
    ]
    result, sums = run(dtype, tensors, shares, base)
    used = [i for i in range(count) if shares[i]]
    wanted = formula([shares[i] for i in used], [tensors[i] for i in used])
    assert bits(result).equal(bits(wanted))
    for i in range(count):
        if shares[i] and i != base:
            exact = (tensors[i].double() - tensors[base].double()).square().sum()
            assert sums.differences[i] == pytest.approx(float(exact), rel=1e-4)
        else:
            assert sums.differences[i] == 0
    assert sums.base == pytest.approx(float(tensors[base].double().square().sum()), rel=1e-4)


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    sizes=st.lists(st.sampled_from([4, 8, 100, 8192, 9000]), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
)
def test_tensors_side_by_side_are_as_each_alone(dtype: str, sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        [torch.randn(size, generator=generator).to(DTYPES[dtype]) for size in sizes]
        for _ in range(2)
    ]
    equal = seed % len(sizes)
    drawn[1][equal] = drawn[0][equal].clone()
    whole = [torch.cat(each) for each in drawn]
    ends = (np.cumsum(sizes) * whole[0].itemsize).tolist()
    out = np.empty(whole[0].nbytes, np.uint8)
    parts = {i: padded(tensor) for i, tensor in enumerate(whole)}
    together = combine(dtype, parts, ends, 1, [0.1, 0.9], out, Scratch())
    results = torch.from_numpy(out).view(whole[0].dtype).split(sizes)
    for i, (left, right) in enumerate(zip(*drawn, strict=True)):
        alone, sums = run(dtype, [left, right], [0.1, 0.9], base=1)
        assert bits(results[i]).equal(bits(alone))
        assert together[i].is_equal == sums.is_equal == (i == equal)
        assert together[i].differences[0] == pytest.approx(sums.differences[0], rel=1e-5)
        assert together[i].base == pytest.approx(sums.base, rel=1e-5)


def test_every_bf16_and_the_rounding_of_ties() -> None:
    """All finite values with all others' neighbours: sums of halves hit ties all the time."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()]
    for shift in (1, 3, 200):
        other = values.roll(shift)
        result, _ = run("BF16", [values, other], [0.5, 0.5])
        assert bits(result).equal(bits(formula([0.5, 0.5], [values, other])))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_equal_parents_give_the_same_bytes(dtype: str) -> None:
    """0.1 a + 0.9 a is not always a in fp32."""
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    result, sums = run(dtype, [tensor, tensor.clone()], [0.1, 0.9])
    assert bits(result).equal(bits(tensor))
    assert sums.differences == [0.0, 0.0]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_shows_in_the_difference(dtype: str, value: float, where: int) -> None:
    tensors = [torch.ones(9, dtype=DTYPES[dtype]) * (i + 1) for i in range(2)]
    tensors[where][4] = value
    _, sums = run(dtype, tensors, [0.5, 0.5])
    assert not np.isfinite(sums.differences[1])
    both = [tensors[where], tensors[where].clone()]
    result, sums = run(dtype, both, [0.5, 0.5])  # the same everywhere: nothing to combine
    assert bits(result).equal(bits(both[0]))
    assert sums.differences == [0.0, 0.0]


def test_squares_beyond_fp32_are_still_counted() -> None:
    tensors = [torch.full((4,), value, dtype=torch.bfloat16) for value in (1e30, -1e30)]
    _, sums = run("BF16", tensors, [0.5, 0.5])
    assert sums.differences[1] == pytest.approx(4 * (2e30) ** 2, rel=0.01)


def test_a_tiny_difference_is_no_equality() -> None:
    tensors = [torch.tensor([value], dtype=torch.float32) for value in (1e-30, 2e-30)]
    result, sums = run("F32", tensors, [0.5, 0.5])
    assert not sums.is_equal
    assert result.item() == pytest.approx(1.5e-30)
