"""Block-scaled FP8 against a loop over blocks, the kernels' own quantiser and the number format."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvpa import fp8
from dvpa.checkpoint.fp8 import dequantise, encode, quantise, requantise, scale_shape
from dvpa_kernels.fp8 import dequantise_weight, quantise_weight

EDGES = [(576, 256), (160, 128), (128, 384), (1, 1), (127, 129), (300, 5)]


def naive(codes: Tensor, scale_inv: Tensor) -> Tensor:
    """One block after the other."""
    weight = torch.empty(codes.shape)
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            weight[block] = codes[block].float() * scale_inv[i, j]
    return weight


def random_codes(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every finite code, with scales over many binades."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    raw[(raw & 127) == 127] = 0  # the two NaNs
    scales = torch.rand(scale_shape(shape), generator=generator) * 2.0 ** torch.randint(
        -20, 5, scale_shape(shape), generator=generator
    )
    return raw.view(torch.float8_e4m3fn), scales


def test_v3s_odd_matrix_has_five_rows_of_scales() -> None:
    assert scale_shape((576, 7168)) == (5, 56)
    assert scale_shape((4, 576, 7168)) == (4, 5, 56)


@pytest.mark.parametrize("shape", EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantise_is_the_product_rounded_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scales = random_codes(shape)
    assert torch.equal(dequantise(codes, scales, dtype), naive(codes, scales).to(dtype))


def test_all_codes_mean_what_the_format_says() -> None:
    raw = torch.arange(256, dtype=torch.uint8).view(2, 128)
    weight = dequantise(raw.view(torch.float8_e4m3fn), torch.ones(1, 1)).flatten()
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
        if code & 127 == 127:
            assert weight[code].isnan()
            continue
        value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        assert weight[code] == sign * value


@pytest.mark.parametrize("piece", [fp8.PIECE, 1000, 1])
def test_codes_are_converted_as_pytorch_does(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code to the bit, minus zero too; NaN where it is NaN, whatever lies beside it."""
    monkeypatch.setattr(fp8, "PIECE", piece)
    raw = torch.arange(256, dtype=torch.uint8).repeat(12).view(3, 1024)
    raw[1:, 127::128] = 0
    codes = raw.view(torch.float8_e4m3fn)
    for each in (codes, codes.T, codes[:, 5:700], codes[:0]):
        expected = each.float().contiguous()
        weight = dequantise(each, torch.ones(scale_shape(tuple(each.shape))))
        assert torch.equal(weight.isnan(), expected.isnan())
        is_number = ~expected.isnan()
        bits = [value[is_number].view(torch.int32) for value in (weight, expected)]
        assert torch.equal(*bits)


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    seed=st.integers(0, 1000),
    power=st.integers(-30, 20),
)
def test_quantise_is_near_and_stays(rows: int, columns: int, seed: int, power: int) -> None:
    """Within half a step of E4M3; the same as the kernels'; quantising again changes no value."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, columns), generator=generator) * 2.0**power
    codes, scales = quantise(weight)
    assert scales.shape == scale_shape((rows, columns))
    back = dequantise(codes, scales)
    step = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    error = (back - weight).abs()
    assert bool((error <= torch.maximum(weight.abs() / 16, step * 2.0**-10) * 1.0001).all())
    kernel_codes, kernel_scales = quantise_weight(weight[None])
    assert torch.equal(codes.view(torch.uint8), kernel_codes[0].view(torch.uint8))
    assert torch.equal(scales, kernel_scales[0])
    assert torch.equal(back, dequantise_weight(kernel_codes, kernel_scales)[0])
    again, _ = quantise(back)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


def test_a_stack_of_experts_is_its_matrices() -> None:
    weight = torch.randn(3, 160, 200, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise(weight.bfloat16())
    assert scales.shape == (3, 2, 2)
    for expert in range(3):
        one, scale = quantise(weight[expert].bfloat16())
        assert torch.equal(codes[expert].view(torch.uint8), one.view(torch.uint8))
        assert torch.equal(scales[expert], scale)
    assert torch.equal(dequantise(codes, scales)[1], naive(codes[1], scales[1]))


def test_inputs_are_left_alone_and_may_be_transposed() -> None:
    weight = torch.randn(200, 130, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    codes, scales = quantise(weight.T)
    assert torch.equal(weight, before)
    straight, _ = quantise(weight.T.contiguous())
    assert torch.equal(codes.view(torch.uint8), straight.view(torch.uint8))
    kept = codes.clone()
    dequantise(codes, scales)
    assert torch.equal(codes.view(torch.uint8), kept.view(torch.uint8))


def test_a_block_of_zeros_has_a_scale_above_zero() -> None:
    codes, scales = quantise(torch.zeros(130, 10))
    assert bool((scales > 0).all())
    assert not dequantise(codes, scales).any()


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (torch.zeros(576, 256), torch.ones(5, 2), "codes: torch.float32"),
        (torch.zeros(8).to(torch.float8_e4m3fn), torch.ones(1), "codes: torch.float8_e4m3fn"),
        (torch.zeros(576, 256).to(torch.float8_e4m3fn), torch.ones(4, 2), r"must be .*\(5, 2\)"),
        (torch.zeros(128, 128).to(torch.float8_e4m3fn), torch.ones(1, 1).double(), "float64"),
    ],
)
def test_what_does_not_fit_is_named(codes: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantise(codes, scales)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_quantise_refuses_what_is_not_finite(value: float) -> None:
    weight = torch.ones(3, 300)
    weight[1, 200] = value
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight)
    with pytest.raises(ValueError, match=r"weight: torch.int32 \(2, 2\)"):
        quantise(torch.ones(2, 2, dtype=torch.int32))


def errors_of(weight: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Squared error by block, of its first 32 rows; one after the other."""
    squared = (naive(codes, scales) - weight).double().square()
    squared[torch.arange(len(weight)) % 128 >= 32] = 0.0
    high, wide = scales.shape
    return torch.tensor(
        [
            [
                float(squared[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].sum())
                for j in range(wide)
            ]
            for i in range(high)
        ]
    )


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    seed=st.integers(0, 1000),
    distance=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
)
def test_requantise_takes_the_best_scale_of_each_block(
    rows: int, columns: int, seed: int, distance: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, noise = torch.randn((2, rows, columns), generator=generator)
    parents = [quantise(left), quantise(left + distance * noise)]
    exact = (naive(*parents[0]) + naive(*parents[1])) / 2
    codes, scales = requantise(exact, [scale for _, scale in parents])
    assert torch.equal(codes.view(torch.uint8), encode(exact, scales).view(torch.uint8))
    plain = quantise(exact)
    tried = [plain[1], 1.2 * plain[1], *(scale for _, scale in parents)]
    best = torch.stack([errors_of(exact, encode(exact, each), each) for each in tried]).amin(0)
    assert bool((errors_of(exact, codes, scales) <= 1.0001 * best + 1e-12).all())
    if distance == 0.0:  # a parent's own codes stand for it without an error
        assert torch.equal(naive(codes, scales), exact)


def test_a_parents_scale_of_zero_is_not_taken() -> None:
    weight = torch.zeros(130, 130)
    weight[:128, :128] = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = requantise(weight, [torch.zeros(2, 2)])
    assert bool((scales > 0).all())
    assert torch.isfinite(dequantise(codes, scales)).all()
    assert float((dequantise(codes, scales) - weight).norm() / weight.norm()) < 0.03


def test_encode_saturates() -> None:
    """A parent's scale may be too small for the mean of two parents."""
    weight = torch.tensor([[1.0, -1000.0, 447.0, 470.0]])
    codes = encode(weight, torch.ones(1, 1))
    assert codes.float().tolist() == [[1.0, -448.0, 448.0, 448.0]]


def test_the_middle_of_two_fp8_matrices_loses_little() -> None:
    """What three bits of mantissa cost normal values at their best is 2.5 %."""
    left, noise = torch.randn((2, 512, 512), generator=torch.Generator().manual_seed(0))
    for distance, bound in ((0.003, 0.0075), (0.03, 0.0199), (0.1, 0.0256), (0.3, 0.0256)):
        parents = [quantise(left), quantise(left + distance * noise)]
        exact = (dequantise(*parents[0]) + dequantise(*parents[1])) / 2
        found = dequantise(*requantise(exact, [scale for _, scale in parents]))
        assert float((found - exact).norm() / exact.norm()) < bound, distance
