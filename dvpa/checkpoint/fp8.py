"""FP8 weights as DeepSeek-V3 stores them: E4M3 codes and one fp32 scale per 128 x 128 block.

`X.weight` F8_E4M3 [rows, columns] comes with `X.weight_scale_inv` F32 [ceil(rows / 128),
ceil(columns / 128)]. Despite its name the scale is multiplied: weight = codes * scale_inv. Blocks
start at multiples of 128; those at the lower and right edge are smaller (576 rows: 4 blocks of 128
and one of 64). The two tensors may lie in different shards.

Works on any device; leading dimensions, as of stacked experts, are kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # the largest E4M3 number
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
    scaled = weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    high, wide = scale_shape(tuple(weight.shape))[-2:]
    rows, columns = weight.shape[-2:]
    whole = F.pad(scaled, (0, wide * BLOCK - columns, 0, high * BLOCK - rows))
    tiles = whole.unflatten(-1, (wide, BLOCK)).unflatten(-3, (high, BLOCK))
    low, top = tiles.amin((-3, -1)), tiles.amax((-3, -1))
    scale_inv = torch.maximum(top, -low).clamp_(min=SMALLEST) / LARGEST
    if not bool(torch.isfinite(scale_inv).all()):
        raise ValueError("weight: holds a value that is not finite")
    for band, scale in _bands(scaled, scale_inv):
        band.div_(scale)
    return scaled.to(DTYPE), scale_inv


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
