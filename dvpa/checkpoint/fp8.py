"""FP8 weights as DeepSeek-V3 stores them: E4M3 codes and one fp32 scale per 128 x 128 block.

`X.weight` F8_E4M3 [rows, columns] comes with `X.weight_scale_inv` F32 [ceil(rows / 128),
ceil(columns / 128)]. Despite its name the scale is multiplied: weight = codes * scale_inv. Blocks
start at multiples of 128; those at the lower and right edge are smaller (576 rows: 4 blocks of 128
and one of 64). The two tensors may lie in different shards.

Works on any device; leading dimensions, as of stacked experts, are kept.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # the largest E4M3 number
JUDGED = 32  # rows of a block
OFF_GRID = 1.2  # the best of 1.05 .. 1.9 for the middle of two FP8 matrices
SMALLEST = 1e-12  # keeps the scale of an all-zero block above zero
SCALE_SUFFIX = "_scale_inv"  # the scale's name is the weight's name and this


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales that go with codes of `shape` [..., rows, columns]."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def dequantise(codes: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that codes and scales stand for: the fp32 product, rounded once to `dtype`.

    Args:
        codes: E4M3 [..., rows, columns].
        scale_inv: fp32 [..., ceil(rows / 128), ceil(columns / 128)].
        dtype: of the result.

    Returns:
        [..., rows, columns] in `dtype`.

    Raises:
        ValueError: a wrong dtype or shape, naming the argument.
    """
    if codes.dtype != DTYPE or codes.dim() < 2:
        raise ValueError(
            f"codes: {codes.dtype} {tuple(codes.shape)} must be {DTYPE} [.., rows, columns]"
        )
    wanted = scale_shape(tuple(codes.shape))
    if scale_inv.dtype != torch.float32 or tuple(scale_inv.shape) != wanted:
        raise ValueError(
            f"scale_inv: {scale_inv.dtype} {tuple(scale_inv.shape)} must be torch.float32 {wanted}"
        )
    weight = codes.to(torch.float32, memory_format=torch.contiguous_format)
    for rows, scale in _bands(weight, scale_inv):
        rows.mul_(scale)
    return weight.to(dtype)


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
    for band, scale in _bands(scaled, scale_inv):
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


def _bands(weight: Tensor, scale_inv: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the rows with whole blocks and of the rest, each with its scales to broadcast."""
    rows, columns = weight.shape[-2:]
    spread = scale_inv.repeat_interleave(BLOCK, -1)[..., :columns]
    split = rows // BLOCK * BLOCK
    bands = []
    if split:
        tall = weight[..., :split, :].unflatten(-2, (split // BLOCK, BLOCK))
        bands.append((tall, spread[..., : split // BLOCK, None, :]))
    if split < rows:
        bands.append((weight[..., split:, :], spread[..., -1:, :]))
    return bands
