"""The Triton kernels on a CUDA GPU: the same comparisons, graph capture, compilation, memory."""

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from dvpa_kernels import make_routing, moe_mlp

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the kernels would not run on the GPU", allow_module_level=True)

from dvpa_kernels import fp8, fp8_gemm
from dvpa_kernels.triton_moe import backward_rows, forward_rows
from dvpa_kernels.tuning import default_plan, fit_plan

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
BOUND = {FP32: 1e-5, FP16: 2e-3, BF16: 1.5e-2}  # relative Frobenius error
NAMES = ("x", "w_gate_up", "w_down", "weight")
HOPPER = torch.cuda.get_device_capability() >= (9, 0)


def case(
    tokens: int, experts: int, slots: int, hidden: int, width: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """Fresh random operands; expert 0 idle and a third of the slots empty."""
    index = torch.rand(tokens, experts, device="cuda").topk(slots).indices
    empty = torch.rand(index.shape, device="cuda") < 0.33
    index = index.masked_fill(empty | (index == 0), experts)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda")

    inputs = {
        "x": random(tokens, hidden).to(dtype),
        "w_gate_up": (random(experts, 2 * width, hidden) * hidden**-0.5).to(dtype),
        "w_down": (random(experts, hidden, width) * width**-0.5).to(dtype),
        "weight": torch.rand(index.shape, device="cuda"),
    }
    return inputs, index


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; of zeros, the absolute one; NaN is infinite."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    norm = exact.norm()
    value = float((ours - exact).norm() / (norm if norm > 0 else 1.0))
    return float("inf") if value != value else value


def exact_results(
    inputs: dict[str, Tensor], index: Tensor, grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the reference in fp64 on the CPU."""
    exact = {name: inputs[name].double().cpu().requires_grad_() for name in NAMES}
    routing = make_routing(index.cpu(), exact["weight"], len(exact["w_down"]))
    out = moe_mlp(*(exact[n] for n in NAMES[:3]), routing, backend="reference")
    gradients = torch.autograd.grad(
        out, [exact[n] for n in NAMES], grad.double().cpu(), allow_unused=True
    )
    filled = (
        torch.zeros_like(exact[n]) if g is None else g
        for n, g in zip(NAMES, gradients, strict=True)
    )
    return out, dict(zip(NAMES, filled, strict=True))


def compare(inputs: dict[str, Tensor], index: Tensor) -> None:
    """Output and every gradient, by name."""
    dtype = inputs["x"].dtype
    grad = torch.randn_like(inputs["x"])
    wanted, gradients = exact_results(inputs, index, grad)
    ours = {name: inputs[name].clone().requires_grad_() for name in NAMES}
    routing = make_routing(index, ours["weight"], len(ours["w_down"]))
    out = moe_mlp(*(ours[n] for n in NAMES[:3]), routing, backend="triton")
    out.backward(grad)
    assert error(out, wanted) < BOUND[dtype], "output"
    for name, expected in gradients.items():
        assert error(ours[name].grad, expected) < BOUND[dtype], f"gradient of {name}"


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(
    "shape",
    [
        (200, 16, 4, 256, 192),
        (65, 6, 3, 200, 136),
        (33, 5, 5, 100, 52),  # rows TMA cannot take (bf16)
        (17, 4, 2, 37, 21),
        (1, 8, 8, 512, 256),
        (3, 48, 48, 128, 64),
        (1500, 8, 2, 512, 320),  # 128-row tiles
    ],
    ids=str,
)
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(*case(*shape, dtype))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_each_tier_and_all_mixed(dtype: torch.dtype) -> None:
    inputs, _ = case(96, 48, 1, 256, 128, dtype)
    tiers = ((4, 12), (15, 24), (27, 36), (48, 48))  # k, pool
    inputs["weight"] = torch.rand(96, 48, device="cuda")
    for chosen in ([0], [1], [2], [3], [0, 1, 2, 3]):
        index = torch.full((96, 48), 48, device="cuda")
        for token in range(96):
            k, pool = tiers[chosen[token % len(chosen)]]
            index[token, :k] = torch.randperm(pool, device="cuda")[:k]
        compare(inputs, index)


def test_all_rows_on_one_expert_and_no_rows() -> None:
    inputs, index = case(300, 5, 1, 128, 64, BF16)
    compare(inputs, torch.full_like(index, 2))
    compare(inputs, torch.full_like(index, 5))


@pytest.mark.parametrize("rows_per_expert", [8, 32, 64, 512])
def test_every_default_plan(rows_per_expert: int) -> None:
    """Each tile height on the same ragged rows, also where it would not be chosen."""
    inputs, index = case(150, 6, 3, 256, 192, BF16)
    grad = torch.randn_like(inputs["x"])
    wanted, gradients = exact_results(inputs, index, grad)
    routing = make_routing(index, inputs["weight"], 6)
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    plan = fit_plan(default_plan(2, rows_per_expert, HOPPER), 2, shared)
    x, *weights = (inputs[n] for n in NAMES[:3])
    out, h = forward_rows(x, *weights, routing, plan, keep=True)
    assert error(out, wanted) < BOUND[BF16]
    ours = backward_rows(grad, x, h, *weights, routing, plan, (True, True, True))
    for name, gradient in zip(NAMES[:3], ours, strict=False):
        assert error(gradient, gradients[name]) < BOUND[BF16], name


def test_twice_the_same_bits() -> None:
    inputs, index = case(500, 16, 6, 256, 128, BF16)
    runs = []
    for _ in range(2):
        leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
        routing = make_routing(index, leaves["weight"], 16)
        out = moe_mlp(*(leaves[n] for n in NAMES[:3]), routing, backend="triton")
        out.sum().backward()
        runs.append([out, *(leaves[name].grad for name in NAMES)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_bad_indices_never_leave_the_buffers() -> None:
    """On the GPU nobody looks at the values: rows out of range are dropped."""
    inputs, index = case(20, 6, 3, 64, 32, BF16)
    bad = index.clone()
    bad[3, 0], bad[7, 1], bad[9, 2] = -5, 1000, 6
    good = bad.clone()
    good[(bad < 0) | (bad > 6)] = 6
    outputs = [
        moe_mlp(
            *(inputs[n] for n in NAMES[:3]),
            make_routing(table, inputs["weight"], 6),
            backend="triton",
        )
        for table in (bad, good)
    ]
    assert torch.equal(*outputs)


def test_a_cuda_graph_follows_new_inputs() -> None:
    """make_routing and moe_mlp are captured once and replayed on other rows and other routes."""
    inputs, index = case(64, 16, 4, 256, 128, BF16)
    static = {"x": inputs["x"].clone(), "index": index.clone(), "weight": inputs["weight"].clone()}

    def layer() -> Tensor:
        routing = make_routing(static["index"], static["weight"], 16)
        return moe_mlp(
            static["x"], inputs["w_gate_up"], inputs["w_down"], routing, backend="triton"
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            layer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = layer()
    for _ in range(3):
        fresh, table = case(64, 16, 4, 256, 128, BF16)
        static["x"].copy_(fresh["x"])
        static["index"].copy_(table)
        static["weight"].copy_(fresh["weight"])
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, layer())


def test_nothing_waits_for_the_device() -> None:
    inputs, index = case(64, 16, 4, 256, 128, BF16)
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}

    def step() -> None:
        routing = make_routing(index, leaves["weight"], 16)
        out = moe_mlp(*(leaves[n] for n in NAMES[:3]), routing, backend="triton")
        out.backward(torch.ones_like(out))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_whole() -> None:
    inputs, index = case(40, 8, 3, 128, 64, BF16)

    def layer(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
        routing = make_routing(index, weight, 8)
        return moe_mlp(x, gate_up, down, routing, backend="triton").square()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [inputs[name].clone().requires_grad_() for name in NAMES]
        out = function(*leaves)
        out.float().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) < BOUND[BF16]


def test_what_backward_needs_in_memory() -> None:
    """Between the passes: h and the output. At the peak: not a row x hidden copy of everything."""
    tokens, experts, slots, hidden, width = 4096, 16, 8, 1024, 256
    inputs, _ = case(tokens, experts, slots, hidden, width, BF16)
    index = torch.rand(tokens, experts, device="cuda").topk(slots).indices
    held, peaks = {}, {}
    for backend in ("triton", "torch"):
        leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
        routing = make_routing(index, leaves["weight"], experts)
        operands = tuple(leaves[n] for n in NAMES[:3])
        moe_mlp(*operands, routing, backend=backend).sum().backward()  # warm
        for leaf in leaves.values():
            leaf.grad = None
        routing = make_routing(index, leaves["weight"], experts)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = moe_mlp(*operands, routing, backend=backend)
        held[backend] = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        out.sum().backward()
        peaks[backend] = torch.cuda.max_memory_allocated() - before
    rows = tokens * slots
    print(f"held between the passes: {held}; peak of backward: {peaks}")
    slack = 2**21
    assert held["triton"] <= 2 * (rows * 2 * width + tokens * hidden) + slack, held
    assert held["triton"] < held["torch"]
    assert peaks["triton"] < peaks["torch"]


@pytest.mark.skipif(
    torch.cuda.get_device_capability() < fp8.CAPABILITY, reason="no FP8 matrix units"
)
@pytest.mark.parametrize(
    "shape", [(64, 8, 3, 512, 256), (5, 4, 2, 200, 150), (900, 4, 2, 256, 384)], ids=str
)
def test_fp8(shape: tuple[int, ...]) -> None:
    inputs, index = case(*shape, BF16)
    routing = make_routing(index, inputs["weight"], shape[1])
    operands = (
        inputs["x"],
        *fp8.quantise_weight(inputs["w_gate_up"]),
        *fp8.quantise_weight(inputs["w_down"]),
    )
    codes, scale = fp8_gemm.quantise(inputs["x"])
    wanted_codes, wanted_scale = fp8.quantise_rows(inputs["x"])
    torch.testing.assert_close(scale, wanted_scale)
    assert (codes.float() != wanted_codes.float()).float().mean() < 0.001  # ties after division
    out = fp8.moe_mlp_fp8(*operands, routing)
    # Rounding to FP8 may differ by a step where fp32 sums differ in their last bits.
    assert error(out, fp8.moe_mlp_fp8_reference(*operands, routing)) < 2e-2
    exact, _ = exact_results(inputs, index, torch.zeros_like(inputs["x"]))
    assert error(out, exact) < 0.08
