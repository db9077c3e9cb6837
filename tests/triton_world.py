"""Operands for the Triton kernels, and comparison with the reference."""

import importlib.util
import os

import torch
from torch import Tensor

from dvpa_kernels import make_routing, moe_mlp

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
BOUND = {FP32: 1e-5, FP16: 2e-3, BF16: 1.5e-2}  # relative Frobenius error
NAMES = ("x", "w_gate_up", "w_down", "weight")

if INTERPRETED and HAS_TRITON:
    from dvpa_kernels import triton_moe
    from dvpa_kernels.tuning import Plan


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
