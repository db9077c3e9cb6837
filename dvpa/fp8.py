"""FP8 weights as DeepSeek-V3 stores them: E4M3 codes and one fp32 scale per 128 x 128 block.

`X.weight` F8_E4M3 [rows, columns] comes with `X.weight_scale_inv` F32 [ceil(rows / 128),
ceil(columns / 128)]. Despite its name the scale is multiplied: weight = codes * scale_inv. Blocks
start at multiples of 128; those at the lower and right edge are smaller (576 rows: 4 blocks of 128
and one of 64). The two tensors may lie in different shards.

Works on any device; leading dimensions, as of stacked experts, are kept. `dvpa.checkpoint.fp8` has
the way back, from weights to codes.
"""

from collections.abc import Container

import torch
from torch import Tensor

BLOCK = 128
PIECE = 1 << 18  # codes that are converted at once: what caches hold
CODES = "F8_E4M3"  # what safetensors calls them
DTYPE = torch.float8_e4m3fn
SCALE_SUFFIX = "_scale_inv"  # the scale's name is the weight's name and this


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales that go with codes of `shape` [..., rows, columns]."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def fp8_problem(
    name: str,
    stored: tuple[str, tuple[int, ...]],
    scale: tuple[str, tuple[int, ...]] | None,
    has_blocks: bool,
) -> str | None:
    """Why a tensor of a checkpoint is FP8 that cannot be read; None if it can, or is no FP8.

    Args:
        name: the tensor's.
        stored: its dtype, as safetensors calls it, and its shape.
        scale: the same of its scales; None if there are none.
        has_blocks: the checkpoint's config.json says that weights are FP8 in such blocks.
    """
    dtype, shape = stored
    if not dtype.startswith("F8"):
        return None
    if dtype != CODES or len(shape) != 2:
        return f"{name}: {dtype} {shape} is no matrix of {CODES}"
    if not has_blocks:
        return f"{name}: FP8, but config.json says nothing of it (quantization_config)"
    if scale is None:
        return f"{name}{SCALE_SUFFIX}: missing"
    if scale != ("F32", scale_shape(shape)):
        given, wanted = f"{scale[0]} {scale[1]}", f"F32 {scale_shape(shape)}"
        return f"{name}{SCALE_SUFFIX}: {given}, expected {wanted}"
    return None


def is_scale(name: str, tensors: Container[str]) -> bool:
    """Whether a tensor is the scales of one of `tensors`, if that is FP8."""
    weight = name.removesuffix(SCALE_SUFFIX)
    return weight != name and weight in tensors


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
    weight = _numbers(codes)
    for rows, scale in block_bands(weight, scale_inv):
        rows.mul_(scale)
    return weight.to(dtype)


def _numbers(codes: Tensor) -> Tensor:
    """What codes stand for without their scales: fp32, contiguous.

    On a CPU PyTorch converts one after the other. Its fp16 it converts eight at a time, and E4M3's
    bits are those of an fp16 number 2^8 times smaller, subnormal ones too; only NaN is not NaN.
    """
    if codes.device.type != "cpu" or not codes.numel():
        return codes.to(torch.float32, memory_format=torch.contiguous_format)
    numbers = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    flat = codes.contiguous().view(-1)
    for part, out in zip(flat.split(PIECE), numbers.view(-1).split(PIECE), strict=True):
        bits = part.view(torch.int8).to(torch.int16)
        sign = bits & -0x8000
        bits &= 0x7F
        if int(bits.max()) == 0x7F:
            out.copy_(part)
        else:
            bits.bitwise_left_shift_(7).bitwise_or_(sign)
            out.copy_(bits.view(torch.float16)).mul_(256.0)
    return numbers


def block_bands(weight: Tensor, scale_inv: Tensor) -> list[tuple[Tensor, Tensor]]:
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
