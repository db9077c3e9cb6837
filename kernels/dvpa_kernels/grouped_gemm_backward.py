"""The backward kernels of the grouped expert MLP: dSwiGLU and the weight gradients.

From x and the pre-activation h alone. The gradient of a row's weight is <dOut w_down, act>, a
by-product of the activation's gradient, so the rows' outputs are not needed again.

Letters: T tokens, D hidden, F expert width, E experts, R rows; BM rows, BN and BK columns of a
block; I and J the two sides of a weight gradient.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from dvpa_kernels.grouped_gemm import dot, inputs_block, numerics, operand, row_block
from dvpa_kernels.tiles import locate
from dvpa_kernels.tuning import Launch


def activation_gradient(
    grad_TD: Tensor,
    down_EDF: Tensor,
    h_R2F: Tensor,
    weight_R: Tensor,
    token_index: Tensor,
    tiles: Tensor,
    launch: Launch,
    block_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients behind the down-projection, from the gradient of the output.

    Returns:
        d_h [R, 2F] of the pre-activation; act * weight [R, F], which the gradient of w_down needs;
        d_weight [R] fp32, zero on padding rows. The first two leave padding rows as allocated.
    """
    experts, hidden, width = down_EDF.shape
    rows, bound = token_index.shape[0], tiles.shape[1]
    blocks = triton.cdiv(width, launch.block_n)
    d_h_R2F = torch.empty_like(h_R2F)
    weighted_RF = h_R2F.new_empty(rows, width)
    # One line per column block and a sum in fixed order: no atomics.
    parts_BR = torch.zeros(blocks, rows, dtype=torch.float32, device=h_R2F.device)
    flat = down_EDF.view(experts * hidden, width)
    weights, tma = flat, False
    if hidden % launch.block_k == 0:  # else a block would meet the next expert's values
        weights, tma = operand(flat, (launch.block_k, launch.block_n), launch)
    activation_gradient_kernel[(bound * blocks,)](
        grad_TD,
        weights,
        h_R2F,
        weight_R,
        d_h_R2F,
        weighted_RF,
        parts_BR,
        token_index,
        tiles,
        bound,
        rows,
        D=hidden,
        F=width,
        BM=block_rows,
        BN=launch.block_n,
        BK=launch.block_k,
        GROUP=launch.group,
        TMA=tma,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **numerics(h_R2F.dtype),
    )
    return d_h_R2F, weighted_RF, parts_BR.sum(0)


def weight_gradient(
    left: Tensor,
    right: Tensor,
    token_index: Tensor,
    expert_offsets: Tensor,
    launch: Launch,
    gather_left: bool,
) -> Tensor:
    """`out[e] = sum over the rows r of e of left[r]^T right[r]`: [E, I, J], zero without rows.

    One of the two is [T, .] and is gathered by token, the other is packed [R, .].
    """
    experts = expert_offsets.shape[0] - 1
    out_EIJ = left.new_empty(experts, left.shape[1], right.shape[1])
    blocks_i = triton.cdiv(left.shape[1], launch.block_m)
    blocks_j = triton.cdiv(right.shape[1], launch.block_n)
    weight_gradient_kernel[(experts * blocks_i * blocks_j,)](
        left,
        right,
        out_EIJ,
        token_index,
        expert_offsets,
        INNER_I=left.shape[1],
        INNER_J=right.shape[1],
        BI=launch.block_m,
        BJ=launch.block_n,
        BK=launch.block_k,
        GROUP=launch.group,
        GATHER_LEFT=gather_left,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **numerics(left.dtype),
    )
    return out_EIJ


@triton.jit
def activation_gradient_kernel(
    grad_TD,
    down,
    h_R2F,
    weight_R,
    d_h_R2F,
    weighted_RF,
    parts_BR,
    token_index,
    tiles,
    bound,
    total_rows,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows times BN columns of F: dOut w_down, then the derivative of SwiGLU."""
    expert, first, rows, block = locate(tiles, bound, tl.cdiv(F, BN), GROUP)
    if rows == 0:
        return
    rm = tl.arange(0, BM)
    live = rm < rows
    token = tl.load(token_index + first + rm, mask=live, other=0)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        a = row_block(grad_TD, token, k, D, BK)
        b = inputs_block(down, expert * D, k, block * BN, D, F, BN, BK, TMA)
        acc = dot(a, b, acc, UPCAST, PRECISION)
    row = (first + rm).to(tl.int64)
    weight = tl.load(weight_R + row, mask=live, other=0.0).to(tl.float32)
    # Half by half: gate, up and the accumulator of all columns together would spill registers.
    halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
    acc_0, acc_1 = tl.split(halves)
    part = swiglu_gradient(
        acc_0, weight, h_R2F, d_h_R2F, weighted_RF, row, live, block * BN, F, BN // 2
    )
    part += swiglu_gradient(
        acc_1, weight, h_R2F, d_h_R2F, weighted_RF, row, live, block * BN + BN // 2, F, BN // 2
    )
    tl.store(parts_BR + block.to(tl.int64) * total_rows + row, part, mask=live)


@triton.jit
def swiglu_gradient(
    acc,
    weight,
    h_R2F,
    d_h_R2F,
    weighted_RF,
    row,
    live,
    column,
    F: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store d_h and act * weight for COLUMNS columns from `column` on; return <acc, act> per row.

    acc [BM, COLUMNS] is dOut w_down, zero past F; the gradient of act is `weight` times that.
    """
    rn = column + tl.arange(0, COLUMNS)
    mask = live[:, None] & (rn < F)[None, :]
    half = row[:, None] * (2 * F) + rn[None, :]
    gate = tl.load(h_R2F + half, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_R2F + half + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * up
    dtype = d_h_R2F.dtype.element_ty
    weighted = act * weight[:, None]
    tl.store(weighted_RF + row[:, None] * F + rn[None, :], weighted.to(dtype), mask=mask)
    part = tl.sum(acc * act, 1)
    d_act = acc * weight[:, None]
    tl.store(d_h_R2F + half + F, (d_act * silu).to(dtype), mask=mask)
    d_gate = d_act * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(d_h_R2F + half, d_gate.to(dtype), mask=mask)
    return part


@triton.jit
def weight_gradient_kernel(
    left,
    right,
    out_EIJ,
    token_index,
    expert_offsets,
    INNER_I: tl.constexpr,
    INNER_J: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One [BI, BJ] block of one expert's gradient: a loop over that expert's rows, in order."""
    # Spelt out: what `tl.cdiv` returns in Triton 3.6 cannot be multiplied.
    blocks_i: tl.constexpr = (INNER_I + BI - 1) // BI
    blocks_j: tl.constexpr = (INNER_J + BJ - 1) // BJ
    pid = tl.program_id(0)
    blocks: tl.constexpr = blocks_i * blocks_j
    expert = pid // blocks
    inside = pid % blocks
    # GROUP blocks of I go through all blocks of J together and share them in L2.
    span: tl.constexpr = GROUP * blocks_j
    head = inside // span * GROUP
    size = tl.minimum(blocks_i - head, GROUP)
    ri = (head + inside % span % size) * BI + tl.arange(0, BI)
    rj = (inside % span // size) * BJ + tl.arange(0, BJ)
    low = tl.load(expert_offsets + expert)
    high = tl.load(expert_offsets + expert + 1)
    acc = tl.zeros((BI, BJ), tl.float32)
    for start in range(low, high, BK):
        row = start + tl.arange(0, BK)
        live = row < high
        token = tl.load(token_index + row, mask=live, other=0)
        row = row.to(tl.int64)
        if GATHER_LEFT:
            left_row, right_row = token, row
        else:
            left_row, right_row = row, token
        # Both sides are masked: zero times a NaN of another row would not be zero.
        a = tl.load(
            left + left_row[:, None] * INNER_I + ri[None, :],
            mask=live[:, None] & (ri < INNER_I)[None, :],
            other=0.0,
        )
        b = tl.load(
            right + right_row[:, None] * INNER_J + rj[None, :],
            mask=live[:, None] & (rj < INNER_J)[None, :],
            other=0.0,
        )
        acc = dot(tl.trans(a), b, acc, UPCAST, PRECISION)
    out = out_EIJ + expert.to(tl.int64) * INNER_I * INNER_J + ri[:, None] * INNER_J + rj[None, :]
    mask = (ri < INNER_I)[:, None] & (rj < INNER_J)[None, :]
    tl.store(out, acc.to(out_EIJ.dtype.element_ty), mask=mask)
