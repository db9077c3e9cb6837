"""Packed rows -> tokens: every token sums its own rows, in slot order, without atomics.

Letters: T tokens, D hidden, R rows.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 8  # rows loaded at once: a token's rows wait for memory together, not in turn


def gather_sum(
    rows_RD: Tensor, weight_R: Tensor | None, token_rows: Tensor, token_offsets: Tensor
) -> Tensor:
    """`out[t] = sum over the rows r of token t of weight[r] * rows[r]`, in fp32, rounded once.

    Args:
        rows_RD: [R, D]; rows that no token names (padding) are never read.
        weight_R: [R] in any floating dtype, or None for ones.
        token_rows: int32 [R].
        token_offsets: int32 [T + 1].

    Returns:
        [T, D] in the dtype of `rows_RD`; a token without rows gets zeros.
    """
    tokens, hidden = token_offsets.shape[0] - 1, rows_RD.shape[1]
    out_TD = rows_RD.new_empty(tokens, hidden)
    if out_TD.numel() == 0:
        return out_TD
    block = min(512, max(16, triton.next_power_of_2(hidden)))
    gather_sum_kernel[(tokens, triton.cdiv(hidden, block))](
        rows_RD,
        token_rows if weight_R is None else weight_R,
        token_rows,
        token_offsets,
        out_TD,
        D=hidden,
        WEIGHTED=weight_R is not None,
        BR=BLOCK_ROWS,
        BD=block,
        num_warps=4,
    )
    return out_TD


@triton.jit
def gather_sum_kernel(
    rows_RD,
    weight_R,
    token_rows,
    token_offsets,
    out_TD,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """One program: BD columns of one token."""
    token = tl.program_id(0)
    rd = tl.program_id(1) * BD + tl.arange(0, BD)
    low = tl.load(token_offsets + token)
    high = tl.load(token_offsets + token + 1)
    total = tl.zeros((BD,), tl.float32)
    for start in range(low, high, BR):
        slot = start + tl.arange(0, BR)
        live = slot < high
        row = tl.load(token_rows + slot, mask=live, other=0).to(tl.int64)
        mask = live[:, None] & (rd < D)[None, :]
        value = tl.load(rows_RD + row[:, None] * D + rd[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_R + row, mask=live, other=0.0).to(tl.float32)
            value = value * weight[:, None]
        total += tl.sum(value, 0)
    out = out_TD + token.to(tl.int64) * D + rd
    tl.store(out, total.to(out_TD.dtype.element_ty), mask=rd < D)
