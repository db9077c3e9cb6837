"""Grouped GEMMs over ragged rows in Triton: the forward pass, and what both passes share.

The gather is fused into the up-projection (a gathered copy of x would be k times x), SwiGLU into
its epilogue. The down-projection stores packed rows; `gather_sum` adds them up. Activations are
gathered through pointers (cp.async); weights and packed rows come through TMA where the GPU has it
and rows are whole multiples of 16 bytes.

Letters: T tokens, D hidden, F expert width, E experts, R rows, M tiles; BM rows, BN output columns
and BK input columns of a block.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dvpa_kernels.tiles import locate
from dvpa_kernels.tuning import Launch

TMA_CAPABILITY = 9  # Hopper; the interpreter has it too


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were imported: that decided it."""
    return not isinstance(up_kernel, triton.JITFunction)


def has_tma(matrix: Tensor) -> bool:
    """Whether the device of `matrix` has the copy engine that descriptors need."""
    if not matrix.is_cuda:
        return is_interpreted()
    return torch.cuda.get_device_capability(matrix.device)[0] >= TMA_CAPABILITY


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """The two compile-time switches of every dot.

    UPCAST: the interpreter multiplies the bit patterns of bf16, so there it is converted first.
    PRECISION: fp32 stays fp32, unless `torch.set_float32_matmul_precision` allowed tf32.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "UPCAST": is_interpreted() and dtype == torch.bfloat16,
        "PRECISION": "ieee" if exact else "tf32",
    }


def operand(matrix: Tensor, block: tuple[int, int], launch: Launch) -> tuple[Any, bool]:
    """A matrix [rows, columns] as a TMA descriptor and True, or as itself and False."""
    aligned = matrix.shape[-1] * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0
    if not (launch.tma and aligned and has_tma(matrix)):
        return matrix, False
    return TensorDescriptor.from_tensor(matrix, list(block)), True


def up_projection(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    token_index: Tensor,
    tiles: Tensor,
    launch: Launch,
    block_rows: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`silu(gate) * up` of every row, packed: act [R, F] and, if `keep`, the halves h [R, 2F].

    Padding rows are left as they were allocated. Without `keep`, h is empty.
    """
    experts, width, hidden = gate_up_E2FD.shape[0], gate_up_E2FD.shape[1] // 2, x_TD.shape[1]
    rows, bound = token_index.shape[0], tiles.shape[1]
    act_RF = x_TD.new_empty(rows, width)
    h_R2F = x_TD.new_empty((rows, 2 * width) if keep else 0)
    weights, tma = operand(
        gate_up_E2FD.view(experts * 2 * width, hidden), (launch.block_n, launch.block_k), launch
    )
    up_kernel[(bound * triton.cdiv(width, launch.block_n),)](
        x_TD,
        weights,
        act_RF,
        h_R2F,
        token_index,
        tiles,
        bound,
        D=hidden,
        F=width,
        BM=block_rows,
        BN=launch.block_n,
        BK=launch.block_k,
        GROUP=launch.group,
        TMA=tma,
        KEEP=keep,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **numerics(x_TD.dtype),
    )
    return act_RF, h_R2F


def packed_matmul(
    a_RK: Tensor,
    weight: Tensor,
    tiles: Tensor,
    launch: Launch,
    block_rows: int,
    transposed: bool,
) -> Tensor:
    """Packed rows times their expert's matrix -> [R, N]; padding rows stay as allocated.

    `transposed`: weight is [E, N, K] (the down-projection), else [E, K, N] (gradients).
    """
    experts, bound = weight.shape[0], tiles.shape[1]
    rows, inner = a_RK.shape
    columns = weight.shape[1] if transposed else weight.shape[2]
    out_RN = a_RK.new_empty(rows, columns)
    block_n, block_k = launch.block_n, launch.block_k
    flat = weight.view(experts * weight.shape[1], weight.shape[2])
    weights: Any = flat
    # A block of [E, K, N] that reaches past K would meet the next expert, whose zero-weighted
    # values may be NaN.
    tma = transposed or inner % block_k == 0
    if tma:
        weights, tma = operand(
            flat, (block_n, block_k) if transposed else (block_k, block_n), launch
        )
    packed: Any = a_RK
    if tma:
        packed, tma = operand(a_RK, (block_rows, block_k), launch)
        weights = weights if tma else flat
    matmul_kernel[(bound * triton.cdiv(columns, block_n),)](
        packed,
        weights,
        out_RN,
        tiles,
        bound,
        K=inner,
        N=columns,
        BM=block_rows,
        BN=block_n,
        BK=block_k,
        GROUP=launch.group,
        TMA=tma,
        TRANSPOSED=transposed,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **numerics(a_RK.dtype),
    )
    return out_RN


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + a @ b` in fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def row_block(base, row, k, K: tl.constexpr, BK: tl.constexpr):
    """[BM, BK] of a row-major matrix [., K] at the given rows; zero past K."""
    rk = k + tl.arange(0, BK)
    pointers = base + row[:, None] * K + rk[None, :]
    if K % BK == 0:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(rk < K)[None, :], other=0.0)
    return block


@triton.jit
def outputs_block(
    w, row, rows, k, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr
):
    """[BK, BN] for a weight whose rows are outputs: BN rows from `row` on, of which `rows` count.

    Columns of the block past `rows` hold something finite or not; their results are not stored.
    """
    if TMA:
        block = w.load([row, k]).T
    else:
        rn = row.to(tl.int64) + tl.minimum(tl.arange(0, BN), rows - 1)
        rk = k + tl.arange(0, BK)
        pointers = w + rn[None, :] * K + rk[:, None]
        if K % BK == 0:
            block = tl.load(pointers)
        else:
            block = tl.load(pointers, mask=(rk < K)[:, None], other=0.0)
    return block


@triton.jit
def inputs_block(
    w,
    row,
    k,
    n,
    K: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BK, BN] for a weight whose rows are inputs: rows `row` + k .. of [., N], zero past K, N."""
    if TMA:
        block = w.load([row + k, n])
    else:
        rk = k + tl.arange(0, BK)
        rn = n + tl.arange(0, BN)
        pointers = w + (row + rk).to(tl.int64)[:, None] * N + rn[None, :]
        if K % BK == 0 and N % BN == 0:
            block = tl.load(pointers)
        else:
            block = tl.load(pointers, mask=(rk < K)[:, None] & (rn < N)[None, :], other=0.0)
    return block


@triton.jit
def up_kernel(
    x_TD,
    gate_up,
    act_RF,
    h_R2F,
    token_index,
    tiles,
    bound,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    KEEP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows times BN columns of both halves, then SwiGLU."""
    expert, first, rows, block = locate(tiles, bound, tl.cdiv(F, BN), GROUP)
    if rows == 0:
        return
    rm = tl.arange(0, BM)
    live = rm < rows
    # Rows past the tile read token 0 instead of carrying a mask through the loop.
    token = tl.load(token_index + first + rm, mask=live, other=0)
    gate_row = expert * (2 * F) + block * BN
    left = F - block * BN
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        a = row_block(x_TD, token, k, D, BK)
        b = outputs_block(gate_up, gate_row, left, k, D, BN, BK, TMA)
        gate = dot(a, b, gate, UPCAST, PRECISION)
        b = outputs_block(gate_up, gate_row + F, left, k, D, BN, BK, TMA)
        up = dot(a, b, up, UPCAST, PRECISION)
    rn = block * BN + tl.arange(0, BN)
    mask = live[:, None] & (rn < F)[None, :]
    row = (first + rm).to(tl.int64)
    dtype = act_RF.dtype.element_ty
    if KEEP:
        h = h_R2F + row[:, None] * (2 * F) + rn[None, :]
        tl.store(h, gate.to(dtype), mask=mask)
        tl.store(h + F, up.to(dtype), mask=mask)
    act = gate * tl.sigmoid(gate) * up
    tl.store(act_RF + row[:, None] * F + rn[None, :], act.to(dtype), mask=mask)


@triton.jit
def matmul_kernel(
    a_RK,
    weight,
    out_RN,
    tiles,
    bound,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of packed rows times BN columns of its expert's matrix."""
    expert, first, rows, block = locate(tiles, bound, tl.cdiv(N, BN), GROUP)
    if rows == 0:
        return
    rm = tl.arange(0, BM)
    row = (first + tl.minimum(rm, rows - 1)).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = a_RK.load([first, k]) if TMA else row_block(a_RK, row, k, K, BK)
        if TRANSPOSED:
            b = outputs_block(weight, expert * N + block * BN, N - block * BN, k, K, BN, BK, TMA)
        else:
            b = inputs_block(weight, expert * K, k, block * BN, K, N, BN, BK, TMA)
        acc = dot(a, b, acc, UPCAST, PRECISION)
    rn = block * BN + tl.arange(0, BN)
    out = out_RN + (first + rm).to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(out, acc.to(out_RN.dtype.element_ty), mask=(rm < rows)[:, None] & (rn < N)[None, :])
