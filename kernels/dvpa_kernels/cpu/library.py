"""The compiled kernels as a Python object: loaded once, with what it can run here.

Letters: T tokens, D hidden, F expert width, E experts, R rows.
"""

import ctypes
import logging
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dvpa_kernels.cpu.build import BuildError, build, cache_folder, loaded_openmp
from dvpa_kernels.routing import RowRouting

logger = logging.getLogger(__name__)

# Numbered as in kernels.cpp; the last one that this machine runs is used.
ISAS = ("plain", "avx2", "avx512", "avx512_bf16")
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# What a call may return instead of 0, numbered as in plan.h.
_NO_MEMORY = 1
_FAULTS = {
    2: "row_sequence: every entry must be in 0 .. {sequences} - 1",
    3: "row_length: every entry must be in 0 .. {pages} * {page_size}",
    4: "page_table: every entry that a row needs must be in 0 .. {cache_pages} - 1",
    5: "slots: every entry must be in 0 .. {cache_pages} * {page_size} - 1",
    6: "tiers: every entry must be below {tiers}",
}


@dataclass(frozen=True)
class CpuKernel:
    """What is loaded: the instruction set in use and the library, or the reason there is none.

    `isas` is every instruction set this machine can run. `shares_openmp` says whether the threads
    are those of PyTorch's own OpenMP runtime. A library built into a temporary folder (the cache
    cannot be written) is gone from there once it is loaded.
    """

    isa: str | None
    library: Path | None
    reason: str | None = None
    isas: tuple[str, ...] = ()
    shares_openmp: bool = False


_lock = threading.Lock()
_loaded: tuple[CpuKernel, ctypes.CDLL | None] | None = None


def load() -> tuple[CpuKernel, ctypes.CDLL | None]:
    """Build and load at the first call; a failure is announced once and remembered."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def library_for(isa: str) -> ctypes.CDLL:
    """The library, for calls with this instruction set.

    Raises:
        ValueError: `isa` is not one that this machine runs.
    """
    kernel, library = load()
    if library is None or isa not in kernel.isas:
        raise ValueError(f"isa: {isa!r} must be one of {kernel.isas or 'none'} on this machine")
    return library


def raise_fault(fault: int, rows: int, **limits: int) -> None:
    """What a call returned, as an exception; nothing for 0.

    Raises:
        MemoryError: no room for what `rows` rows need.
        ValueError: a value that only the kernel looks at is out of the range that `limits` tell.
    """
    if fault == _NO_MEMORY:
        raise MemoryError(f"no room for the intermediate results of {rows} rows")
    if fault:
        raise ValueError(_FAULTS[fault].format(**limits))


def status() -> CpuKernel:
    """What the CPU backend runs in this process; builds the kernels if that has not happened."""
    return load()[0]


def _load() -> tuple[CpuKernel, ctypes.CDLL | None]:
    try:
        if not sys.platform.startswith("linux"):
            raise BuildError(f"not written for {sys.platform}")
        openmp = loaded_openmp()
        if openmp is not None:
            # Loaded already, but privately: this makes its symbols visible to our library.
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        library, path = _open(links_openmp=openmp is None)
    except (BuildError, OSError) as error:
        logger.warning("no CPU kernels (%s); using F.grouped_mm and F.linear instead", error)
        return CpuKernel(None, None, reason=str(error)), None
    _declare(library)
    isas = tuple(name for i, name in enumerate(ISAS) if library.dvpa_cpu_supports(i))
    kernel = CpuKernel(isas[-1], path, isas=isas, shares_openmp=openmp is not None)
    logger.info("CPU kernels: %s, %s", kernel.isa, path)
    return kernel, library


def _declare(library: ctypes.CDLL) -> None:
    """The C signatures, as in kernels.cpp: choices (int), sizes (int64), then pointers."""
    choices, size, pointer = [ctypes.c_int] * 3, ctypes.c_int64, ctypes.c_void_p
    library.dvpa_cpu_supports.argtypes = [ctypes.c_int]
    library.dvpa_cpu_moe_mlp.argtypes = [*choices, *[size] * 4, *[pointer] * 9]
    library.dvpa_cpu_sort_rows.argtypes = [*[size] * 3, *[pointer] * 6]
    library.dvpa_cpu_sort_rows.restype = size
    library.dvpa_cpu_linear.argtypes = [*choices, *[size] * 4, *[pointer] * 4]
    library.dvpa_cpu_rms_norm.argtypes = [*choices, *[size] * 2, ctypes.c_float, *[pointer] * 3]
    library.dvpa_cpu_rms_norm.restype = None
    library.dvpa_cpu_attention.argtypes = [*choices, *[size] * 8, ctypes.c_float, *[pointer] * 6]
    library.dvpa_cpu_swiglu.argtypes = [*choices, *[size] * 3, *[pointer] * 4]
    library.dvpa_cpu_route.argtypes = [*choices, *[size] * 5, *[pointer] * 7]
    library.dvpa_cpu_latent_rows.argtypes = [*choices, *[size] * 8, ctypes.c_float, ctypes.c_int]
    library.dvpa_cpu_latent_rows.argtypes += [pointer] * 8
    library.dvpa_cpu_layers.argtypes = [*choices, size, *[pointer] * 3, *[size] * 2]
    library.dvpa_cpu_layers.argtypes += [*[pointer] * 3, size]
    library.dvpa_cpu_layers.restype = size
    for name, pointers in (("gather", 3), ("add_rows", 4), ("activation", 2), ("slope", 6)):
        function = getattr(library, f"dvpa_cpu_train_{name}")
        function.argtypes = [*choices[:2], *[size] * 2, *[pointer] * pointers]
        function.restype = None


def _open(links_openmp: bool) -> tuple[ctypes.CDLL, Path]:
    """Load the library; one that the cache holds but that does not load is built once more."""
    for rebuild in (False, True):
        path = build(links_openmp, rebuild)
        try:
            return ctypes.CDLL(str(path)), path
        except OSError as error:
            if rebuild:
                raise
            logger.info("%s does not load (%s)", path, error)
        finally:
            if path.parent != cache_folder():  # a temporary one: loaded code needs no file
                shutil.rmtree(path.parent, ignore_errors=True)
    raise AssertionError("the second round returns or raises")


def sort_rows_cpu(
    topk_index: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """The columns of a `RowRouting` from a table [T, K] in one pass, or None without the library.

    Returns:
        (order int64 [R], the slot of each row; token_index; expert_offsets; token_rows;
        token_offsets).

    Raises:
        ValueError: an index is outside 0 .. num_experts.
    """
    _, library = load()
    if library is None:
        return None
    index = topk_index.long().contiguous()
    tokens, slots = index.shape
    by_row = torch.empty(2, tokens * slots, dtype=torch.int64)
    sizes = (num_experts + 1, tokens * slots, tokens + 1)
    expert_offsets, token_rows, token_offsets = torch.empty(sum(sizes), dtype=torch.int32).split(
        sizes
    )
    columns = (*by_row, expert_offsets, token_rows, token_offsets)
    rows = library.dvpa_cpu_sort_rows(
        tokens, slots, num_experts, index.data_ptr(), *(column.data_ptr() for column in columns)
    )
    if rows == -1:
        raise ValueError(
            f"topk_index: {int(index.min())} .. {int(index.max())} must be in 0 .. {num_experts}"
        )
    if rows < 0:
        raise MemoryError(f"no room to count the rows of {num_experts} experts")
    order, token_index = by_row[:, :rows]
    return order, token_index, expert_offsets, token_rows[:rows], token_offsets


def run_kernel(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: RowRouting, isa: str, threads: int
) -> Tensor:
    """One call of the kernel: y [T, D] in the dtype of x. The operands are sound (`ops.moe_mlp`).

    Raises:
        ValueError: `isa` is not one that this machine runs.
        MemoryError: no room for the intermediate rows.
    """
    library = library_for(isa)
    x = x.contiguous()
    y = torch.empty_like(x)
    # Named, so that a converted or copied column lives until the call returns.
    weight = routing.weight.detach().float().contiguous()
    columns = (
        routing.token_index.contiguous(),
        routing.expert_offsets.contiguous(),
        routing.token_rows.contiguous(),
        routing.token_offsets.contiguous(),
    )
    failed = library.dvpa_cpu_moe_mlp(
        ISAS.index(isa),
        FORMATS[x.dtype],
        threads,
        x.shape[0],
        x.shape[1],
        w_down.shape[2],
        w_down.shape[0],
        x.data_ptr(),
        w_gate_up.data_ptr(),
        w_down.data_ptr(),
        weight.data_ptr(),
        *(column.data_ptr() for column in columns),
        y.data_ptr(),
    )
    if failed:
        raise MemoryError(f"no room for the intermediate rows of {x.shape[0]} tokens")
    return y
