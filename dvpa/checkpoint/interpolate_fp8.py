"""Convex combinations of block-scaled FP8 weights: dequantised, combined in fp32, quantised anew.

Codes are never combined as such: they mean different numbers under different scales. Rounding to
E4M3 again costs 1 to 2.5 % of the weight's norm, the less the closer the parents are.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvpa.checkpoint import fp8
from dvpa.checkpoint.interpolate import Bytes, Sums, are_equal


def combine_fp8(
    codes: Mapping[int, Bytes],
    scales: Mapping[int, NDArray[np.float32]],
    base: int,
    shares: Sequence[float],
    out: tuple[Bytes, NDArray[np.float32]] | None,
) -> Sums:
    """`interpolate.combine` for rows of FP8 weights that start at a block.

    Args:
        codes: E4M3 [rows, columns] of the parents that matter, by their index.
        scales: fp32 [ceil(rows / 128), ceil(columns / 128)] of the same.
        out: codes and scales to write, shaped like the parents' (None: compare only).
    """
    sums = Sums([0.0] * len(shares))
    centre = _weight(codes[base], scales[base])
    sums.base = _sum_of_squares(centre)
    bits = {i: scale.view(np.uint8) for i, scale in scales.items()}
    if are_equal(codes, base) and are_equal(bits, base):
        sums.is_equal = True
        if out is not None:
            out[0][:], out[1][:] = codes[base], scales[base]
        return sums
    total: Tensor | None = None
    for i, code in codes.items():
        weight = centre if i == base else _weight(code, scales[i])
        if i != base:
            sums.differences[i] = _sum_of_squares(weight - centre)
        if out is not None and shares[i]:
            total = weight * shares[i] if total is None else total.add_(weight * shares[i])
    is_finite = bool(np.isfinite([*sums.differences, sums.base]).all())
    if out is not None and total is not None and is_finite:
        used = (torch.from_numpy(scales[i]) for i in codes if shares[i])
        merged, scale_inv = fp8.requantise(total, used)
        out[0][:], out[1][:] = merged.view(torch.uint8).numpy(), scale_inv.numpy()
    return sums


def _weight(codes: Bytes, scale_inv: NDArray[np.float32]) -> Tensor:
    return fp8.dequantise(torch.from_numpy(codes).view(fp8.DTYPE), torch.from_numpy(scale_inv))


def _sum_of_squares(weight: Tensor) -> float:
    return float(weight.square().sum(dtype=torch.float64))
