"""Weights in the number format they are to be stored in, from the one they are stored in.

A weight is a tensor, or in FP8 codes and scales (`Fp8`). FP8 that stays FP8 is not touched; what
becomes another format is dequantised in fp32 and rounded once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dvpa.checkpoint import fp8
from dvpa.checkpoint.shards import DTYPES, ShardReader, ShardWriter, TensorInfo
from dvpa.model.tensor_names import ROUTER_WEIGHT, TIER_BIAS

STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FORMATS = ("auto", *STORED, "fp8")
READABLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Fp8:
    """A weight in FP8: codes [rows, columns] and scales, see `dvpa.checkpoint.fp8`."""

    codes: Tensor
    scale_inv: Tensor


@dataclass(frozen=True)
class FormatCounts:
    """Weights by what became of their format: `kept_fp8` as they were, to FP8, from FP8."""

    kept_fp8: int
    quantised: int
    dequantised: int


class WeightReader(ShardReader):
    """`ShardReader` for those who compute: FP8 comes dequantised, in fp32.

    Scales must have been checked, see `check_fp8`.
    """

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """As `ShardReader.read`; of FP8, only the blocks that the part lies in are read."""
        if name not in self.tensors or self.tensors[name].dtype != fp8.CODES:
            return super().read(name, index)
        shape = self.tensors[name].shape
        spans = [each.indices(size)[:2] for each, size in zip(index, shape, strict=False)]
        spans += [(0, size) for size in shape[len(spans) :]]
        blocks = [(low // fp8.BLOCK, -(-high // fp8.BLOCK)) for low, high in spans]
        covering = tuple(slice(low * fp8.BLOCK, high * fp8.BLOCK) for low, high in blocks)
        codes = super().read(name, covering)
        scale_inv = super().read(name + fp8.SCALE_SUFFIX, tuple(slice(*each) for each in blocks))
        inside = zip(spans, covering, strict=True)
        part = tuple(slice(low - c.start, high - c.start) for (low, high), c in inside)
        return fp8.dequantise(codes, scale_inv)[part]


def stored_as(name: str, source: str, info: TensorInfo, dtype: str) -> dict[str, TensorInfo]:
    """What is written for a tensor of ours: it alone, or codes and scales.

    Args:
        name: what it is called there.
        source: what ours is called; the selection bias is always fp32.
        info: how ours is stored now, without the scales.
        dtype: one of `FORMATS`: "auto" as it is; "fp8" for matrices of attention and MLPs, the
            others bf16, but nothing that is FP8 already changes.
    """
    stays = dtype in ("auto", "fp8") and info.dtype == fp8.CODES
    if stays or (dtype == "fp8" and is_quantised(source)):
        scales = TensorInfo("F32", fp8.scale_shape(info.shape))
        return {name: TensorInfo(fp8.CODES, info.shape), name + fp8.SCALE_SUFFIX: scales}
    if source.endswith(TIER_BIAS) or dtype == "auto":
        return {name: info}
    return {name: TensorInfo(STORED.get(dtype, "BF16"), info.shape)}


def is_quantised(name: str) -> bool:
    """Whether V3 stores it in FP8: the matrices of attention and MLPs, not embedding, head, router
    or `eh_proj`."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and ".eh_proj." not in name


def read_weight(reader: ShardReader, name: str) -> Tensor | Fp8:
    """A weight as it is stored.

    Raises:
        ValueError: a shard cannot be read.
    """
    tensor = reader.read(name)
    if tensor.dtype != fp8.DTYPE:
        return tensor
    return Fp8(tensor, reader.read(name + fp8.SCALE_SUFFIX))


def is_weight_due(writer: ShardWriter, name: str, info: TensorInfo) -> bool:
    """Whether a weight, or its scales where it is stored in FP8, is still to be written."""
    is_fp8 = info.dtype == fp8.CODES
    return writer.is_due(name) or (is_fp8 and writer.is_due(name + fp8.SCALE_SUFFIX))


def write_weight(
    writer: ShardWriter, name: str, info: TensorInfo, weight: Tensor | Fp8, source: str
) -> None:
    """Write what is due of a weight, as `info` says; FP8 with its scales, which must come next.

    Raises:
        ValueError: a value that FP8 cannot hold (not finite; the message begins with `source`), or
            what `ShardWriter` refuses.
    """
    if info.dtype == fp8.CODES:
        try:
            stored = weight if isinstance(weight, Fp8) else Fp8(*fp8.quantise(weight))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        if writer.is_due(name):
            writer.write(name, stored.codes)
        if writer.is_due(name + fp8.SCALE_SUFFIX):  # it may begin another shard
            writer.write(name + fp8.SCALE_SUFFIX, stored.scale_inv)
    elif isinstance(weight, Fp8):
        dtype = DTYPES[info.dtype]
        writer.write(name, fp8.dequantise(weight.codes, weight.scale_inv, dtype))
    else:
        writer.write(name, weight.to(DTYPES[info.dtype]))


def count_formats(pairs: Iterable[tuple[TensorInfo, TensorInfo]]) -> FormatCounts:
    """Of weights, scales left out: as they were stored and as they are written."""
    both = [(old.dtype == fp8.CODES, new.dtype == fp8.CODES) for old, new in pairs]
    return FormatCounts(
        kept_fp8=both.count((True, True)),
        quantised=both.count((False, True)),
        dequantised=both.count((True, False)),
    )


def check_format(
    folder: Path, name: str, tensors: Mapping[str, TensorInfo], has_blocks: bool
) -> None:
    """Check that a tensor of ours holds numbers that can be read.

    Raises:
        ValueError: it does not, or it is FP8 and its scales do not fit.
    """
    check_fp8(folder, name, tensors, has_blocks)
    info = tensors[name]
    if info.dtype == fp8.CODES and name.endswith((ROUTER_WEIGHT, TIER_BIAS)):
        raise ValueError(f"{folder}: {name}: FP8, in which a router is never stored")
    if info.dtype not in (*READABLE, fp8.CODES):
        raise ValueError(
            f"{folder}: {name}: dtype {info.dtype} must be one of {', '.join(READABLE)}, or "
            f"{fp8.CODES} with scales"
        )


def check_fp8(folder: Path, name: str, tensors: Mapping[str, TensorInfo], has_blocks: bool) -> None:
    """Check that a tensor has fitting scales if it is FP8.

    Raises:
        ValueError: it is FP8 and has none, or config.json says nothing of it (`has_blocks`).
    """
    info, scale = tensors[name], tensors.get(name + fp8.SCALE_SUFFIX)
    scales = None if scale is None else (scale.dtype, scale.shape)
    problem = fp8.fp8_problem(name, (info.dtype, info.shape), scales, has_blocks)
    if problem is not None:
        raise ValueError(f"{folder}: {problem}")


def fp8_names(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """The tensors that are FP8 codes."""
    return frozenset(name for name, info in tensors.items() if info.dtype == fp8.CODES)
