"""FP8 weights dequantised while they are read, a band of rows at a time.

A band lies within one row of blocks, or is whole rows of blocks, so that it has scales of its own
and no part of a matrix is ever held twice but the band.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from dvpa.fp8 import BLOCK, DTYPE, dequantise

# Codes of a band, which is fp32 for a moment. On a CPU operators on fewer than 32768 numbers stay
# on the thread that asked for them: see `CPU_BUFFER_BYTES` of `dvpa.engine.weights`.
CPU_BAND = (1 << 15) - 1
GPU_BAND = 1 << 20

Band = tuple[slice, slice]  # rows, columns


def read_bands(
    read: Callable[[int, Tensor], None], scale_inv: Tensor, out: Tensor, buffer: Tensor
) -> None:
    """Fill `out` with the weight that codes in a file and scales stand for, rounded once.

    Args:
        read: fills a flat E4M3 tensor on the CPU with the codes from a number on.
        scale_inv: fp32 [ceil(rows / 128), ceil(columns / 128)] on the CPU.
        out: [rows, columns], contiguous, of any floating dtype, on any device.
        buffer: uint8, for codes; pinned if `out` is on a GPU.
    """
    rows, columns = out.shape
    on_cpu = out.device.type == "cpu"
    codes, scale_inv = buffer.view(DTYPE), scale_inv.to(out.device)
    most = min(CPU_BAND if on_cpu else GPU_BAND, buffer.numel())
    for high, wide in bands(rows, columns, most):
        part = out[high, wide]
        staged = codes[: part.numel()]
        read(high.start * columns + wide.start, staged)
        scales = scale_inv[_blocks(high), _blocks(wide)]
        # Waits for a GPU: the buffer is filled again at once.
        part.copy_(dequantise(staged.view(part.shape).to(out.device), scales))


def bands(rows: int, columns: int, most: int) -> Iterator[Band]:
    """Parts of a matrix in the order of its data, of at most `most` numbers each (128 or more).

    Each is whole rows, of one row of blocks or of several whole ones; or, of rows longer than
    `most`, a part of one that starts at a block.
    """
    if columns > most:
        step = most // BLOCK * BLOCK
        for row in range(rows):
            for first in range(0, columns, step):
                yield slice(row, row + 1), slice(first, min(first + step, columns))
        return
    step, wide = most // max(columns, 1), slice(0, columns)
    if step >= BLOCK:
        step = step // BLOCK * BLOCK
        for first in range(0, rows, step):
            yield slice(first, min(first + step, rows)), wide
        return
    for block in range(0, rows, BLOCK):
        end = min(block + BLOCK, rows)
        for first in range(block, end, step):
            yield slice(first, min(first + step, end)), wide


def _blocks(part: slice) -> slice:
    """The blocks that rows or columns lie in."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
