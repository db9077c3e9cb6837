"""Weights as block-scaled FP8: quantised, encoded under given scales, or under the best of several.

The format and the way back to weights are `dvpa.fp8`'s, and can be had from here too.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa.fp8 import (
    BLOCK,
    CODES,
    DTYPE,
    SCALE_SUFFIX,
    block_bands,
    dequantise,
    fp8_problem,
    is_scale,
    scale_shape,
)

__all__ = [
    "BLOCK",
    "CODES",
    "DTYPE",
    "LARGEST",
    "SCALE_SUFFIX",
    "dequantise",
    "encode",
    "fp8_problem",
    "is_scale",
    "quantise",
    "requantise",
    "scale_shape",
]
LARGEST = 448.0  # the largest E4M3 number
JUDGED = 32  # rows of a block
OFF_GRID = 1.2  # the best of 1.05 .. 1.9 for the middle of two FP8 matrices
SMALLEST = 1e-12  # keeps the scale of an all-zero block above zero


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight; each block's largest magnitude becomes 448.

    Args:
        weight: fp32, bf16 or fp16 [..., rows, columns], finite.

    Returns:
        E4M3 [..., rows, columns], rounded to nearest even, and fp32
        [..., ceil(rows / 128), ceil(columns / 128)].

    Raises:
        ValueError: no matrix of floating-point numbers, or a value that is not finite.
    """
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight: {weight.dtype} {tuple(weight.shape)} must be a float's [.., rows, columns]"
        )
    scale_inv = _largest_scales(weight.detach().float())
    return encode(weight, scale_inv), scale_inv


def _largest_scales(weight: Tensor) -> Tensor:
    """Those that make each block's largest magnitude 448."""
    tiles = _tiles(weight)
    low, top = tiles.amin((-3, -1)), tiles.amax((-3, -1))
    scale_inv = torch.maximum(top, -low).clamp_(min=SMALLEST) / LARGEST
    if not bool(torch.isfinite(scale_inv).all()):
        raise ValueError("weight: holds a value that is not finite")
    return scale_inv


def encode(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """The nearest E4M3 codes [..., rows, columns] of a finite weight under given scales
    [..., ceil(rows / 128), ceil(columns / 128)]; what is beyond 448 of them becomes 448.
    """
    scaled = weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for band, scale in block_bands(scaled, scale_inv):
        band.div_(scale)
    return scaled.clamp_(-LARGEST, LARGEST).to(DTYPE)  # unclamped they would become NaN


def requantise(weight: Tensor, scales: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """`quantise`, with each block at the scale of least squared error: that of `quantise`, 1.2 of
    it, or one of `scales`.

    For a combination of FP8 weights. Where they are close, most codes agree under a parent's own
    scale. Where they are not, many values lie halfway between two codes of scales like the
    parents', which costs more than to leave their grid: 3.0 % instead of 2.5 % at 10 % of distance.
    Blocks are judged by their first 32 rows.
    """
    weight = weight.detach().float()
    scale_inv = _largest_scales(weight)
    tiles = _tiles(weight)[..., :JUDGED, :, :]
    candidates = torch.stack((scale_inv, OFF_GRID * scale_inv, *scales))
    errors = torch.stack([_squared_error(tiles, scale) for scale in candidates])
    scale_inv = candidates.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)
    return encode(weight, scale_inv), scale_inv


def _squared_error(tiles: Tensor, scale_inv: Tensor) -> Tensor:
    """Of every block [..., blocks, blocks] in its elements [..., blocks, n, blocks, 128]."""
    scale = scale_inv[..., :, None, :, None]
    found = (tiles / scale).clamp_(-LARGEST, LARGEST).to(DTYPE).float()
    error = found.mul_(scale).sub_(tiles).square_().sum((-3, -1))
    return error.nan_to_num_(nan=float("inf"))  # a scale of zero, which a block of zeros may have


def _tiles(weight: Tensor) -> Tensor:
    """[..., rows, columns] as [..., blocks, 128, blocks, 128], filled up with zeros."""
    high, wide = scale_shape(tuple(weight.shape))[-2:]
    rows, columns = weight.shape[-2:]
    whole = F.pad(weight, (0, wide * BLOCK - columns, 0, high * BLOCK - rows))
    return whole.unflatten(-1, (wide, BLOCK)).unflatten(-3, (high, BLOCK))
