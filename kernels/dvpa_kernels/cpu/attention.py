"""The CPU backend of `latent_attention` and `latent_rows`.

Letters: R query rows, H heads, W cache row (C latent + rope key), S sequences, M pages a sequence.
"""

import torch
from torch import Tensor

from dvpa_kernels.cpu.dense import kernel_isa
from dvpa_kernels.cpu.library import FORMATS, ISAS, library_for, raise_fault


def latent_attention_cpu(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    row_sequence: Tensor,
    row_length: Tensor,
    value_width: int,
    scaling: float,
    isa: str | None = None,
    threads: int | None = None,
) -> Tensor | None:
    """`latent_attention` in C++, or None where `kernel_isa` has none; shapes and dtypes are sound.

    Sums in fp32; a row is bitwise the same whatever the other rows and the number of threads.

    Args:
        q: [R, H, W].
        cache: [num_pages, page_size, W].
        page_table: int32 [S, M].
        row_sequence: int32 [R].
        row_length: int32 [R].
        value_width: C.
        scaling: factor of the scores.
        isa: as for `linear_cpu`.
        threads: likewise.

    Raises:
        ValueError: this machine cannot run `isa`, or a sequence, a length or a page that is out of
            range.
        MemoryError: no room for the partial results.
    """
    isa = isa or kernel_isa(q, cache)
    if isa is None:
        return None
    # Named, so that a copy lives until the call returns.
    q, table = q.contiguous(), page_table.contiguous()
    sequences, lengths = row_sequence.contiguous(), row_length.contiguous()
    out = q.new_empty(*q.shape[:2], value_width)
    if out.numel() == 0:
        return out
    fault = library_for(isa).dvpa_cpu_attention(
        ISAS.index(isa),
        FORMATS[q.dtype],
        threads or torch.get_num_threads(),
        *q.shape,
        value_width,
        *cache.shape[:2],
        *table.shape,
        scaling,
        q.data_ptr(),
        cache.data_ptr(),
        table.data_ptr(),
        sequences.data_ptr(),
        lengths.data_ptr(),
        out.data_ptr(),
    )
    raise_fault(
        fault,
        len(q),
        sequences=table.shape[0],
        pages=table.shape[1],
        page_size=cache.shape[1],
        cache_pages=cache.shape[0],
    )
    return out


def latent_rows_cpu(
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
    isa: str | None = None,
    threads: int | None = None,
) -> Tensor | None:
    """`latent_rows` in C++, or None where `kernel_isa` has none; shapes and dtypes are sound.

    Raises:
        ValueError: this machine cannot run `isa`, or a slot is out of range.
    """
    isa = isa or kernel_isa(query, row, latent_norm)
    if isa is None:
        return None
    # Named, so that a copy lives until the call returns.
    cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
    tokens, rope = cos.shape
    out = query.new_empty(tokens, num_heads, nope + rope)
    fault = library_for(isa).dvpa_cpu_latent_rows(
        ISAS.index(isa),
        FORMATS[query.dtype],
        threads or torch.get_num_threads(),
        tokens,
        num_heads,
        nope,
        rope,
        cache.shape[2] - rope,
        query.stride(0),
        row.stride(0),
        cache.shape[0] * cache.shape[1],
        eps,
        interleaved,
        query.data_ptr(),
        row.data_ptr(),
        latent_norm.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        slots.data_ptr(),
        cache.data_ptr(),
        out.data_ptr(),
    )
    raise_fault(fault, tokens, cache_pages=cache.shape[0], page_size=cache.shape[1])
    return out
