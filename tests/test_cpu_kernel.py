"""The C++ expert kernel: every instruction set of this machine against the oracle.

Letters: T tokens, D hidden, F expert width, E experts, K slots.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpa_kernels import RowRouting, make_routing, moe_mlp
from dvpa_kernels.cpu import library, moe_mlp_cpu, op, status
from dvpa_kernels.cpu.library import sort_rows_cpu
from dvpa_kernels.reference import moe_mlp_reference
from dvpa_kernels.routing import sort_rows
from dvpa_kernels.torch_grouped import moe_mlp_torch

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
Operands = tuple[Tensor, Tensor, Tensor, RowRouting]

needs_kernel = pytest.mark.skipif(status().isa is None, reason=f"no kernel: {status().reason}")


def isa_parameters() -> list[Any]:
    """Every instruction set, with the reason where this machine lacks it."""
    lacking = "this processor does not have {}" if status().isa else "the kernel is not built"
    return [
        pytest.param(isa, marks=() if isa in status().isas else pytest.mark.skip(
            reason=lacking.format(isa)))
        for isa in library.ISAS
    ]  # fmt: skip


ISA = pytest.mark.parametrize("isa", isa_parameters())


def random_index(tokens: int, experts: int, slots: int, seed: int) -> Tensor:
    """[T, K]: each token's own number of distinct experts, down to none; the rest is empty."""
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=g).argsort(1)[:, :slots]
    counts = torch.randint(0, slots + 1, (tokens, 1), generator=g)
    return index.masked_fill(torch.arange(slots) >= counts, experts)


def operands(
    index: Tensor, experts: int, hidden: int, width: int, dtype: torch.dtype, seed: int = 0
) -> Operands:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(index), hidden, generator=g)
    w_gate_up = torch.randn(experts, 2 * width, hidden, generator=g) / hidden**0.5
    w_down = torch.randn(experts, hidden, width, generator=g) / width**0.5
    routing = make_routing(index, torch.rand(index.shape, generator=g) + 0.1, experts)
    return x.to(dtype), w_gate_up.to(dtype), w_down.to(dtype), routing


def assert_near_oracle(out: Tensor, inputs: Operands) -> None:
    """Relative Frobenius error against the oracle in fp64, which rounds nothing."""
    x, w_gate_up, w_down, routing = inputs
    exact = moe_mlp_reference(x.double(), w_gate_up.double(), w_down.double(), routing)
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    assert (out.double() - exact).norm() <= BOUNDS[x.dtype] * exact.norm()


@ISA
@DTYPE
@pytest.mark.parametrize(
    ("tokens", "experts", "slots", "hidden", "width"),
    [
        (9, 6, 3, 64, 32),
        (1, 8, 8, 128, 96),
        (1, 3, 1, 7, 5),  # below every vector length
        (13, 5, 5, 65, 33),  # one past it
        (21, 4, 3, 47, 100),
        (3, 50, 48, 40, 24),
        (70, 2, 1, 300, 16),  # many rows for each expert, and more than one block of the sum
    ],
)
def test_output(
    tokens: int, experts: int, slots: int, hidden: int, width: int, dtype: torch.dtype, isa: str
) -> None:
    index = random_index(tokens, experts, slots, seed=tokens)
    index[0] = torch.arange(slots)  # never a batch without rows
    inputs = operands(index, experts, hidden, width, dtype)
    assert_near_oracle(moe_mlp_cpu(*inputs, isa=isa), inputs)


@ISA
@DTYPE
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 22, 70])
def test_all_rows_on_one_expert(rows: int, dtype: torch.dtype, isa: str) -> None:
    """Every row tile; the other experts' weights are never read."""
    inputs = operands(torch.full((rows, 1), 2), 4, 48, 40, dtype)
    inputs[1][[0, 1, 3]] = float("nan")
    out = moe_mlp_cpu(*inputs, isa=isa)
    inputs[1][[0, 1, 3]] = 0.0
    assert_near_oracle(out, inputs)


@ISA
@DTYPE
def test_tokens_without_rows_are_zero(dtype: torch.dtype, isa: str) -> None:
    index = torch.tensor([[4, 4], [4, 1], [4, 4]])
    out = moe_mlp_cpu(*operands(index, 4, 24, 8, dtype), isa=isa)
    assert out[1].any()
    assert not out[[0, 2]].any()
    assert not moe_mlp_cpu(*operands(index.fill_(4), 4, 24, 8, dtype), isa=isa).any()
    assert moe_mlp_cpu(*operands(index[:0], 4, 24, 8, dtype), isa=isa).shape == (0, 24)


@ISA
@DTYPE
def test_large_and_special_values(dtype: torch.dtype, isa: str) -> None:
    """silu saturates without overflow; NaN comes through; fp16 rounds to subnormals."""
    routing = make_routing(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), 1)
    gate_up = torch.tensor([[[1.0], [0.001]]], dtype=dtype)
    x = torch.tensor([[1e4], [-1e4], [float("nan")]], dtype=dtype)
    out = moe_mlp_cpu(x, gate_up, torch.ones(1, 1, 1, dtype=dtype), routing, isa=isa)
    huge = x[:1].double() * x[:1].double() * gate_up[0, 1].double()
    expected = huge.to(dtype)  # infinite in fp16
    torch.testing.assert_close(out[:1], expected, rtol=1e-2, atol=0)
    assert abs(out[1].item()) < 1e-30
    assert out[2].isnan()
    small = torch.full((1, 1, 1), 1e-5, dtype=dtype)
    one = make_routing(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 1e-2), 1)
    inputs = (torch.ones(1, 1, dtype=dtype), torch.ones(1, 2, 1, dtype=dtype), small, one)
    exact = moe_mlp_reference(*(value.double() for value in inputs[:3]), one).to(dtype)
    torch.testing.assert_close(moe_mlp_cpu(*inputs, isa=isa), exact, rtol=1e-2, atol=6e-8)


@ISA
@settings(max_examples=40)
@given(data=st.data())
def test_any_routing(isa: str, data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 9))
    slots = data.draw(st.integers(1, experts))
    hidden, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    seed = data.draw(st.integers(0, 1000))
    dtype = data.draw(st.sampled_from(list(BOUNDS)))
    inputs = operands(random_index(tokens, experts, slots, seed), experts, hidden, width, dtype)
    out = moe_mlp_cpu(*inputs, isa=isa)
    if dtype == torch.float32 or hidden * width * tokens > 1000:  # few numbers: no mean error
        assert_near_oracle(out, inputs)
    assert out.isfinite().all()


@ISA
@DTYPE
def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit(
    dtype: torch.dtype, isa: str
) -> None:
    index = random_index(30, 6, 6, seed=1)
    x, w_gate_up, w_down, routing = inputs = operands(index, 6, 160, 96, dtype)
    one = library.run_kernel(*inputs, isa=isa, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(library.run_kernel(*inputs, isa=isa, threads=threads), one)
    for token in range(0, 30, 7):
        weight = torch.zeros(index.shape)
        rows = routing.token_rows[routing.token_offsets[token] : routing.token_offsets[token + 1]]
        weight[token, : len(rows)] = routing.weight[rows]
        alone = make_routing(index[token : token + 1], weight[token : token + 1], 6)
        out = moe_mlp_cpu(x[token : token + 1], w_gate_up, w_down, alone, isa=isa)
        assert torch.equal(out[0], one[token])


@needs_kernel
def test_slices_views_and_half_weights_are_read_right() -> None:
    _, w_gate_up, w_down, _ = operands(random_index(8, 6, 3, 5), 6, 32, 16, torch.float16)
    wide = torch.randn(8, 64).half()
    index = random_index(8, 3, 2, 6)
    routing = make_routing(index, torch.rand(index.shape).half(), 3)
    inputs = (wide[:, ::2], w_gate_up[2:5], w_down[2:5], routing)
    assert_near_oracle(moe_mlp(*inputs, backend="cpu"), inputs)


@needs_kernel
def test_the_kernel_runs_by_default_and_large_batches_are_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(op, "moe_mlp_torch", lambda *given: calls.append(given) or given[0])
    inputs = operands(random_index(6, 4, 4, 0), 4, 32, 16, torch.float32)
    limit = op.max_rows_per_expert(str(status().isa), torch.float32)
    moe_mlp_cpu(*inputs)
    assert not calls
    for rows, handed_over in ((limit, 0), (limit + 1, 1)):  # all of them on one expert of four
        moe_mlp_cpu(*operands(torch.ones(rows, 1, dtype=torch.long), 4, 32, 16, torch.float32))
        assert len(calls) == handed_over


@DTYPE
def test_gradients_are_those_of_the_torch_backend(dtype: torch.dtype) -> None:
    x, w_gate_up, w_down, routing = operands(random_index(9, 5, 3, 2), 5, 32, 16, dtype)
    grads = {}
    for backend in ("cpu", "torch"):
        leaves = [value.clone().requires_grad_() for value in (x, w_gate_up, w_down)]
        weight = routing.weight.clone().requires_grad_()
        columns = {**vars(routing), "weight": weight}
        moe_mlp(*leaves, RowRouting(**columns), backend=backend).sum().backward()  # an expanded one
        grads[backend] = [leaf.grad for leaf in (*leaves, weight)]
    for name, ours, theirs in zip(
        ("x", "w_gate_up", "w_down", "weight"), grads["cpu"], grads["torch"], strict=True
    ):
        assert ours.any(), name
        # The row's weight meets the activation here and the gradient there: other roundings.
        tolerance = 8 * torch.finfo(dtype).eps
        assert (ours - theirs).double().norm() <= tolerance * theirs.double().norm(), name


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [1, 3])
def test_it_is_one_operator_in_a_compiled_graph(slots: int, dtype: torch.dtype) -> None:
    index = random_index(7, 5, slots, 3)
    x, w_gate_up, w_down, _ = operands(index, 5, 40, 24, dtype)
    weight = torch.rand(index.shape)
    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    def layer(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return moe_mlp(x, w_gate_up, w_down, make_routing(index, weight, 5), backend="cpu") * 2

    with torch.no_grad():
        out = torch.compile(layer, fullgraph=True, backend=keep)(x, index, weight)
        traced = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, index, weight)
        eager = layer(x, index, weight)
    assert sum("cpu_moe_mlp" in str(node.target) for node in graphs[0].graph.nodes) == 1
    assert torch.equal(out, eager)
    assert torch.equal(traced, eager)


@needs_kernel
def test_the_operator_is_registered_soundly() -> None:
    x, w_gate_up, w_down, r = operands(random_index(4, 3, 2, 1), 3, 16, 8, torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.cpu_moe_mlp, (x, w_gate_up, w_down, *r.columns), test_utils=checks)


def test_compiled_gradients_go_through_the_torch_backend() -> None:
    index = random_index(6, 4, 2, 4)
    # bf16: F.grouped_mm cannot be traced in fp32 (torch 2.13)
    x, w_gate_up, w_down, _ = operands(index, 4, 16, 8, torch.bfloat16)

    def loss(x: Tensor) -> Tensor:
        routing = make_routing(index, torch.ones(index.shape), 4)
        return moe_mlp(x, w_gate_up, w_down, routing, backend="cpu").sum()

    expected, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(ours).backward()
    torch.testing.assert_close(ours.grad, expected.grad)


def test_fp64_and_other_devices() -> None:
    inputs = operands(random_index(4, 3, 2, 1), 3, 16, 8, torch.float64)
    assert torch.equal(moe_mlp_cpu(*inputs), moe_mlp_torch(*inputs))
    with pytest.raises(RuntimeError, match="backend 'cpu': x is on meta"):
        moe_mlp_cpu(inputs[0].to("meta"), *inputs[1:])
    with pytest.raises(ValueError, match="isa: 'sse9' must be one of"):
        moe_mlp_cpu(*(value.float() for value in inputs[:3]), inputs[3], isa="sse9")


@needs_kernel
@given(st.integers(0, 9), st.integers(0, 5), st.integers(1, 7), st.integers(0, 10_000))
def test_the_counting_sort_is_the_portable_one(
    tokens: int, slots: int, experts: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts + 1, (tokens, slots), generator=g)
    order, expert_offsets, token_rows, token_offsets = sort_rows(index, experts)
    rows = int(expert_offsets[-1])
    found = sort_rows_cpu(index.to(torch.int32) if seed % 2 else index, experts)
    assert found is not None
    expected = (
        order[:rows],
        order[:rows] // max(slots, 1),
        expert_offsets,
        token_rows[:rows],
        token_offsets,
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()
