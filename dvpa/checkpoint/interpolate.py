"""Convex combinations and differences of raw tensor data, chunk by chunk; NumPy alone.

result = sum_i share_i * parent_i, in fp32 (F64: in fp64), in the recipe's order of the parents,
rounded once, to nearest even. FP8 with block scales is `dvpa.checkpoint.interpolate_fp8`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.floating]
FORMATS = ("F64", "F32", "F16", "BF16")
PAD = 4  # chunks are padded with zeros to whole words of so many bytes
_HIGH = np.uint32(0xFFFF0000)
_ROW = 8192  # BLAS shares longer dot products out to threads of its own


class Scratch:
    """Arrays of one worker that are used again for every chunk."""

    def __init__(self) -> None:
        self._held: dict[str, Bytes] = {}
        self._views: dict[tuple[str, int, Any], Any] = {}

    def take(self, key: str, num_bytes: int, dtype: Any = np.uint8) -> Any:
        """The first bytes of the array called `key`, seen as `dtype`; it grows when it must."""
        view = self._views.get((key, num_bytes, dtype))
        if view is None:
            held = self._held.get(key)
            if held is None or held.size < num_bytes:
                held = self._held[key] = np.empty(num_bytes, np.uint8)
                self._views = {known: v for known, v in self._views.items() if known[0] != key}
            view = self._views[key, num_bytes, dtype] = held[:num_bytes].view(dtype)
        return view


@dataclass(slots=True)
class Sums:
    """Sums of squares over a tensor or a part of it.

    `differences[i]` is of parent i minus the base (0 where it was not read), `base` of the base;
    `is_equal`: all parents that were read hold the same bytes.
    """

    differences: list[float]
    base: float = 0.0
    is_equal: bool = False

    def add(self, other: "Sums") -> None:
        """Take in another part."""
        self.base += other.base
        self.is_equal = self.is_equal and other.is_equal
        for i, value in enumerate(other.differences):
            self.differences[i] += value


def combine(
    dtype: str,
    parts: Mapping[int, Bytes],
    ends: Sequence[int],
    base: int,
    shares: Sequence[float],
    out: Bytes | None,
    scratch: Scratch,
) -> list[Sums]:
    """Write the combination of a chunk into `out` (None: compare only) and measure its tensors.

    Args:
        dtype: one of `FORMATS`.
        parts: the same chunk as bytes, padded to whole words, of the parents that matter, by
            their index and in its order.
        ends: where each tensor of the chunk ends; all but the last at a whole word.
        base: index of the base, which differences are taken from; always among the parts.
        shares: of every parent.
        out: as long as the parts.

    A tensor that is the same bytes in all parts is so in the result. A difference is not finite if
    a value of the tensor is not; what `out` holds then means nothing.
    """
    sums = [Sums([0.0] * len(shares)) for _ in ends]
    with np.errstate(all="ignore"):
        for lane in range(2 if dtype == "BF16" else 1):
            _combine_lane(dtype, lane, parts, ends, base, shares, out, scratch, sums)
    start = 0
    for end, found in zip(ends, sums, strict=True):
        if not any(0 < value < np.inf for value in found.differences):
            held = {i: part[start:end] for i, part in parts.items()}
            found.is_equal = are_equal(held, base)
        if found.is_equal:
            found.differences = [0.0] * len(shares)
            if out is not None:
                out[start:end] = parts[base][start:end]
        start = end
    return sums


def are_equal(parts: Mapping[int, Bytes], base: int) -> bool:
    """Whether all parts are the base's bytes."""
    return all(np.array_equal(part, parts[base]) for part in parts.values())


def _combine_lane(
    dtype: str,
    lane: int,
    parts: Mapping[int, Bytes],
    ends: Sequence[int],
    base: int,
    shares: Sequence[float],
    out: Bytes | None,
    scratch: Scratch,
    sums: Sequence[Sums],
) -> None:
    """`combine` over all elements, or over every second one of BF16."""
    wide = np.float64 if dtype == "F64" else np.float32
    centre = _widen(dtype, lane, parts[base], scratch, "centre")
    work = scratch.take("work", centre.nbytes, wide)
    total = scratch.take("total", centre.nbytes, wide)
    # Of a chunk's last bytes and its padding, only whole elements lie in the lane.
    cuts = [0, *(end * centre.size // parts[base].size for end in ends[:-1]), centre.size]
    is_first = True
    for i, part in parts.items():
        values = centre
        if i != base:
            values = _widen(dtype, lane, part, scratch, "values")
            np.subtract(values, centre, out=work)
            for place, found in enumerate(sums):
                found.differences[i] += _sum_of_squares(work[cuts[place] : cuts[place + 1]])
        if out is None or not shares[i]:
            continue
        if is_first:
            np.multiply(values, wide(shares[i]), out=total)
        else:
            np.multiply(values, wide(shares[i]), out=work)
            np.add(total, work, out=total)
        is_first = False
    for place, found in enumerate(sums):
        found.base += _sum_of_squares(centre[cuts[place] : cuts[place + 1]])
    if out is not None:
        _narrow(dtype, lane, total, work, out)


def _widen(dtype: str, lane: int, part: Bytes, scratch: Scratch, key: str) -> Floats:
    """The values as fp32 (F64: fp64); of BF16 those in the low or the high halves of words."""
    if dtype == "F64":
        return part[: part.size // 8 * 8].view(np.float64)
    if dtype == "F32":
        return part.view(np.float32)
    if dtype == "F16":
        values: Floats = scratch.take(key, 2 * part.size, np.float32)
        np.copyto(values, part.view(np.float16))
        return values
    words = scratch.take(key, part.size, np.uint32)
    if lane == 0:
        np.left_shift(part.view(np.uint32), 16, out=words)
    else:
        np.bitwise_and(part.view(np.uint32), _HIGH, out=words)
    widened: Floats = scratch.take(key, part.size, np.float32)
    return widened


def _narrow(dtype: str, lane: int, values: Floats, work: Floats, out: Bytes) -> None:
    """Round to the stored format; overwrites `values` and `work`."""
    if dtype == "F64":
        out[: values.nbytes].view(np.float64)[:] = values
    elif dtype == "F32":
        out.view(np.float32)[:] = values
    elif dtype == "F16":
        np.copyto(out.view(np.float16), values, casting="same_kind")
    else:  # add half a step, a tie's least bit decides; the high 16 bits are the result
        bits, half, words = values.view(np.uint32), work.view(np.uint32), out.view(np.uint32)
        np.right_shift(bits, 16, out=half)
        np.bitwise_and(half, 1, out=half)
        np.add(half, 0x7FFF, out=half)
        np.add(bits, half, out=bits)
        if lane == 0:
            np.right_shift(bits, 16, out=words)
        else:
            np.bitwise_and(bits, _HIGH, out=bits)
            np.bitwise_or(words, bits, out=words)


def _sum_of_squares(values: Floats) -> float:
    """In fp32 over short rows, in fp64 over them; not finite only if a value is not."""
    split = values.size // _ROW * _ROW
    rows, rest = values[:split].reshape(-1, _ROW), values[split:]
    total = float(_row_products(rows).sum(dtype=np.float64)) + float(np.dot(rest, rest))
    if not np.isfinite(total):  # squares beyond fp32, perhaps
        total = float(np.square(values.astype(np.float64)).sum())
    return total


def _row_products(rows: Floats) -> Floats:
    """Each row's product with itself."""
    if hasattr(np, "vecdot"):  # NumPy 2
        products: Floats = np.vecdot(rows, rows)
        return products
    return np.matmul(rows[:, None], rows[:, :, None])
