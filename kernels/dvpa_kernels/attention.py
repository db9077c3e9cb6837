"""Absorbed multi-head latent attention over a paged cache: C++ on CPUs, PyTorch elsewhere.

Letters: R query rows, H heads, W cache row (C latent + P rope key), S sequences, M pages a
sequence, L positions, N no-rope dims.
"""

import torch
from torch import Tensor

from dvpa_kernels.cpu.attention import latent_attention_cpu, latent_rows_cpu
from dvpa_kernels.dense import rms_norm_torch

GATHERED_ELEMENTS = 1 << 24  # cache values that the PyTorch backend gathers at once


def latent_attention(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    row_sequence: Tensor,
    row_length: Tensor,
    value_width: int,
    scaling: float,
) -> Tensor:
    """softmax(scaling * q . cache[p]) @ cache[p, :C] over each row's positions p, softmax in fp32.

    Position p of sequence s is slot p % page_size of page `page_table[s, p // page_size]`. Nothing
    at or beyond a row's length is read or has any influence, NaN included; nor has a page table
    beyond the pages that a row needs.

    Args:
        q: [R, H, W].
        cache: [num_pages, page_size, W], contiguous, in the dtype of q.
        page_table: int32 [S, M].
        row_sequence: int32 [R], rows of `page_table`.
        row_length: int32 [R]; the row sees positions 0 .. length - 1. A row of length 0 is zero.
        value_width: C, at most W.
        scaling: factor of the scores.

    Returns:
        [R, H, C], contiguous, in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a cache that is not
            contiguous.
    """
    _check(q, cache, page_table, row_sequence, row_length, value_width)
    operands = (q, cache, page_table, row_sequence, row_length, value_width, scaling)
    out = latent_attention_cpu(*operands)
    return latent_attention_torch(*operands) if out is None else out


def latent_attention_torch(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    row_sequence: Tensor,
    row_length: Tensor,
    value_width: int,
    scaling: float,
) -> Tensor:
    """`latent_attention` in PyTorch's operators, on any device, in fp32 and without a sync.

    It gathers M pages for every row, whatever the row's length.
    """
    pages_RM = page_table.long().index_select(0, row_sequence.long())
    capacity = pages_RM.shape[1] * cache.shape[1]
    pages_RM = pages_RM.clamp(0, cache.shape[0] - 1)  # unused entries may hold anything
    seen_RL = torch.arange(capacity, device=q.device) < row_length[:, None]
    rows = max(1, GATHERED_ELEMENTS // max(1, capacity * cache.shape[2]))
    out_RHC = q.new_empty(*q.shape[:2], value_width)
    for start in range(0, len(q), rows):
        part = slice(start, start + rows)
        seen_rL = seen_RL[part]
        # Stale slots are zeroed, since a weight of zero times NaN is NaN.
        cache_rLW = cache[pages_RM[part]].flatten(1, 2).float()
        cache_rLW = cache_rLW.masked_fill(~seen_rL[..., None], 0.0)
        scores_rHL = torch.matmul(q[part].float() * scaling, cache_rLW.transpose(1, 2))
        # The lowest finite number: a row that sees nothing has equal weights, and values of zero.
        scores_rHL = scores_rHL.masked_fill(~seen_rL[:, None], torch.finfo(torch.float32).min)
        out_RHC[part] = torch.matmul(scores_rHL.softmax(-1), cache_rLW[..., :value_width])
    return out_RHC


def latent_rows(
    query: Tensor,
    row: Tensor,
    latent_norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    cache: Tensor,
    slots: Tensor,
    num_heads: int,
    nope: int,
) -> Tensor:
    """Rotates queries; writes cache rows: the normalised latent, then the rotated key.

    Rounded where the model's own operators round; PyTorch does it where `linear` names it.

    Args:
        query: [R, H * (N + P)], every head's last P values to be rotated; rows may be strided.
        row: [R, C + P] before norm and rotation; likewise.
        latent_norm: [C], weight of the RMS norm.
        eps: added to its mean square.
        cos: [R, P], of each row's position, halves repeated as Transformers gives them.
        sin: [R, P].
        interleaved: the pairs to rotate are stored side by side, and are parted first.
        cache: [num_pages, page_size, C + P], contiguous; overwritten at `slots`.
        slots: int64 [R], page * page_size + offset, no two alike.
        num_heads: H.
        nope: N.

    Returns:
        The queries, [R, H, N + P], contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or on CPUs a slot out of range.
    """
    rows, rope = cos.shape
    shapes = {
        "query": (query, (rows, num_heads * (nope + rope))),
        "row": (row, (rows, cache.shape[-1])),
        "latent_norm": (latent_norm, (cache.shape[-1] - rope,)),
        "sin": (sin, (rows, rope)),
        "slots": (slots, (rows,)),
    }
    for name, (value, shape) in shapes.items():
        if value.shape != shape:
            raise ValueError(f"{name}: shape {tuple(value.shape)} must be {shape}")
    for name, value in {"query": query, "row": row, "latent_norm": latent_norm}.items():
        if value.stride(-1) != 1:
            raise ValueError(f"{name}: strides {value.stride()} must end in 1")
    for name, value in {"row": row, "norm": latent_norm, "cos": cos, "cache": cache}.items():
        if value.dtype != query.dtype:
            raise ValueError(f"{name}: dtype {value.dtype} must be that of query, {query.dtype}")
    if slots.dtype != torch.int64 or cache.dim() != 3 or not cache.is_contiguous():
        raise ValueError(
            f"slots, cache: {slots.dtype} and strides {cache.stride()} must be torch.int64 and "
            "[num_pages, page_size, C + P], contiguous"
        )
    operands = (query, row, latent_norm, eps, cos, sin, interleaved, cache, slots, num_heads, nope)
    out = latent_rows_cpu(*operands)
    return latent_rows_torch(*operands) if out is None else out


def latent_rows_torch(
    query: Tensor,
    row: Tensor,
    latent_norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    cache: Tensor,
    slots: Tensor,
    num_heads: int,
    nope: int,
) -> Tensor:
    """`latent_rows` in PyTorch's operators, on any device."""
    latent, k_rope = row.split([len(latent_norm), cos.shape[1]], 1)
    latent, k_rope = rms_norm_torch(latent, latent_norm, eps), rotate(k_rope, cos, sin, interleaved)
    cache.flatten(0, 1).index_copy_(0, slots, torch.cat((latent, k_rope), 1))
    query_RHX = query.unflatten(1, (num_heads, -1))
    q_rope = rotate(query_RHX[..., nope:], cos[:, None], sin[:, None], interleaved)
    return torch.cat((query_RHX[..., :nope], q_rope), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the last dimension; see `latent_rows`."""
    if interleaved:
        x = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _check(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    row_sequence: Tensor,
    row_length: Tensor,
    value_width: int,
) -> None:
    if q.dim() != 3 or cache.dim() != 3 or q.shape[2] != cache.shape[2]:
        raise ValueError(
            f"q, cache: shapes {tuple(q.shape)}, {tuple(cache.shape)} must be [R, H, W] and "
            "[num_pages, page_size, W]"
        )
    if not 0 < value_width <= q.shape[2]:
        raise ValueError(f"value_width: {value_width} must be in 1 .. {q.shape[2]}")
    if not cache.is_contiguous():
        raise ValueError(f"cache: strides {cache.stride()} must be contiguous")
    if cache.dtype != q.dtype:
        raise ValueError(f"cache: dtype {cache.dtype} must be that of q, {q.dtype}")
    if page_table.dim() != 2:
        raise ValueError(f"page_table: shape {tuple(page_table.shape)} must be [S, M]")
    indices = {"page_table": page_table, "row_sequence": row_sequence, "row_length": row_length}
    for name, value in indices.items():
        if value.dtype != torch.int32:
            raise ValueError(f"{name}: dtype {value.dtype} must be torch.int32")
        if name != "page_table" and value.shape != q.shape[:1]:
            raise ValueError(f"{name}: shape {tuple(value.shape)} must be ({len(q)},)")
    for name, value in {"cache": cache, **indices}.items():
        if value.device != q.device:
            raise ValueError(f"{name}: on {value.device}, must be on {q.device} as q is")
