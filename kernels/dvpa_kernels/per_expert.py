"""Training on a CPU: one expert after the other, over buffers that stay in the caches.

`F.grouped_mm` under autograd writes every intermediate of all rows to memory, [R, D] and [R, F] a
dozen times over; with a large top_k that takes longer than the products. Here the intermediates of
a block of rows are used up before the next block's overwrite them, and of all rows only h [R, 2F]
is kept for the backward pass. The products are PyTorch's; what lies between them is one compiled
pass over memory where there is a compiler (`cpu/train.py`), PyTorch's operators elsewhere.

The gradient of a row's weight is grad . (w_down act) = (grad w_down) . act: no product of its own.

Letters: T tokens, D hidden, F expert width, E experts, R rows, N rows of one expert, B of a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dvpa_kernels.routing import RowRouting

BLOCK_ROWS = 1024  # at most

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


class RowOps:
    """What happens to a block of an expert's rows between its products; any dtype, sums in fp32."""

    def gather(self, source_TD: Tensor, token_B: Tensor, out_BD: Tensor) -> None:
        """out[b] = source[token[b]]."""
        torch.index_select(source_TD, 0, token_B, out=out_BD)

    def add(
        self, sums_TD: Tensor, token_B: Tensor, values_BD: Tensor, weight_B: Tensor | None
    ) -> None:
        """sums[token[b]] += weight[b] * values[b]; None: ones."""
        if weight_B is not None:
            values_BD = values_BD * weight_B[:, None]
        sums_TD.index_add_(0, token_B, values_BD.to(sums_TD.dtype))

    def activation(self, h_B2F: Tensor, act_BF: Tensor) -> None:
        """act = silu(gate) * up; h holds both, gate first."""
        width = act_BF.shape[1]
        _silu(h_B2F[:, :width], out=act_BF).mul_(h_B2F[:, width:])

    def slope(self, h_B2F: Tensor, d_act_BF: Tensor, weight_B: Tensor, *out: Tensor) -> None:
        """What the activation and the row's weight send back.

        Args:
            d_act_BF: grad . w_down, before the weight.
            out: written: act [B, F] = weight * silu(gate) * up, the gradient of h [B, 2F], and
                d_weight [B] = d_act . silu(gate) * up.
        """
        act_BF, d_h_B2F, d_weight_B = out
        width = act_BF.shape[1]
        gate_BF, up_BF = h_B2F[:, :width], h_B2F[:, width:]
        silu_BF = torch.ops.aten.silu(gate_BF)
        torch.mul(silu_BF, up_BF, out=act_BF)
        torch.sum(d_act_BF.to(d_weight_B.dtype) * act_BF, -1, out=d_weight_B)
        act_BF.mul_(weight_B[:, None])
        d_act_BF = (d_act_BF * weight_B[:, None]).to(act_BF.dtype)
        _silu_backward(d_act_BF * up_BF, gate_BF, grad_input=d_h_B2F[:, :width])
        torch.mul(d_act_BF, silu_BF, out=d_h_B2F[:, width:])


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
    ops: RowOps, x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, routing: RowRouting
) -> tuple[Tensor, list[Tensor]]:
    """(y [T, D], h [N, 2F] of each expert that has rows); sums over a token's experts are fp32.

    h is not one tensor: memory of its size would come fresh from the system at every step, a fault
    a page, where the pieces come from what the last step gave back.
    """
    hidden, width = down_EDF.shape[1:]
    experts = list(_used(routing))
    scratch = _Buffers(x_TD, _largest_block(experts), hidden, width, hidden)
    x_TD = x_TD.contiguous()
    kept = []
    y_TD = torch.zeros_like(x_TD, dtype=_sum_dtype(x_TD))
    for expert in experts:
        up_D2F, down_FD = gate_up_E2FD[expert.number].t(), down_EDF[expert.number].t()
        first = expert.rows.start
        h_N2F = x_TD.new_empty(expert.rows.stop - first, 2 * width)
        kept.append(h_N2F)
        for rows in expert.blocks:
            x_BD, act_BF, out_BD = scratch(slice(rows.stop - rows.start))
            token_B = routing.token_index[rows]
            h_B2F = h_N2F[rows.start - first : rows.stop - first]
            ops.gather(x_TD, token_B, x_BD)
            torch.mm(x_BD, up_D2F, out=h_B2F)
            ops.activation(h_B2F, act_BF)
            torch.mm(act_BF, down_FD, out=out_BD)
            ops.add(y_TD, token_B, out_BD, routing.weight[rows])
    return y_TD.to(x_TD.dtype), kept


def backward_rows(
    ops: RowOps,
    grad_TD: Tensor,
    x_TD: Tensor,
    kept: Sequence[Tensor],
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    routing: RowRouting,
    need: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_gate_up, w_down and routing.weight, those in `need`."""
    hidden, width = down_EDF.shape[1:]
    experts = list(_used(routing))
    scratch = _Buffers(
        x_TD, _largest_block(experts), hidden, hidden, width, width, 2 * width, hidden
    )
    x_TD = x_TD.contiguous()
    grad_TD = grad_TD.contiguous()  # `.sum()` sends an expanded scalar
    d_x, d_gate_up, d_down = (
        torch.zeros_like(value) if wanted else None
        for value, wanted in zip((x_TD, gate_up_E2FD, down_EDF), need, strict=False)
    )
    if d_x is not None:
        d_x = d_x.to(_sum_dtype(x_TD))
    d_weight = torch.empty_like(routing.weight)
    for expert, h_N2F in zip(experts, kept, strict=True):
        gate_up_2FD, down_DF = gate_up_E2FD[expert.number], down_EDF[expert.number]
        first = expert.rows.start
        for rows in expert.blocks:
            x_BD, grad_BD, act_BF, d_act_BF, d_h_B2F, d_x_BD = scratch(
                slice(rows.stop - rows.start)
            )
            h_B2F = h_N2F[rows.start - first : rows.stop - first]
            token_B, weight_B = routing.token_index[rows], routing.weight[rows]
            ops.gather(grad_TD, token_B, grad_BD)
            torch.mm(grad_BD, down_DF, out=d_act_BF)
            ops.slope(h_B2F, d_act_BF, weight_B, act_BF, d_h_B2F, d_weight[rows])
            if d_down is not None:
                d_down[expert.number].addmm_(grad_BD.t(), act_BF)
            if d_gate_up is not None:
                ops.gather(x_TD, token_B, x_BD)
                d_gate_up[expert.number].addmm_(d_h_B2F.t(), x_BD)
            if d_x is not None:
                torch.mm(d_h_B2F, gate_up_2FD, out=d_x_BD)
                ops.add(d_x, token_B, d_x_BD, None)
    d_x = None if d_x is None else d_x.to(x_TD.dtype)
    return d_x, d_gate_up, d_down, d_weight if need[3] else None


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
    def forward(
        ctx: Any, ops: RowOps, x: Tensor, w_gate_up: Tensor, w_down: Tensor, *columns: Tensor
    ) -> Tensor:
        """As `moe_mlp`; the columns of a routing without padding."""
        routing = RowRouting.of_columns(columns, x.shape[0])
        y, kept = forward_rows(ops, x, w_gate_up, w_down, routing)
        ctx.ops, ctx.used = ops, len(kept)
        ctx.save_for_backward(x, w_gate_up, w_down, *columns, *kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """As `backward_rows`."""
        x, w_gate_up, w_down, *rest = ctx.saved_tensors
        columns, kept = rest[: -ctx.used or None], rest[len(rest) - ctx.used :]
        routing = RowRouting.of_columns(columns, x.shape[0])
        need = ctx.needs_input_grad[1:5]
        found = backward_rows(ctx.ops, grad, x, kept, w_gate_up, w_down, routing, need)
        return (None, *found, None, None, None, None)
