"""The Triton operators in the interpreter: what they keep, compiled whole, in fp8, tuned.

`check_` functions are the tests, in the process that test_triton_kernel.py starts.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_world import BF16, BOUND, FP16, FP32, HAS_TRITON, INTERPRETED, NAMES, case, error

from dvpa_kernels import make_routing, moe_mlp

if INTERPRETED and HAS_TRITON:
    import triton

    from dvpa_kernels import cli_tune, fp8, fp8_gemm, triton_moe
    from dvpa_kernels.gather_sum import gather_sum
    from dvpa_kernels.tuning import Launch, default_plan


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
