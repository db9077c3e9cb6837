"""The Triton kernels in Triton's interpreter, on CPU, against the reference.

The interpreter is chosen when the kernels are imported, so the checks run in a process of their
own; there, this file's `check_` functions are the tests. One of them by hand:
`TRITON_INTERPRET=1 python -m pytest tests/test_triton_kernel.py -o python_functions=check_* -k fp8`
"""

import importlib.util
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

from dvpa_kernels import RowRouting, make_routing, moe_mlp

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
BOUND = {FP32: 1e-5, FP16: 2e-3, BF16: 1.5e-2}  # relative Frobenius error
NAMES = ("x", "w_gate_up", "w_down", "weight")

if INTERPRETED and HAS_TRITON:
    import triton

    from dvpa_kernels import cli_tune, fp8, fp8_gemm, tiles, triton_moe
    from dvpa_kernels.gather_sum import gather_sum
    from dvpa_kernels.tuning import Launch, Plan, default_plan


@NEEDS_TRITON
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_the_kernels_in_the_interpreter() -> None:
    import triton

    versions = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if versions < (3, 8) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton < 3.8 cannot loop with numpy >= 2.4")
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
    command += ["-o", "python_functions=check_*"]
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


def case(
    tokens: int,
    experts: int,
    slots: int,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    seed: int = 0,
    full: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Random operands and index; unless `full`, a third of the slots is empty and expert 0 idle."""
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=g).topk(slots).indices
    if not full:
        empty = torch.rand(index.shape, generator=g) < 0.33
        index = index.masked_fill(empty | (index == 0), experts)
    inputs = {
        "x": torch.randn(tokens, hidden, generator=g).to(dtype),
        "w_gate_up": (torch.randn(experts, 2 * width, hidden, generator=g) / hidden**0.5).to(dtype),
        "w_down": (torch.randn(experts, hidden, width, generator=g) / width**0.5).to(dtype),
        "weight": torch.rand(index.shape, generator=g),
    }
    return inputs, index


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; of zeros, the absolute one."""
    ours, exact = ours.detach().float(), exact.detach().float()
    norm = exact.norm()
    return float((ours - exact).norm() / (norm if norm > 0 else 1.0))


def compare(inputs: dict[str, Tensor], index: Tensor, plan: "Plan | None" = None) -> None:
    """Output and every gradient, by name, against fp32 autograd through the reference."""
    dtype, experts = inputs["x"].dtype, len(inputs["w_down"])
    exact = {name: inputs[name].float().clone().requires_grad_() for name in NAMES}
    routing = make_routing(index, exact["weight"], experts)
    wanted = moe_mlp(*(exact[n] for n in NAMES[:3]), routing, backend="reference")
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    results: dict[str, Tensor | None]
    if plan is None:
        ours = {name: inputs[name].clone().requires_grad_() for name in NAMES}
        routing = make_routing(index, ours["weight"], experts)
        out = moe_mlp(*(ours[n] for n in NAMES[:3]), routing, backend="triton")
        out.backward(grad)
        results = {name: ours[name].grad for name in NAMES}
        result_weight = results.pop("weight")
    else:
        routing = make_routing(index, inputs["weight"], experts)
        operands = [inputs[n] for n in NAMES[:3]]
        out, h = triton_moe.forward_rows(*operands, routing, plan, keep=True)
        *parts, d_rows = triton_moe.backward_rows(
            grad, operands[0], h, *operands[1:], routing, plan, (True, True, True)
        )
        results = dict(zip(NAMES, parts, strict=False))
        order = index.flatten().sort(stable=True).indices[: len(d_rows)]
        result_weight = torch.zeros(index.numel()).index_copy(0, order, d_rows).view(index.shape)
    assert out.dtype == dtype
    assert error(out, wanted) < BOUND[dtype], "output"
    if wanted.requires_grad:
        wanted.backward(grad.float())
    for name, ours_grad in {**results, "weight": result_weight}.items():
        expected = exact[name].grad
        if expected is None:
            expected = torch.zeros_like(exact[name])
        assert ours_grad is not None, name
        assert error(ours_grad, expected) < BOUND[dtype], f"gradient of {name}"


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


def check_gather_sum_reads_only_named_rows() -> None:
    rows = torch.randn(5, 40)
    rows[3] = float("nan")
    token_rows = torch.tensor([4, 0, 2, 1, 0], dtype=torch.int32)
    offsets = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    weight = torch.tensor([0.5, 2.0, -1.0, float("nan"), 3.0])
    out = gather_sum(rows, weight, token_rows, offsets)
    wanted = torch.stack([3 * rows[4] + 0.5 * rows[0] - rows[2], torch.zeros(40), 2 * rows[1]])
    torch.testing.assert_close(out, wanted)
    out = gather_sum(rows, None, token_rows, offsets)
    torch.testing.assert_close(out[0], rows[4] + rows[0] + rows[2])


def check_what_the_forward_pass_keeps() -> None:
    """x and h, and operands that exist anyway; nothing that is rows x hidden."""
    inputs, index = case(11, 4, 2, 48, 16, FP32)
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
    routing = make_routing(index, leaves["weight"], 4)
    rows, kept = len(routing.token_index), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_mlp(*(leaves[n] for n in NAMES[:3]), routing, backend="triton")
    existing = {leaf.data_ptr() for leaf in leaves.values()}
    new = [
        t for t in kept if t.is_floating_point() and t.data_ptr() not in existing and t.dim() > 1
    ]
    assert [tuple(tensor.shape) for tensor in new] == [(rows, 32)]
    with torch.no_grad():
        keep = {"keep": True, "plan": default_plan(4, 1)}
        operands = [inputs[n] for n in NAMES[:3]]
        assert triton_moe.forward_rows(*operands, routing, **keep)[1].numel()
        assert not triton_moe.forward_rows(*operands, routing, **{**keep, "keep": False})[1].numel()


@pytest.mark.parametrize("wanted", NAMES)
def check_one_gradient_alone(wanted: str) -> None:
    inputs, index = case(6, 3, 2, 16, 16, FP32)
    gradients = []
    for backend in ("triton", "reference"):
        leaves = {n: inputs[n].clone().requires_grad_(n == wanted) for n in NAMES}
        routing = make_routing(index, leaves["weight"], 3)
        moe_mlp(*(leaves[n] for n in NAMES[:3]), routing, backend=backend).square().sum().backward()
        assert all((leaves[n].grad is not None) == (n == wanted) for n in NAMES)
        gradients.append(leaves[wanted].grad)
    assert error(*gradients) < BOUND[FP32]


def check_a_weight_in_bf16_gets_its_gradient_in_bf16() -> None:
    inputs, index = case(6, 3, 2, 16, 16, FP32)
    weight = inputs["weight"].bfloat16().requires_grad_()
    routing = make_routing(index, weight, 3)
    out = moe_mlp(*(inputs[n] for n in NAMES[:3]), routing, backend="triton")
    out.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == BF16 and weight.grad.any()


def check_twice_the_same_bits() -> None:
    inputs, index = case(16, 4, 3, 32, 16, FP16)
    runs = []
    for _ in range(2):
        leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
        routing = make_routing(index, leaves["weight"], 4)
        out = moe_mlp(*(leaves[n] for n in NAMES[:3]), routing, backend="triton")
        out.sum().backward()
        runs.append([out, *(leaves[name].grad for name in NAMES)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def check_the_operators_keep_their_contracts() -> None:
    inputs, index = case(4, 3, 2, 16, 16, FP32)
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
    r = make_routing(index, leaves["weight"].detach(), 3)
    operands = tuple(leaves[n] for n in NAMES[:3])
    weight, *columns = r.columns
    torch.library.opcheck(
        triton_moe.triton_moe_mlp,
        (*operands, True, weight.clone().requires_grad_(), *columns),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def check_compiled_whole() -> None:
    """One graph, padded rows, output and gradients as in eager mode."""
    inputs, index = case(6, 3, 2, 16, 16, FP32)

    def layer(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
        routing = make_routing(index, weight, 3)
        return moe_mlp(x, gate_up, down, routing, backend="triton").square()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[name].clone().requires_grad_() for name in NAMES]
        out = function(*leaves)
        out.sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize(
    "shape", [(20, 4, 2, 200, 150), (3, 2, 2, 128, 128), (70, 2, 1, 24, 136)], ids=str
)
def check_fp8(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, index = case(*shape, dtype)
    experts = shape[1]
    routing = make_routing(index, inputs["weight"], experts)
    gate_up, gate_up_scale = fp8.quantise_weight(inputs["w_gate_up"])
    down, down_scale = fp8.quantise_weight(inputs["w_down"])
    operands = (inputs["x"], gate_up, gate_up_scale, down, down_scale, routing)
    out = fp8.moe_mlp_fp8(*operands)
    assert out.dtype == dtype
    assert error(out, fp8.moe_mlp_fp8_reference(*operands)) < BOUND[dtype]
    exact = moe_mlp(*(inputs[n].float() for n in NAMES[:3]), routing, backend="reference")
    assert error(out, exact) < 0.08  # three roundings to four significant bits


def check_fp8_codes_are_those_of_torch() -> None:
    rows = torch.randn(11, 200) * torch.logspace(-6, 3, 11)[:, None]
    rows[4] = 0.0
    ours, wanted = fp8_gemm.quantise(rows), fp8.quantise_rows(rows)
    assert torch.equal(ours[0].float(), wanted[0].float())
    torch.testing.assert_close(ours[1], wanted[1])
    # Half a step of four significant bits at most, and a value below the smallest step per block.
    back = fp8.dequantise_rows(*ours)
    step = rows.abs() / 16 + wanted[1].repeat_interleave(128, 1)[:, :200] * 2**-10
    assert ((back - rows).abs() <= step * 1.001).all()


def check_fp8_refuses_what_does_not_fit() -> None:
    inputs, index = case(4, 2, 1, 16, 16, FP32)
    routing = make_routing(index, inputs["weight"], 2)
    codes, scale = fp8.quantise_weight(inputs["w_gate_up"])
    down, down_scale = fp8.quantise_weight(inputs["w_down"])
    good = [inputs["x"], codes, scale, down, down_scale, routing]
    for place, bad, name in (
        (1, inputs["w_gate_up"], "w_gate_up"),
        (2, scale[:, :, :0], "gate_up_scale"),
        (3, down[:1], "w_down"),
        (4, down_scale.half(), "down_scale"),
        (0, inputs["x"][:3], "routing"),
    ):
        with pytest.raises(ValueError, match=f"{name}: "):
            fp8.moe_mlp_fp8(*good[:place], bad, *good[place + 1 :])
    with pytest.raises(RuntimeError, match="no backward pass"):
        fp8.moe_mlp_fp8(inputs["x"].requires_grad_(), *good[1:])


def check_the_tuner_finds_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that prefers wide blocks without TMA, it picks those and reports failures."""
    launches = [Launch(16, 16, 4, 3), Launch(32, 16, 4, 3), Launch(64, 512, 4, 9)]
    monkeypatch.setattr(cli_tune, "candidates", lambda height, pair: iter(launches))
    monkeypatch.setattr(
        cli_tune, "weight_candidates", lambda: iter([Launch(16, 16, 4, 3, block_m=16)])
    )
    clock = iter(range(100, 0, -1))
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, **_: float(next(clock)))
    work = cli_tune.make_workload((32, 32, 2, 1), 1, FP32, "cpu")
    plan = cli_tune.tune(work, 1, lambda line: None)
    assert plan.rows == plan.grad_rows == 16
    assert plan.up == plan.down == plan.grad_act == replace(launches[1], tma=False)

    def broken(launch: Launch) -> float:
        if launch.tma:
            raise RuntimeError("does not fit")
        return 1.0

    said: list[str] = []
    assert cli_tune.fastest(broken, iter(launches[:1]), said.append)[1].tma is False
    assert "does not fit" in said[0]
    with pytest.raises(RuntimeError, match="no candidate runs"):
        cli_tune.fastest(broken, iter([]), said.append)
