"""The FP8 kernels: quantise rows, then the two grouped GEMMs with block scales.

Letters: T tokens, D hidden, F expert width, E experts, R rows; BM rows, BN columns of a block.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dvpa_kernels.gather_sum import gather_sum
from dvpa_kernels.grouped_gemm import is_interpreted
from dvpa_kernels.routing import RowRouting
from dvpa_kernels.tiles import build_tiles, locate
from dvpa_kernels.tuning import bucket_of

BLOCK = 128
QUANTISED_ROWS = 8


def tile_rows(rows: int, experts: int) -> int:
    """BM: 16 for decode; the accumulator and its scaled copy allow no more than 64."""
    return 16 if bucket_of(rows, experts) <= 16 else 64


def forward_rows_fp8(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    gate_up_scale: Tensor,
    down_EDF: Tensor,
    down_scale: Tensor,
    routing: RowRouting,
) -> Tensor:
    """y [T, D] in the dtype of x; shapes as in `moe_mlp_fp8`."""
    experts, hidden, width = down_EDF.shape
    rows = routing.token_index.shape[0]
    if rows == 0 or x_TD.numel() == 0:
        return torch.zeros_like(x_TD)
    block_rows = tile_rows(rows, experts)
    with torch.cuda.device(x_TD.device) if x_TD.is_cuda else nullcontext():
        codes_TD, scale_Td = quantise(x_TD.contiguous())
        tiles = build_tiles(routing.expert_offsets, rows, block_rows)
        bound = tiles.shape[1]
        act_RF = gate_up_E2FD.new_empty(rows, width)
        act_scale_Rf = x_TD.new_empty(rows, triton.cdiv(width, BLOCK), dtype=torch.float32)
        settings = {"BM": block_rows, "num_warps": 4 if block_rows == 16 else 8, "num_stages": 4}
        fp8_up_kernel[(bound * triton.cdiv(width, BLOCK),)](
            codes_TD,
            scale_Td,
            gate_up_E2FD,
            gate_up_scale,
            act_RF,
            act_scale_Rf,
            routing.token_index,
            tiles,
            bound,
            D=hidden,
            F=width,
            ROUND=is_interpreted(),
            **settings,
        )
        out_RD = x_TD.new_empty(rows, hidden)
        fp8_down_kernel[(bound * triton.cdiv(hidden, BLOCK),)](
            act_RF,
            act_scale_Rf,
            down_EDF,
            down_scale,
            out_RD,
            tiles,
            bound,
            D=hidden,
            F=width,
            **settings,
        )
        weight_R = routing.weight.contiguous()
        return gather_sum(out_RD, weight_R, routing.token_rows, routing.token_offsets)


def quantise(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8.quantise_rows` in one kernel: E4M3 [T, D], fp32 [T, ceil(D / 128)]."""
    tokens, hidden = x_TD.shape
    wide = triton.cdiv(hidden, BLOCK)
    codes_TD = torch.empty_like(x_TD, dtype=torch.float8_e4m3fn)
    scale_Td = x_TD.new_empty(tokens, wide, dtype=torch.float32)
    quantise_kernel[(triton.cdiv(tokens, QUANTISED_ROWS), wide)](
        x_TD, codes_TD, scale_Td, tokens, D=hidden, BT=QUANTISED_ROWS, ROUND=is_interpreted()
    )
    return codes_TD, scale_Td


@triton.jit
def encode(block, ROUND: tl.constexpr):
    """(E4M3 codes, fp32 scales) of the rows of an fp32 block of 128 columns.

    ROUND: round to four significant bits before the cast. The interpreter's own cast loses the
    carry of a mantissa that rounds up to the next power of two.
    """
    scale = tl.maximum(tl.max(tl.abs(block), 1), 1e-12) / 448.0
    # Division may round past the largest number, which E4M3 would store as NaN.
    codes = tl.minimum(tl.maximum(block / scale[:, None], -448.0), 448.0)
    if ROUND:
        shifted = codes * 1048577.0  # 2^20 + 1: Dekker's split at 4 of 24 bits
        normal = shifted - (shifted - codes)
        subnormal = (codes + 24576.0) - 24576.0  # 1.5 * 2^14: steps of 2^-9
        codes = tl.where(tl.abs(codes) < 0.015625, subnormal, normal)
    return codes.to(tl.float8e4nv), scale


@triton.jit
def quantise_kernel(
    x_TD,
    codes_TD,
    scale_Td,
    tokens,
    D: tl.constexpr,
    BT: tl.constexpr,
    ROUND: tl.constexpr,
):
    """BT tokens times 128 columns."""
    rt = tl.program_id(0) * BT + tl.arange(0, BT)
    rd = tl.program_id(1) * 128 + tl.arange(0, 128)
    live = rt < tokens
    mask = live[:, None] & (rd < D)[None, :]
    place = rt.to(tl.int64)[:, None] * D + rd[None, :]
    codes, scale = encode(tl.load(x_TD + place, mask=mask, other=0.0).to(tl.float32), ROUND)
    tl.store(codes_TD + place, codes, mask=mask)
    wide: tl.constexpr = tl.cdiv(D, 128)
    tl.store(scale_Td + rt.to(tl.int64) * wide + tl.program_id(1), scale, mask=live)


@triton.jit
def scaled_dot(
    acc, a, a_scale, w, w_scale, expert, row, rows, block_k, N: tl.constexpr, K: tl.constexpr
):
    """`acc + (a * a_scale) @ w^T` over 128 inputs: w's rows `row` .. + 127, of which `rows` count.

    `row` is counted inside the expert's [N, K] and need not start a scale block.
    """
    rn = row + tl.minimum(tl.arange(0, 128), rows - 1)
    rk = block_k * 128 + tl.arange(0, 128)
    base = w + expert.to(tl.int64) * N * K
    pointers = base + rn[None, :].to(tl.int64) * K + rk[:, None]
    whole: tl.constexpr = K % 128 == 0
    b = tl.load(pointers) if whole else tl.load(pointers, mask=(rk < K)[:, None], other=0.0)
    wide: tl.constexpr = tl.cdiv(K, 128)
    high: tl.constexpr = tl.cdiv(N, 128)
    b_scale = tl.load(w_scale + (expert * high + rn // 128) * wide + block_k)
    return acc + tl.dot(a, b) * (a_scale[:, None] * b_scale[None, :])


@triton.jit
def codes_block(codes, scale, row, block_k, K: tl.constexpr):
    """128 columns of the given rows of a quantised matrix [., K], and the rows' scales."""
    rk = block_k * 128 + tl.arange(0, 128)
    pointers = codes + row[:, None] * K + rk[None, :]
    whole: tl.constexpr = K % 128 == 0
    block = tl.load(pointers) if whole else tl.load(pointers, mask=(rk < K)[None, :], other=0.0)
    wide: tl.constexpr = tl.cdiv(K, 128)
    return block, tl.load(scale + row * wide + block_k)


@triton.jit
def fp8_up_kernel(
    codes_TD,
    scale_Td,
    gate_up,
    gate_up_scale,
    act_RF,
    act_scale_Rf,
    token_index,
    tiles,
    bound,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One tile of rows times 128 columns of both halves, SwiGLU, and its quantisation."""
    expert, first, rows, block = locate(tiles, bound, tl.cdiv(F, 128), 8)
    if rows == 0:
        return
    rm = tl.arange(0, BM)
    live = rm < rows
    token = tl.load(token_index + first + rm, mask=live, other=0)
    column = block * 128
    gate = tl.zeros((BM, 128), tl.float32)
    up = tl.zeros((BM, 128), tl.float32)
    for k in range(0, tl.cdiv(D, 128)):
        a, s = codes_block(codes_TD, scale_Td, token, k, D)
        gate = scaled_dot(
            gate, a, s, gate_up, gate_up_scale, expert, column, F - column, k, 2 * F, D
        )
        up = scaled_dot(
            up, a, s, gate_up, gate_up_scale, expert, F + column, F - column, k, 2 * F, D
        )
    rn = column + tl.arange(0, 128)
    mask = live[:, None] & (rn < F)[None, :]
    act = tl.where(mask, gate * tl.sigmoid(gate) * up, 0.0)
    codes, scale = encode(act, ROUND)
    row = (first + rm).to(tl.int64)
    tl.store(act_RF + row[:, None] * F + rn[None, :], codes, mask=mask)
    wide: tl.constexpr = tl.cdiv(F, 128)
    tl.store(act_scale_Rf + row * wide + block, scale, mask=live)


@triton.jit
def fp8_down_kernel(
    act_RF,
    act_scale_Rf,
    down,
    down_scale,
    out_RD,
    tiles,
    bound,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
):
    """One tile of packed rows times 128 columns of D."""
    expert, first, rows, block = locate(tiles, bound, tl.cdiv(D, 128), 8)
    if rows == 0:
        return
    rm = tl.arange(0, BM)
    row = (first + tl.minimum(rm, rows - 1)).to(tl.int64)
    column = block * 128
    acc = tl.zeros((BM, 128), tl.float32)
    for k in range(0, tl.cdiv(F, 128)):
        a, s = codes_block(act_RF, act_scale_Rf, row, k, F)
        acc = scaled_dot(acc, a, s, down, down_scale, expert, column, D - column, k, D, F)
    rn = column + tl.arange(0, 128)
    out = out_RD + (first + rm).to(tl.int64)[:, None] * D + rn[None, :]
    tl.store(out, acc.to(out_RD.dtype.element_ty), mask=(rm < rows)[:, None] & (rn < D)[None, :])
