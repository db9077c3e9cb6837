"""The portable backend: `F.grouped_mm` over rows sorted by expert, on any device PyTorch runs on.

Letters: T tokens, D hidden, F expert width, E experts, R rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa_kernels.reference import moe_mlp_reference
from dvpa_kernels.routing import COLUMNS, RowRouting

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_ALIGNMENT = 16  # bytes; what grouped_mm asks of every row


def moe_mlp_torch(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, routing: RowRouting
) -> Tensor:
    """As `moe_mlp_reference`, with two grouped GEMMs; differentiable in every floating input.

    What `grouped_mm` refuses (no rows, rows of an odd size, fp64) goes to the reference itself.
    """
    widths = (x_TD.shape[1] * x_TD.itemsize, down_EDF.shape[2] * x_TD.itemsize)
    aligned = not any(width % ROW_ALIGNMENT for width in widths)
    if torch.compiler.is_compiling() and not (aligned and x_TD.dtype == torch.bfloat16):
        # The tracer's own stand-in for `grouped_mm` knows bf16 only (2.13), and the reference
        # reads its offsets back: one operator hides both.
        y_TD: Tensor = torch_moe_mlp(x_TD, gate_up_E2FD, down_EDF, *routing.columns)
        return y_TD
    if not aligned or x_TD.dtype not in GROUPED_DTYPES or routing.token_index.numel() == 0:
        return moe_mlp_reference(x_TD, gate_up_E2FD, down_EDF, routing)
    ends_E = routing.expert_offsets[1:]
    x_RD = x_TD.index_select(0, routing.token_index)
    padded = x_TD.device.type != "cpu" or torch.compiler.is_compiling()
    if padded:
        # grouped_mm leaves padding rows as it found them, forwards and backwards, and zero times
        # NaN is NaN. So they are cut off at both ends.
        real_R1 = (torch.arange(len(x_RD), device=x_RD.device) < ends_E[-1])[:, None]
        x_RD = torch.where(real_R1, x_RD, 0.0)
    gate_RF, up_RF = F.grouped_mm(x_RD, gate_up_E2FD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    out_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, down_EDF.transpose(1, 2), offs=ends_E)
    if padded:
        out_RD = torch.where(real_R1, out_RD, 0.0)
    weighted_RD = (out_RD * routing.weight[:, None]).to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, routing.token_index, weighted_RD)


def _received(x: Tensor, columns: Sequence[Tensor]) -> RowRouting:
    routing = RowRouting.of_columns(columns, x.shape[0])
    return routing.without_padding() if x.device.type == "cpu" else routing


@torch.library.custom_op(
    "dvpa_kernels::torch_moe_mlp",
    mutates_args=(),
    schema=f"(Tensor x, Tensor w_gate_up, Tensor w_down, {COLUMNS}) -> Tensor",
)
def torch_moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, *columns: Tensor) -> Tensor:
    """`moe_mlp_torch` as one node of a graph."""
    return moe_mlp_torch(x, w_gate_up, w_down, _received(x, columns))


@torch_moe_mlp.register_fake
def _(x: Tensor, *_rest: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "dvpa_kernels::torch_moe_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor w_gate_up, Tensor w_down, {COLUMNS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def torch_moe_mlp_backward(
    grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, *columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_gate_up, w_down and weight; recomputes the activations from x."""
    # By hand: an operator's own body is not recorded by autograd.
    routing, weight = _received(x, columns), columns[0]
    token_R = routing.token_index
    x_RD, grad_RD = x[token_R], grad.contiguous()[token_R]
    gate_RF, up_RF = _per_expert(x_RD, w_gate_up.transpose(1, 2), routing).chunk(2, dim=-1)
    act_RF = F.silu(gate_RF) * up_RF
    grad_act_RF = _per_expert(grad_RD, w_down, routing)  # before the weight
    grad_weight = torch.zeros_like(weight)
    real = (grad_act_RF.float() * act_RF.float()).sum(-1)
    grad_weight[: len(real)] = real.to(weight.dtype)
    scale_R1 = routing.weight[:, None].to(x.dtype)
    grad_act_RF = grad_act_RF * scale_R1
    sigmoid_RF = gate_RF.sigmoid()
    slope_RF = sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    grad_h_RF = torch.cat((grad_act_RF * up_RF * slope_RF, grad_act_RF * F.silu(gate_RF)), -1)
    grad_down, grad_gate_up = torch.zeros_like(w_down), torch.zeros_like(w_gate_up)
    bounds = routing.expert_offsets.tolist()
    for expert in range(routing.num_experts):
        rows = slice(bounds[expert], bounds[expert + 1])
        torch.mm((grad_RD[rows] * scale_R1[rows]).T, act_RF[rows], out=grad_down[expert])
        torch.mm(grad_h_RF[rows].T, x_RD[rows], out=grad_gate_up[expert])
    grad_x_RD = _per_expert(grad_h_RF, w_gate_up, routing)
    rows = bounds[-1]  # padding is not summed
    grad_x = torch.zeros_like(x).index_add(0, token_R[:rows], grad_x_RD[:rows])
    return grad_x, grad_gate_up, grad_down, grad_weight


def _per_expert(rows_RA: Tensor, weight_EAB: Tensor, routing: RowRouting) -> Tensor:
    """Each row times its expert's matrix, [R, B]; rows past the last expert are zero."""
    out_RB = rows_RA.new_zeros(len(rows_RA), weight_EAB.shape[2])
    bounds = routing.expert_offsets.tolist()
    for expert in range(routing.num_experts):
        rows = slice(bounds[expert], bounds[expert + 1])
        torch.mm(rows_RA[rows], weight_EAB[expert], out=out_RB[rows])
    return out_RB


@torch_moe_mlp_backward.register_fake
def _(
    _grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weight: Tensor, *_rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = [torch.empty_like(value) for value in (x, w_gate_up, w_down, weight)]
    return like[0], like[1], like[2], like[3]


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch_moe_mlp_backward(grad, *ctx.saved_tensors), None, None, None, None)


torch_moe_mlp.register_autograd(_backward, setup_context=_keep_inputs)
