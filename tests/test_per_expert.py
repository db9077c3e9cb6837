"""The CPU's training path, block by block, against the oracle; and what it keeps for later."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvpa_kernels import RowRouting, make_routing, moe_mlp, per_expert
from dvpa_kernels.cpu.library import status
from dvpa_kernels.cpu.train import CompiledRowOps, row_ops
from dvpa_kernels.per_expert import RowOps
from dvpa_kernels.reference import moe_mlp_reference
from dvpa_kernels.torch_grouped import moe_mlp_torch

NAMES = ("x", "w_gate_up", "w_down", "weight")


def operands(
    index: Tensor, experts: int, hidden: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], RowRouting]:
    """Random x, weights and slot weights that ask for gradients, and the routing of the last."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((len(index), hidden), (experts, 2 * width, hidden), (experts, hidden, width))
    leaves = [
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    leaves.append(torch.rand(index.shape, generator=g, dtype=exact).requires_grad_())
    return leaves, make_routing(index, leaves[3], experts)


def gradients(function: Any, leaves: list[Tensor], routing: RowRouting) -> list[Tensor]:
    """The output and the gradient of each leaf, for one upstream gradient."""
    out = function(*leaves[:3], routing)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    found = torch.autograd.grad(out, leaves, upstream, allow_unused=True, retain_graph=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g
                            for x, g in zip(leaves, found, strict=True))]  # fmt: skip


def on_the_cpu(*inputs: Any) -> Tensor:
    """What `moe_mlp` does on a CPU."""
    return moe_mlp(*inputs, backend="cpu")


@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 5),
    sizes=st.sampled_from([(7, 5), (16, 8), (4, 12)]),
    block=st.integers(1, 5),
    data=st.data(),
)
def test_any_routing_in_any_blocks_is_the_reference(
    tokens: int, experts: int, sizes: tuple[int, int], block: int, data: st.DataObject
) -> None:
    """Every token picks its own experts, also none or one twice; some experts get no row."""
    choice = st.lists(st.integers(0, experts), min_size=3, max_size=3)
    table = [data.draw(choice) for _ in range(tokens)]
    index = torch.tensor(table, dtype=torch.long).view(tokens, 3)
    leaves, routing = operands(index, experts, *sizes, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_expert, "BLOCK_ROWS", block)
        ours = gradients(on_the_cpu, leaves, routing)
    theirs = gradients(moe_mlp_reference, leaves, routing)
    for name, found, expected in zip(("y", *NAMES), ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_expert, "BLOCK_ROWS", 2)
    index = torch.tensor([[0, 2], [2, 3], [0, 3], [2, 0]])  # expert 1 is empty, 3 no expert
    leaves, _ = operands(index, 3, 3, 2, torch.float64)

    def layer(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weight: Tensor) -> Tensor:
        return on_the_cpu(x, w_gate_up, w_down, make_routing(index, weight, 3))

    assert torch.autograd.gradcheck(layer, leaves)


@pytest.mark.parametrize("tokens", [1, 40, 1500])
def test_fp32_is_what_grouped_products_give(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, 6, generator=g).topk(3).indices
    leaves, routing = operands(index, 6, 32, 16, torch.float32)  # 1500: two blocks an expert
    ours = gradients(on_the_cpu, leaves, routing)
    for name, found, expected in zip(
        ("y", *NAMES), ours, gradients(moe_mlp_torch, leaves, routing), strict=True
    ):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_farther_from_the_truth_than_grouped_products(
    dtype: torch.dtype,
) -> None:
    """A token's experts, and the experts' shares of its gradient, are added up in fp32."""
    index = torch.rand(60, 8, generator=torch.Generator().manual_seed(1)).topk(6).indices
    leaves, routing = operands(index, 8, 32, 16, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = gradients(moe_mlp_reference, exact, make_routing(index, exact[3], 8))
    ours, theirs = (gradients(f, leaves, routing) for f in (on_the_cpu, moe_mlp_torch))
    for name, found, other, expected in zip(("y", *NAMES), ours, theirs, truth, strict=True):
        assert found.dtype == other.dtype
        error = (found.double() - expected).norm() / expected.norm()
        assert error <= 1.1 * (other.double() - expected).norm() / expected.norm(), name
        assert error < 0.02, name


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    index = torch.tensor([[0, 1], [1, 2], [2, 0]])
    leaves, routing = operands(index, 3, 16, 8, torch.float32)
    x, w_gate_up, w_down, _ = leaves
    with torch.no_grad():
        ops = row_ops(torch.float32)
        h = per_expert.forward_rows(ops, x, w_gate_up, w_down, routing)[1]
        args = (ops, torch.randn(3, 16), x, h, w_gate_up, w_down, routing)
        everything = per_expert.backward_rows(*args)
        for number, name in enumerate(NAMES):
            need = [i == number for i in range(4)]
            found = per_expert.backward_rows(*args, need)
            assert [g is not None for g in found] == need
            assert torch.equal(found[number], everything[number]), name


def test_of_all_rows_only_the_hidden_values_are_kept() -> None:
    index = torch.rand(50, 8).topk(4).indices
    leaves, routing = operands(index, 8, 32, 16, torch.float32)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        on_the_cpu(*leaves[:3], routing)
    for tensor in (*leaves[:3], *routing.columns):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == 200 * 2 * 16 * 4


def block(rows: int, width: int, size: int) -> dict[str, Tensor]:
    """Operands of every row operation; some tokens have two rows."""
    g = torch.Generator().manual_seed(rows)
    return {
        "source": torch.randn(5, size, generator=g),
        "token": torch.randint(0, 5, (rows,), generator=g),
        "values": torch.randn(rows, size, generator=g),
        "weight": torch.rand(rows, generator=g),
        "h": 8 * torch.randn(rows, 2 * width, generator=g),
        "d_act": torch.randn(rows, width, generator=g),
    }


def run_ops(ops: RowOps, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each operation writes."""
    h, d_act, token, weight = (given[name] for name in ("h", "d_act", "token", "weight"))
    out = {
        "gather": torch.empty_like(given["values"]),
        "add": given["source"].clone(),
        "add weighted": given["source"].clone(),
        "activation": torch.empty_like(d_act),
        "act": torch.empty_like(d_act),
        "d_h": torch.empty_like(h),
        "d_weight": torch.empty_like(weight),
    }
    ops.gather(given["source"], token, out["gather"])
    ops.add(out["add"], token, given["values"], None)
    ops.add(out["add weighted"], token, given["values"], weight)
    ops.activation(h, out["activation"])
    ops.slope(h, d_act, weight, out["act"], out["d_h"], out["d_weight"])
    return out


@pytest.mark.parametrize("isa", status().isas)
@pytest.mark.parametrize("sizes", [(1, 1, 3), (70, 32, 64), (33, 45, 17)], ids=str)
def test_every_instruction_set_does_what_pytorch_does(
    isa: str, sizes: tuple[int, int, int]
) -> None:
    given = block(*sizes)
    exact = {name: value if name == "token" else value.double() for name, value in given.items()}
    expected = run_ops(RowOps(), exact)
    for name, found in run_ops(CompiledRowOps(isa), given).items():
        scale = float(expected[name].abs().max())  # a sum of many terms may cancel
        torch.testing.assert_close(
            found.double(), expected[name], rtol=1e-5, atol=1e-6 * scale, msg=name
        )


def test_threads_change_no_bit() -> None:
    given, threads = block(300, 96, 80), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_ops(row_ops(torch.float32), given)
        torch.set_num_threads(3)
        three = run_ops(row_ops(torch.float32), given)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_other_dtypes_and_machines_without_a_compiler_take_pytorchs() -> None:
    assert type(row_ops(torch.bfloat16)) is RowOps
    compiled = status().isa is not None
    assert type(row_ops(torch.float32)) is (CompiledRowOps if compiled else RowOps)
