"""The Triton backend: forward and backward as two opaque operators over the grouped kernels.

The forward pass keeps x and, when a gradient will be wanted, the pre-activation h [R, 2F]. Nothing
of size R x D outlives either pass.

Letters: T tokens, D hidden, F expert width, E experts, R rows.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dvpa_kernels.routing import COLUMNS, RowRouting
from dvpa_kernels.tuning import Plan, find_plan

try:
    from dvpa_kernels.gather_sum import gather_sum
    from dvpa_kernels.grouped_gemm import is_interpreted, packed_matmul, up_projection
    from dvpa_kernels.grouped_gemm_backward import activation_gradient, weight_gradient
    from dvpa_kernels.tiles import build_tiles
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "triton":
        raise
    HAS_TRITON = False
else:
    HAS_TRITON = True

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def moe_mlp_triton(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, routing: RowRouting
) -> Tensor:
    """As `moe_mlp_reference`, on a CUDA GPU; deterministic, without host synchronisation.

    Differentiable once in x, both weights and `routing.weight`. Can be captured in a CUDA graph
    after one warm-up call (which compiles), and is one operator under `torch.compile`.

    Args:
        x_TD: fp32, bf16 or fp16; accumulated in fp32.
        gate_up_E2FD, down_EDF: in the dtype of x, contiguous.
        routing: its weight may have any floating dtype.

    Raises:
        RuntimeError: Triton is not installed, or x is not on a CUDA device (and the interpreter
            is off).
        ValueError: a dtype the kernels do not have.
    """
    require_triton(x_TD)
    if x_TD.dtype not in DTYPES:
        raise ValueError(f"x: dtype {x_TD.dtype} must be float32, bfloat16 or float16")
    wanted = (x_TD, gate_up_E2FD, down_EDF, routing.weight)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
    out_TD: Tensor = triton_moe_mlp(x_TD, gate_up_E2FD, down_EDF, keep, *routing.columns)[0]
    return out_TD


def require_triton(x: Tensor) -> None:
    """Raise RuntimeError, naming what is missing, unless the kernels can run on x."""
    if not HAS_TRITON:
        raise RuntimeError(
            "backend 'triton': the package triton is not installed (it comes with PyTorch for "
            "CUDA on Linux); use the backend 'cpu' or 'torch'"
        )
    if not x.is_cuda and not is_interpreted():
        raise RuntimeError(
            f"backend 'triton': x is on {x.device}, the kernels need a CUDA device; use the "
            "backend 'cpu' or 'torch', or set TRITON_INTERPRET=1 before the first import to step "
            "through them slowly"
        )


def forward_rows(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    routing: RowRouting,
    plan: Plan,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(y [T, D], h [R, 2F] if `keep` else empty) with the launches of `plan`."""
    rows, width = routing.token_index.shape[0], down_EDF.shape[2]
    if rows == 0 or x_TD.numel() == 0:
        return torch.zeros_like(x_TD), x_TD.new_empty((rows, 2 * width) if keep else 0)
    x_TD = x_TD.contiguous()
    tiles = build_tiles(routing.expert_offsets, rows, plan.rows)
    act_RF, h_R2F = up_projection(
        x_TD, gate_up_E2FD, routing.token_index, tiles, plan.up, plan.rows, keep
    )
    out_RD = packed_matmul(act_RF, down_EDF, tiles, plan.down, plan.rows, transposed=True)
    y_TD = gather_sum(
        out_RD, routing.weight.contiguous(), routing.token_rows, routing.token_offsets
    )
    return y_TD, h_R2F


def backward_rows(
    grad_TD: Tensor,
    x_TD: Tensor,
    h_R2F: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    routing: RowRouting,
    plan: Plan,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_gate_up, w_down and weight; the first three empty where not in `need`."""
    need_x, need_gate_up, need_down = need
    d_x, d_gate_up, d_down = (x_TD.new_empty(0) for _ in need)
    rows = routing.token_index.shape[0]
    if rows == 0 or x_TD.numel() == 0:
        d_x, d_gate_up, d_down = (
            torch.zeros_like(value) if wanted else value.new_empty(0)
            for value, wanted in zip((x_TD, gate_up_E2FD, down_EDF), need, strict=True)
        )
        return d_x, d_gate_up, d_down, torch.zeros_like(routing.weight)
    grad_TD, x_TD = grad_TD.contiguous(), x_TD.contiguous()  # `.sum()` sends an expanded scalar
    tiles = build_tiles(routing.expert_offsets, rows, plan.grad_rows)
    d_h_R2F, weighted_RF, d_weight_R = activation_gradient(
        grad_TD,
        down_EDF,
        h_R2F,
        routing.weight.contiguous(),
        routing.token_index,
        tiles,
        plan.grad_act,
        plan.grad_rows,
    )
    offsets = routing.expert_offsets
    if need_down:
        d_down = weight_gradient(
            grad_TD, weighted_RF, routing.token_index, offsets, plan.grad_weight, gather_left=True
        )
    del weighted_RF  # before the packed gradient of x is allocated
    if need_gate_up:
        d_gate_up = weight_gradient(
            d_h_R2F, x_TD, routing.token_index, offsets, plan.grad_weight, gather_left=False
        )
    if need_x:
        d_x_RD = packed_matmul(
            d_h_R2F, gate_up_E2FD, tiles, plan.grad_x, plan.grad_rows, transposed=False
        )
        del d_h_R2F
        d_x = gather_sum(d_x_RD, None, routing.token_rows, routing.token_offsets)
    return d_x, d_gate_up, d_down, d_weight_R.to(routing.weight.dtype)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@torch.library.custom_op(
    "dvpa_kernels::triton_moe_mlp",
    mutates_args=(),
    schema=f"(Tensor x, Tensor w_gate_up, Tensor w_down, bool keep, {COLUMNS}) -> (Tensor, Tensor)",
)
def triton_moe_mlp(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, keep: bool, *columns: Tensor
) -> tuple[Tensor, Tensor]:
    """`forward_rows` by the tuned plan, with the routing spread out: one node when compiled."""
    routing = RowRouting.of_columns(columns, x.shape[0])
    plan = find_plan(x, w_down, routing.token_index.shape[0])
    with _on(x):
        return forward_rows(x, w_gate_up, w_down, routing, plan, keep)


@triton_moe_mlp.register_fake
def _(
    x: Tensor, w_gate_up: Tensor, _w_down: Tensor, keep: bool, weight: Tensor, *_rest: Tensor
) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[0], w_gate_up.shape[1]) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(shape)


@torch.library.custom_op(
    "dvpa_kernels::triton_moe_mlp_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor h, Tensor w_gate_up, Tensor w_down, bool need_x, "
    f"bool need_gate_up, bool need_down, {COLUMNS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def triton_moe_mlp_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    need_x: bool,
    need_gate_up: bool,
    need_down: bool,
    *columns: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward_rows` by the tuned plan; has no gradient of its own."""
    routing = RowRouting.of_columns(columns, x.shape[0])
    plan = find_plan(x, w_down, routing.token_index.shape[0])
    need = (need_x, need_gate_up, need_down)
    with _on(x):
        return backward_rows(grad, x, h, w_gate_up, w_down, routing, plan, need)


@triton_moe_mlp_backward.register_fake
def _(
    _grad: Tensor,
    x: Tensor,
    _h: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    need_x: bool,
    need_gate_up: bool,
    need_down: bool,
    weight: Tensor,
    *_rest: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(w_gate_up.shape if need_gate_up else 0),
        x.new_empty(w_down.shape if need_down else 0),
        weight.new_empty(weight.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # else a zero gradient for h is allocated
    x, w_gate_up, w_down, _keep, *columns = inputs
    ctx.save_for_backward(x, output[1], w_gate_up, w_down, *columns)


def _backward(ctx: Any, grad: Tensor | None, _grad_h: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    x, h, w_gate_up, w_down, *columns = ctx.saved_tensors
    need_x, need_gate_up, need_down, _, need_weight, *_ = ctx.needs_input_grad
    d_x, d_gate_up, d_down, d_weight = triton_moe_mlp_backward(
        grad, x, h, w_gate_up, w_down, need_x, need_gate_up, need_down, *columns
    )
    return (
        d_x if need_x else None,
        d_gate_up if need_gate_up else None,
        d_down if need_down else None,
        None,
        d_weight if need_weight else None,
        *(None,) * 4,
    )


triton_moe_mlp.register_autograd(_backward, setup_context=_save)
