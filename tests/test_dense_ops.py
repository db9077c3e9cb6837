"""`linear` and `rms_norm`: every instruction set of this machine against fp64.

Letters: T tokens, G groups, K inputs, N outputs, D size.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernel import DTYPE, ISA, needs_kernel
from torch import Tensor

from dvpa.model.attention import DvpaRMSNorm
from dvpa_kernels import dense, linear, rms_norm
from dvpa_kernels.cpu import library, status
from dvpa_kernels.cpu.dense import linear_cpu, rms_norm_cpu
from dvpa_kernels.dense import linear_torch, rms_norm_torch

BOUNDS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def operands(
    tokens: int, groups: int | None, inputs: int, outputs: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    group = () if groups is None else (groups,)
    x = torch.randn(tokens, *group, inputs, generator=g)
    weight = torch.randn(*group, outputs, inputs, generator=g) / max(1, inputs) ** 0.5
    return x.to(dtype), weight.to(dtype), torch.randn(*group, outputs, generator=g).to(dtype)


def assert_near_exact(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Relative Frobenius error against fp64."""
    exact = torch.einsum("t...k,...nk->t...n", x.double(), weight.double())
    exact = exact if bias is None else exact + bias.double()
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert y.is_contiguous()
    assert (y.double() - exact).norm() <= BOUNDS[x.dtype] * exact.norm()


@ISA
@DTYPE
@pytest.mark.parametrize(
    ("tokens", "groups", "inputs", "outputs"),
    [
        (1, None, 64, 96),
        (1, None, 7, 5),  # below every vector length
        (16, None, 65, 33),  # one past it, and the most rows of the small tiles
        (17, None, 33, 35),  # the fewest rows of a panel
        (18, None, 1024, 31),  # one whole block of the depth
        (3, None, 1025, 9),  # one past it, for few rows
        (20, None, 2100, 37),  # and for many
        (131, None, 40, 70),  # more than one block of rows
        (5, 3, 20, 34),
        (40, 4, 33, 6),
        (260, 2, 16, 3),
    ],
)
def test_output(
    tokens: int, groups: int | None, inputs: int, outputs: int, dtype: torch.dtype, isa: str
) -> None:
    x, weight, bias = operands(tokens, groups, inputs, outputs, dtype)
    for added in (None, bias):
        y = linear_cpu(x, weight, added, isa=isa)
        assert y is not None
        assert_near_exact(y, x, weight, added)


@ISA
@DTYPE
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 40), (1100, 13)])
def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit(
    inputs: int, outputs: int, dtype: torch.dtype, isa: str
) -> None:
    x, weight, bias = operands(133, None, inputs, outputs, dtype)
    y = linear_cpu(x, weight, bias, isa=isa, threads=1)
    assert y is not None
    for threads in (2, 5, 64):
        assert torch.equal(y, linear_cpu(x, weight, bias, isa=isa, threads=threads))  # type: ignore[arg-type]
    for first, last in ((0, 1), (7, 9), (50, 53), (60, 64), (80, 96), (91, 108), (100, 133)):
        part = linear_cpu(x[first:last], weight, bias, isa=isa)
        assert part is not None
        assert torch.equal(part, y[first:last]), (first, last)


@ISA
@DTYPE
def test_the_rest_of_the_batch_does_not_change_a_group(dtype: torch.dtype, isa: str) -> None:
    x, weight, _ = operands(33, 3, 48, 20, dtype)
    y = linear_cpu(x, weight, isa=isa, threads=2)
    assert y is not None
    for group in range(3):
        alone = linear_cpu(x[4:5, group], weight[group], isa=isa, threads=1)
        assert torch.equal(alone, y[4:5, group])  # type: ignore[arg-type]


@ISA
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(isa: str, data: st.DataObject) -> None:
    tokens, groups = data.draw(st.integers(0, 40)), data.draw(st.sampled_from([None, 1, 2, 5]))
    inputs, outputs = data.draw(st.integers(0, 90)), data.draw(st.integers(0, 90))
    dtype = data.draw(st.sampled_from(list(BOUNDS)))
    x, weight, bias = operands(
        tokens, groups, inputs, outputs, dtype, data.draw(st.integers(0, 99))
    )
    y = linear_cpu(x, weight, bias, isa=isa)
    assert y is not None
    exact = torch.einsum("t...k,...nk->t...n", x.double(), weight.double()) + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=4 * BOUNDS[dtype], atol=4 * BOUNDS[dtype])


@ISA
@DTYPE
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, isa: str) -> None:
    x, weight, _ = operands(12, None, 40, 24, dtype)
    clean = linear_cpu(x, weight, isa=isa)
    assert clean is not None
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    y = linear_cpu(x, weight, isa=isa)
    assert y is not None
    assert y[3].isnan().all()
    assert not y[7].isfinite().any()
    rest = [row for row in range(12) if row not in (3, 7)]
    assert torch.equal(y[rest], clean[rest])


@ISA
@DTYPE
@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 768])
def test_rms_norm_is_that_of_the_model(size: int, dtype: torch.dtype, isa: str) -> None:
    g = torch.Generator().manual_seed(size)
    x = (torch.randn(33, size, generator=g) * 3).to(dtype)
    norm = DvpaRMSNorm(size, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size, generator=g))
        expected = norm(x)
    y = rms_norm_cpu(x, norm.weight.detach(), 1e-5, isa=isa, threads=1)
    assert y is not None
    assert y.dtype == dtype
    # The scale may differ in its last bit, and then a value that was nearly halfway rounds away.
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (y != expected).double().mean() < (0.5 if dtype == torch.float32 else 0.02)
    assert torch.equal(y, rms_norm_cpu(x, norm.weight.detach(), 1e-5, isa=isa, threads=3))  # type: ignore[arg-type]
    assert torch.equal(y[5:6], rms_norm_cpu(x[5:6], norm.weight.detach(), 1e-5, isa=isa))  # type: ignore[arg-type]


@DTYPE
def test_the_torch_backends_are_near_too(dtype: torch.dtype) -> None:
    for groups in (None, 3):
        x, weight, bias = operands(6, groups, 40, 24, dtype)
        assert_near_exact(linear_torch(x, weight, None), x, weight, None)
        y = linear_torch(x, weight, bias)
        torch.testing.assert_close(y, linear(x, weight, bias), rtol=2e-2, atol=2e-2)
    x, norm = torch.randn(3, 20).to(dtype), DvpaRMSNorm(20).to(dtype)
    with torch.no_grad():
        assert torch.equal(rms_norm_torch(x, norm.weight, 1e-6), norm(x))


@needs_kernel
def test_views_are_read_right() -> None:
    x, weight, bias = operands(10, 4, 24, 12, torch.bfloat16)
    assert torch.equal(linear(x[::2], weight, bias), linear(x[::2].contiguous(), weight, bias))
    wide = torch.cat((x, x), -1)[..., :24]
    assert torch.equal(linear(wide, weight, bias[:, :]), linear(x, weight, bias))
    assert torch.equal(
        rms_norm(x[:, 1], weight[0, 0], 1e-6), rms_norm(x[:, 1].clone(), weight[0, 0], 1e-6)
    )


@needs_kernel
def test_pytorch_does_what_the_kernels_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(name: str) -> None:
        original = getattr(dense, name)

        def counted(*inputs: Tensor) -> Tensor:
            calls.append(name)
            return original(*inputs)

        monkeypatch.setattr(dense, name, counted)

    spy("linear_torch")
    spy("rms_norm_torch")
    x, weight, bias = operands(4, None, 16, 8, torch.float32)
    norm = torch.ones(16)
    linear(x, weight, bias)
    rms_norm(x, norm, 1e-6)
    assert not calls
    linear(x.double(), weight.double())
    rms_norm(x.double(), norm.double(), 1e-6)
    linear(x.to("meta"), weight.to("meta"))
    assert calls == ["linear_torch", "rms_norm_torch", "linear_torch"]
    weight.requires_grad_()
    linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, x.sum(0).expand(8, 16))  # type: ignore[arg-type]
    with torch.no_grad():
        linear(x, weight)
    assert len(calls) == 4
    monkeypatch.setattr(library, "_loaded", (library.CpuKernel(None, None, reason="none"), None))
    assert torch.equal(linear(x, weight.detach(), bias), F.linear(x, weight.detach(), bias))


def test_a_compiled_graph_goes_to_pytorch() -> None:
    x, weight, bias = operands(4, None, 16, 8, torch.float32)
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), F.linear(x, weight, bias))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = operands(4, None, 16, 8, torch.float32)
    grouped_x, grouped, _ = operands(4, 2, 16, 8, torch.float32)
    for message, wrong in {
        r"x: shape \(4, 16\) must be \[T, G, K\] .* \(2, 8, 16\)": (x, grouped),
        r"x: shape \(4, 2, 16\) must be \[T, K\]": (grouped_x, weight),
        r"x: shape \(4, 15\)": (x[:, 1:], weight),
        r"x: shape \(4, 1, 16\)": (grouped_x[:, :1], grouped),
        r"weight: shape \(16,\) must be": (x, weight[0]),
        r"weight: strides \(1, 8\) must be contiguous": (x, weight.T.contiguous().T),
        "weight: torch.float16 on cpu must be as x, torch.float32 on cpu": (x, weight.half()),
        r"bias: shape \(7,\) must be \(8,\)": (x, weight, bias[1:]),
        "bias: torch.float64": (x, weight, bias.double()),
    }.items():
        with pytest.raises(ValueError, match=message):
            linear(*wrong)
    with pytest.raises(ValueError, match=r"must be \[T, D\] and \[D\]"):
        rms_norm(x, weight[0, 1:], 1e-6)
    with pytest.raises(ValueError, match=r"weight: torch.bfloat16"):
        rms_norm(x, weight[0].bfloat16(), 1e-6)
    if status().isa is not None:
        with pytest.raises(ValueError, match="isa: 'sse9' must be one of"):
            linear_cpu(x, weight, isa="sse9")
