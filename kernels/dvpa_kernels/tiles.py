"""The tile list of a grouped GEMM, built on the device: nothing waits for the row counts.

A tile is up to `block_rows` consecutive rows of one expert. How many tiles there are is known only
on the device, so the list has a static upper bound of entries; the spare ones have zero rows and
their programs end at once. The call can be captured in a CUDA graph.

Letters: E experts, R rows, M entries of the tile list.
"""

# Kernel bodies are Triton, whose pointers and blocks have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import torch
import triton
import triton.language as tl
from torch import Tensor

COMPARED = 8192  # (entry, expert) pairs compared by one program; more would spill registers


def tile_bound(rows: int, experts: int, block_rows: int) -> int:
    """M: no split of `rows` rows over `experts` experts needs more tiles."""
    return -(-rows // block_rows) + min(experts, rows)


def build_tiles(expert_offsets: Tensor, rows: int, block_rows: int) -> Tensor:
    """int32 [3, M]: expert, first row and row count (0: spare entry) of every tile.

    Args:
        expert_offsets: int32 [E + 1] on the device; need not start at 0.
        rows: R, padding included.
        block_rows: rows of a full tile.
    """
    experts = expert_offsets.shape[0] - 1
    bound = tile_bound(rows, experts, block_rows)
    tiles = torch.empty(3, bound, dtype=torch.int32, device=expert_offsets.device)
    padded = triton.next_power_of_2(experts)
    block = min(128, max(2, COMPARED // padded))
    tiles_kernel[(triton.cdiv(bound, block),)](
        expert_offsets, tiles, bound, E=experts, E_PADDED=padded, BM=block_rows, BT=block
    )
    return tiles


@triton.jit
def tiles_kernel(
    expert_offsets,
    tiles,
    bound,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """Entry i belongs to the first expert whose tiles end behind i."""
    entry = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, E_PADDED)
    low = tl.load(expert_offsets + e, mask=e < E, other=0)
    high = tl.load(expert_offsets + e + 1, mask=e < E, other=0)
    count = (high - low + BM - 1) // BM
    ends = tl.cumsum(count, 0)
    total = tl.sum(count, 0)
    is_past = ends[None, :] <= entry[:, None]
    expert = tl.minimum(tl.sum(is_past.to(tl.int32), 1), E - 1)
    start = tl.max(tl.where(is_past, ends[None, :], 0), 1)
    first = tl.load(expert_offsets + expert) + (entry - start) * BM
    rows = tl.minimum(tl.load(expert_offsets + expert + 1) - first, BM)
    rows = tl.where(entry < total, rows, 0)
    live = entry < bound
    tl.store(tiles + entry, expert, mask=live)
    tl.store(tiles + bound + entry, first, mask=live)
    tl.store(tiles + 2 * bound + entry, rows, mask=live)


@triton.jit
def locate(tiles, bound, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """This program's (expert, first row, row count, column block).

    GROUP neighbouring tiles go through all column blocks together: they share the weights of their
    expert and reread their own rows from L2.
    """
    pid = tl.program_id(0)
    span = GROUP * BLOCKS
    head = pid // span * GROUP
    size = tl.minimum(bound - head, GROUP)
    tile = head + pid % span % size
    block = pid % span // size
    expert = tl.load(tiles + tile)
    first = tl.load(tiles + bound + tile)
    rows = tl.load(tiles + 2 * bound + tile)
    return expert, first, rows, block
