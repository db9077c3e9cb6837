"""The CPU backend of `route`.

Letters: T tokens, D hidden, E routed experts, K slots.
"""

import ctypes
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dvpa_kernels.cpu.dense import kernel_isa
from dvpa_kernels.cpu.library import FORMATS, ISAS, library_for, raise_fault

if TYPE_CHECKING:
    from dvpa_kernels.router import RouterTable


class TableStruct(ctypes.Structure):
    """`RouterTable` of plan.h; its arrays live as long as it does."""

    _fields_ = (
        ("pool", ctypes.POINTER(ctypes.c_int64)),
        ("top_k", ctypes.POINTER(ctypes.c_int64)),
        ("topk_group", ctypes.POINTER(ctypes.c_int64)),
        ("factor", ctypes.POINTER(ctypes.c_float)),
        ("tiers", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("normalises", ctypes.c_int64),
        ("softmax", ctypes.c_int64),
        ("best_of_group", ctypes.c_int64),
        ("stripes", ctypes.c_int64),
    )


@functools.cache
def table_struct(table: "RouterTable") -> TableStruct:
    """The table as the kernels read it."""
    tiers = len(table.pool_sizes)
    integers = ctypes.c_int64 * tiers
    return TableStruct(
        integers(*table.pool_sizes),
        integers(*table.top_k),
        integers(*table.topk_group),
        (ctypes.c_float * tiers)(*table.scaling),
        tiers,
        table.group_size,
        table.norm_topk_prob,
        table.softmax,
        table.best_of_group,
        table.stripes,
    )


def route_cpu(
    hidden: Tensor,
    weight: Tensor,
    tier_bias: Tensor,
    tiers: Tensor,
    table: "RouterTable",
    max_tier: int,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`route` in C++, or None where `kernel_isa` has none; the operands are sound.

    Raises:
        ValueError: this machine cannot run `isa`, or a tier is above `max_tier`.
        MemoryError: no room for the scores.
    """
    isa = isa or kernel_isa(hidden, weight)
    if isa is None:
        return None
    hidden, tiers, slots = hidden.contiguous(), tiers.contiguous(), table.num_slots(max_tier)
    index = torch.empty(len(hidden), slots, dtype=torch.int64)
    weights = torch.empty(len(hidden), slots)
    fault = library_for(isa).dvpa_cpu_route(
        ISAS.index(isa),
        FORMATS[hidden.dtype],
        threads or torch.get_num_threads(),
        *hidden.shape,
        len(weight),
        max_tier,
        slots,
        ctypes.addressof(table_struct(table)),
        hidden.data_ptr(),
        weight.data_ptr(),
        tier_bias.data_ptr(),
        tiers.data_ptr(),
        index.data_ptr(),
        weights.data_ptr(),
    )
    raise_fault(fault, len(hidden), tiers=max_tier + 1)
    return index, weights
