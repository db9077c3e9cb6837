"""Training on a CPU: one expert after the other, over buffers that stay in the caches.

`F.grouped_mm` under autograd writes every intermediate of all rows to memory, [R, D] and [R, F] a
dozen times over; with a large top_k that takes longer than the products. Here the intermediates of
a block of rows are used up before the next block's overwrite them, and of all rows only h [R, 2F]
is kept for the backward pass. The operations and their order are those of `moe_mlp_torch`: in fp32
the results are the same to the last bit where a row's product does not depend on the rows beside it
(MKL's does for up to three rows, so blocks are of equal size).

Letters: T tokens, D hidden, F expert width, E experts, R rows, N rows of one expert, B of a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dvpa_kernels.routing import RowRouting

BLOCK_ROWS = 512  # at most

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


@dataclass(frozen=True)
class _Expert:
    """An expert with rows: which one, its rows, and those rows in blocks."""

    number: int
    rows: slice
    blocks: tuple[slice, ...]


class _Buffers:
    """Scratch of so many rows, one tensor for each width; a block's are the first rows."""

    def __init__(self, like: Tensor, rows: int, *widths: int) -> None:
        self.whole = [like.new_empty(rows, width) for width in widths]

    def __call__(self, rows: slice) -> list[Tensor]:
        return [buffer[rows] for buffer in self.whole]


def forward_rows(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, routing: RowRouting
) -> tuple[Tensor, Tensor]:
    """(y [T, D], h [R, 2F]); sums over a token's experts are fp32 at least."""
    hidden, width = down_EDF.shape[1:]
    experts = list(_used(routing))
    scratch = _Buffers(x_TD, _largest_block(experts), hidden, width, hidden)
    h_R2F = x_TD.new_empty(routing.token_index.shape[0], 2 * width)
    y_TD = torch.zeros_like(x_TD, dtype=_sum_dtype(x_TD))
    for expert in experts:
        up_D2F, down_FD = gate_up_E2FD[expert.number].t(), down_EDF[expert.number].t()
        for rows in expert.blocks:
            x_BD, act_BF, out_BD = scratch(slice(rows.stop - rows.start))
            token_B, h_B2F = routing.token_index[rows], h_R2F[rows]
            torch.index_select(x_TD, 0, token_B, out=x_BD)
            torch.mm(x_BD, up_D2F, out=h_B2F)
            _silu(h_B2F[:, :width], out=act_BF).mul_(h_B2F[:, width:])
            torch.mm(act_BF, down_FD, out=out_BD)
            y_TD.index_add_(0, token_B, (out_BD * routing.weight[rows, None]).to(y_TD.dtype))
    return y_TD.to(x_TD.dtype), h_R2F


def backward_rows(
    grad_TD: Tensor,
    x_TD: Tensor,
    h_R2F: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    routing: RowRouting,
    need: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_gate_up, w_down and routing.weight, those in `need`."""
    hidden, width = down_EDF.shape[1:]
    experts = list(_used(routing))
    busiest = max((e.rows.stop - e.rows.start for e in experts), default=0)
    # What the weights' gradients sum over all rows of an expert, and what a block needs.
    of_expert = _Buffers(x_TD, busiest, hidden, hidden, width, 2 * width)
    scratch = _Buffers(x_TD, _largest_block(experts), width, width, width, hidden)
    grad_TD = grad_TD.contiguous()  # `.sum()` sends an expanded scalar
    d_x, d_gate_up, d_down, d_weight = (
        torch.zeros_like(value) if wanted else None
        for value, wanted in zip((x_TD, gate_up_E2FD, down_EDF, routing.weight), need, strict=True)
    )
    if d_x is not None:
        d_x = d_x.to(_sum_dtype(x_TD))
    for expert in experts:
        gate_up_2FD, down_DF = gate_up_E2FD[expert.number], down_EDF[expert.number]
        first = expert.rows.start
        for rows in expert.blocks:
            x_BD, grad_BD, act_BF, d_h_B2F = of_expert(slice(rows.start - first, rows.stop - first))
            silu_BF, d_act_BF, product_BF, out_BD = scratch(slice(rows.stop - rows.start))
            token_B, weight_B1 = routing.token_index[rows], routing.weight[rows, None]
            gate_BF, up_BF = h_R2F[rows, :width], h_R2F[rows, width:]
            torch.index_select(x_TD, 0, token_B, out=x_BD)
            torch.index_select(grad_TD, 0, token_B, out=grad_BD)
            _silu(gate_BF, out=silu_BF)
            torch.mul(silu_BF, up_BF, out=act_BF)
            if d_weight is not None:
                torch.mm(act_BF, down_DF.t(), out=out_BD)
                d_weight[rows] = (out_BD.to(d_weight.dtype) * grad_BD).sum(-1)
            grad_BD.mul_(weight_B1)
            torch.mm(grad_BD, down_DF, out=d_act_BF)
            torch.mul(d_act_BF, up_BF, out=product_BF)
            _silu_backward(product_BF, gate_BF, grad_input=d_h_B2F[:, :width])
            torch.mul(d_act_BF, silu_BF, out=d_h_B2F[:, width:])
            if d_x is not None:
                torch.mm(d_h_B2F, gate_up_2FD, out=out_BD)
                d_x.index_add_(0, token_B, out_BD.to(d_x.dtype))
        x_ND, grad_ND, act_NF, d_h_N2F = of_expert(slice(expert.rows.stop - first))
        if d_gate_up is not None:
            torch.mm(d_h_N2F.t(), x_ND, out=d_gate_up[expert.number])
        if d_down is not None:
            torch.mm(grad_ND.t(), act_NF, out=d_down[expert.number])
    return None if d_x is None else d_x.to(x_TD.dtype), d_gate_up, d_down, d_weight


def _used(routing: RowRouting) -> Iterator[_Expert]:
    bounds = routing.expert_offsets.tolist()
    for number in range(routing.num_experts):
        start, stop = bounds[number], bounds[number + 1]
        if stop > start:
            count = -(-(stop - start) // BLOCK_ROWS)
            edges = [start + (stop - start) * i // count for i in range(count + 1)]
            blocks = tuple(slice(a, b) for a, b in pairwise(edges))
            yield _Expert(number, slice(start, stop), blocks)


def _largest_block(experts: list[_Expert]) -> int:
    return max((rows.stop - rows.start for e in experts for rows in e.blocks), default=0)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class MoeMlpPerExpert(torch.autograd.Function):
    """`forward_rows` and `backward_rows` as one node of autograd, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_gate_up: Tensor, w_down: Tensor, *columns: Tensor) -> Tensor:
        """As `moe_mlp`; the columns of a routing without padding."""
        y, h = forward_rows(x, w_gate_up, w_down, RowRouting.of_columns(columns, x.shape[0]))
        ctx.save_for_backward(x, h, w_gate_up, w_down, *columns)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """As `backward_rows`."""
        x, h, w_gate_up, w_down, *columns = ctx.saved_tensors
        routing = RowRouting.of_columns(columns, x.shape[0])
        found = backward_rows(grad, x, h, w_gate_up, w_down, routing, ctx.needs_input_grad[:4])
        return (*found, None, None, None, None)
