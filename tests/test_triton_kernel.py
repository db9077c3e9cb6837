"""The Triton kernels in Triton's interpreter, on CPU, against the reference.

The interpreter is chosen when the kernels are imported, so the checks run in a process of their
own; there, the `check_` functions of this file and of check_triton_operators.py are the tests.
One of them by hand:
`TRITON_INTERPRET=1 python -m pytest tests/test_triton_kernel.py -o python_functions=check_* -k nan`
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_world import BF16, FP16, FP32, HAS_TRITON, INTERPRETED, NAMES, case, compare

from dvpa_kernels import RowRouting, make_routing, moe_mlp

OPERATORS = Path(__file__).with_name("check_triton_operators.py")
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

if INTERPRETED and HAS_TRITON:
    from dvpa_kernels import tiles, triton_moe
    from dvpa_kernels.tuning import Launch, Plan, default_plan


@NEEDS_TRITON
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_the_kernels_in_the_interpreter() -> None:
    import triton

    versions = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if versions < (3, 8) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton < 3.8 cannot loop with numpy >= 2.4")
    command = [sys.executable, "-m", "pytest", __file__, str(OPERATORS)]
    command += ["-p", "no:cacheprovider", "-o", "python_functions=check_*"]
    run = subprocess.run(
        command,
        env=dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""),
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout, run.stdout


def test_a_cpu_tensor_is_refused_by_name() -> None:
    inputs, index = case(2, 2, 1, 16, 16, FP32)
    routing = make_routing(index, inputs["weight"], 2)
    reason = "device" if HAS_TRITON else "not installed"
    with pytest.raises(RuntimeError, match=f"backend 'triton': .*{reason}"):
        moe_mlp(*(inputs[name] for name in NAMES[:3]), routing, backend="triton")


def test_the_package_imports_without_triton() -> None:
    """As on macOS: nothing needs triton before a Triton kernel is called."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from dvpa_kernels import make_routing, moe_mlp
from dvpa_kernels import fp8, tuning
routing = make_routing(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), 1)
operands = torch.randn(2, 16), torch.randn(1, 32, 16), torch.randn(1, 16, 16), routing
moe_mlp(*operands, backend="torch")
try:
    moe_mlp(*operands, backend="triton")
except RuntimeError as error:
    assert "not installed" in str(error), error
else:
    raise AssertionError("no error")
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(
    "shape",
    [
        (20, 6, 3, 48, 40),  # no side a multiple of a block; experts without rows
        (9, 5, 5, 20, 7),  # rows that TMA cannot take
        (1, 3, 1, 16, 16),
    ],
    ids=str,
)
def check_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(*case(*shape, dtype))


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("rows", [16, 64])
def check_every_launch_setting(rows: int, tma: bool) -> None:
    launch = Launch(block_n=32, block_k=16, warps=4, stages=3, group=3, tma=tma)
    weight = replace(launch, block_m=16)
    plan = Plan(rows, launch, launch, rows, launch, replace(launch, block_k=32), weight)
    inputs, index = case(30, 3, 2, 48, 40, FP32)
    compare(inputs, index, plan)


def check_all_rows_on_one_expert() -> None:
    inputs, index = case(37, 4, 1, 32, 16, FP16)
    compare(inputs, torch.full_like(index, 2))


def check_k_of_48_beside_k_of_1() -> None:
    inputs, index = case(2, 48, 48, 16, 16, FP32, full=True)
    index[1, 1:] = 48
    compare(inputs, index)


def check_tiers_are_prefixes_of_the_pool() -> None:
    """Tokens of three tiers in one batch: k 2, 4 and 6 out of the first 4, 8 and 12 experts."""
    inputs, _ = case(9, 12, 6, 32, 24, FP32)
    index = torch.full((9, 6), 12)
    g = torch.Generator().manual_seed(3)
    for token in range(9):
        k = 2 * (1 + token % 3)
        index[token, :k] = torch.randperm(2 * k, generator=g)[:k]
    compare(inputs, index)


def check_no_rows_and_no_tokens() -> None:
    inputs, index = case(4, 3, 2, 16, 16, FP32)
    compare(inputs, torch.full_like(index, 3))
    inputs, index = case(0, 3, 2, 16, 16, FP32)
    routing = make_routing(index, inputs["weight"], 3)
    out = moe_mlp(*(inputs[n] for n in NAMES[:3]), routing, backend="triton")
    assert out.shape == (0, 16)


@settings(max_examples=6)
@given(st.data())
def check_ragged_routing(data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    slots = data.draw(st.integers(1, experts))
    inputs, index = case(tokens, experts, slots, 16, 16, FP32, data.draw(st.integers(0, 999)))
    compare(inputs, index)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=9), st.sampled_from([16, 64]), st.data())
def check_the_tile_list(counts: list[int], block: int, data: st.DataObject) -> None:
    """Every row of every expert once, in order; also where the first rows belong to nobody."""
    lead = data.draw(st.integers(0, 5))
    offsets = (torch.tensor([0, *counts]).cumsum(0) + lead).int()
    padding = data.draw(st.integers(0, 40))
    rows = int(offsets[-1]) + padding
    if rows == 0:
        return
    wanted = [
        (e, int(offsets[e]) + start, min(block, count - start))
        for e, count in enumerate(counts)
        for start in range(0, count, block)
    ]
    built = tiles.build_tiles(offsets, rows, block)
    assert built.shape == (3, tiles.tile_bound(rows, len(counts), block))
    assert built.T[: len(wanted)].tolist() == [list(tile) for tile in wanted]
    assert not built[2, len(wanted) :].any()


def padded(routing: RowRouting, extra: int) -> RowRouting:
    """As `make_routing` returns it on a GPU: the row columns are longer than the rows."""

    def longer(column: Tensor) -> Tensor:
        return torch.cat([column, column.new_zeros(extra)])

    return replace(
        routing,
        token_index=longer(routing.token_index),
        weight=longer(routing.weight),
        token_rows=longer(routing.token_rows),
    )


def check_padding_rows_change_nothing() -> None:
    inputs, index = case(7, 4, 2, 32, 16, FP32)
    plan = default_plan(4, 1)
    routing = make_routing(index, inputs["weight"], 4)
    operands = [inputs[n] for n in NAMES[:3]]
    grad = torch.randn(7, 32)
    results = []
    for given_routing in (routing, padded(routing, 9)):
        out, h = triton_moe.forward_rows(*operands, given_routing, plan, keep=True)
        rows = len(given_routing.token_index)
        assert h.shape == (rows, 32)
        h[len(routing.token_index) :] = float("nan")  # as torch.empty may leave it
        gradients = triton_moe.backward_rows(
            grad, operands[0], h, *operands[1:], given_routing, plan, (True, True, True)
        )
        results.append((out, *gradients[:3], gradients[3][: len(routing.token_index)]))
        assert not gradients[3][len(routing.token_index) :].any()
    for exact, ours in zip(*results, strict=True):
        assert torch.equal(exact, ours)


def check_indices_out_of_range_are_dropped_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU's routing, where looking at the values would wait: rows may precede expert 0's."""
    inputs, index = case(8, 4, 2, 16, 16, FP32)
    index[2, 0], index[5, 1], index[6, 0] = -3, 1000, -1
    inputs["weight"][2, 0] = inputs["weight"][7, 1] = float("nan")
    index[7, 1] = 4
    known = index.masked_fill((index < 0) | (index > 4), 4)
    wanted = make_routing(known, inputs["weight"], 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        routing = make_routing(index, inputs["weight"], 4)
    assert int(routing.expert_offsets[0]) == 2 and len(routing.weight) == 16
    operands, plan = [inputs[n] for n in NAMES[:3]], default_plan(4, 1)
    grad, results = torch.randn(8, 16), []
    for given_routing in (routing, wanted):
        out, h = triton_moe.forward_rows(*operands, given_routing, plan, keep=True)
        gradients = triton_moe.backward_rows(
            grad, operands[0], h, *operands[1:], given_routing, plan, (True, True, True)
        )
        results.append((out, *gradients[:3]))
    assert not gradients[3].isnan().any()
    for ours, exact in zip(*results, strict=True):
        assert torch.equal(ours, exact)


def check_other_experts_may_hold_nan() -> None:
    """A tier leaves the experts behind its pool alone, whatever they hold."""
    inputs, index = case(6, 4, 2, 24, 24, FP16)  # 24: blocks, through TMA, reach past the expert
    index[index == 3] = 4
    clean = {name: value.clone() for name, value in inputs.items()}
    inputs["w_gate_up"][3] = inputs["w_down"][3] = float("nan")
    inputs["w_gate_up"][0] = inputs["w_down"][0] = float("nan")
    outputs = []
    for values in (clean, inputs):
        leaves = {name: values[name].clone().requires_grad_() for name in NAMES}
        routing = make_routing(index, leaves["weight"], 4)
        out = moe_mlp(*(leaves[n] for n in NAMES[:3]), routing, backend="triton")
        out.sum().backward()  # an expanded gradient
        outputs.append([out, *(leaves[name].grad for name in NAMES)])
    for exact, ours in zip(*outputs, strict=True):
        assert torch.equal(exact, ours)
