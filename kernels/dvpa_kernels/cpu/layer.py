"""One decoder layer of a decode step in one call of C++.

Bitwise what the single operators of this package give one after the other (`rms_norm`, `linear`,
`latent_rows`, `latent_attention`, `swiglu`, `route`, `moe_mlp`, additions in this order), for any
number of threads and whatever the other rows are; about ninety small calls less.

Letters: T rows, D hidden, P rope dims, C latent, F width, S sequences, M pages of one.
"""

import ctypes
import threading

import torch
from torch import Tensor

from dvpa_kernels.cpu.dense import kernel_isa
from dvpa_kernels.cpu.layer_weights import AttentionWeights, RoutedWeights, layer_struct
from dvpa_kernels.cpu.library import FORMATS, ISAS, library_for, raise_fault

DECODE_ROWS = 64  # more are left to the single operators: prompts, whose attention is not absorbed


class _Batch(ctypes.Structure):
    """`Batch` of layer.inc."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "pages")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "slots", "page_table")),
        *((name, ctypes.c_void_p) for name in ("row_sequence", "row_length", "tiers")),
    )


class _Scratch(threading.local):
    """A thread's memory for intermediate results; grows and stays."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


class DecodeRows:
    """The rows of a step, the same for every layer; checked once.

    Args:
        cos: [T, P], of each row's position, in the dtype of the hidden states; sin: likewise.
        slots: int64 [T], where in the cache a row goes (page * page_size + offset), no two alike.
        page_table: int32 [S, M].
        row_sequence: int32 [T], rows of `page_table`.
        row_length: int32 [T], positions that a row sees, its own among them.
        tiers: int64 [T]; negative: no experts.

    Raises:
        ValueError: shapes or dtypes that do not fit together, no row, or more than `DECODE_ROWS`.
    """

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        page_table: Tensor,
        row_sequence: Tensor,
        row_length: Tensor,
        tiers: Tensor,
    ) -> None:
        self.count, self.rope = cos.shape
        self.dtype = cos.dtype
        if not 1 <= self.count <= DECODE_ROWS:
            raise ValueError(f"cos: {self.count} rows must be 1 .. {DECODE_ROWS}")
        if page_table.dim() != 2:
            raise ValueError(f"page_table: shape {tuple(page_table.shape)} must be [S, M]")
        each, rows = (self.count,), {"slots": slots, "tiers": tiers}
        for name, value, shape, dtype in (
            ("sin", sin, cos.shape, self.dtype),
            *((name, value, each, torch.int64) for name, value in rows.items()),
            ("page_table", page_table, page_table.shape, torch.int32),
            ("row_sequence", row_sequence, each, torch.int32),
            ("row_length", row_length, each, torch.int32),
        ):
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(
                    f"{name}: {value.dtype} {tuple(value.shape)} must be {dtype} {tuple(shape)}"
                )
        given = (cos, sin, slots, page_table, row_sequence, row_length, tiers)
        self._tensors = tuple(value.contiguous() for value in given)
        self.sequences, self.pages = page_table.shape
        sizes = (self.count, self.sequences, self.pages)
        self._struct = _Batch(*sizes, *(value.data_ptr() for value in self._tensors))
        self.address = ctypes.addressof(self._struct)


class DecodeLayer:
    """One decoder layer over rows of single positions, in place; keeps its weights alive.

    hidden += attention(norm(hidden)), then hidden += mlp(normed) and hidden += experts(normed),
    normed = norm(hidden); attention in the absorbed form, rows enter the cache first.

    Args:
        attention_norm: [D].
        attention: its weights.
        mlp_norm: [D].
        eps: of these two norms.
        mlp: (gate_up [2F, D], down [D, F]) of the dense MLP or the shared experts, or None.
        routed: the router and its experts, or None.
        returns_normed: the experts are the caller's: a call returns their input.
        isa: force an instruction set (one of `status().isas`); for tests.

    Raises:
        ValueError: tensors that do not fit together or are not contiguous, `isa` is not one of this
            machine's, or `is_possible` is false for the weights.
    """

    def __init__(
        self,
        *,
        attention_norm: Tensor,
        attention: AttentionWeights,
        mlp_norm: Tensor,
        eps: float,
        mlp: tuple[Tensor, Tensor] | None = None,
        routed: RoutedWeights | None = None,
        returns_normed: bool = False,
        isa: str | None = None,
    ) -> None:
        isa = isa or kernel_isa(attention_norm)
        if isa is None:
            raise ValueError(
                f"attention_norm: {attention_norm.dtype} on {attention_norm.device} must be fp32, "
                "bf16 or fp16 on a CPU with the C++ library"
            )
        self._struct = struct = layer_struct(attention_norm, attention, mlp_norm, eps, mlp, routed)
        self._address = ctypes.addressof(struct)
        self._hidden, self._rope = struct.hidden, struct.rope
        self._row = struct.latent + struct.rope
        self._num_tiers = 0 if routed is None else len(routed.table.pool_sizes)
        self._dtype, self._returns_normed = attention_norm.dtype, returns_normed
        self._run = library_for(isa).dvpa_cpu_layer
        self._choice = (ISAS.index(isa), FORMATS[self._dtype])

    @staticmethod
    def is_possible(weight: Tensor) -> bool:
        """Whether layers of such weights run here: fp32, bf16 or fp16 on a CPU with the library."""
        return kernel_isa(weight) is not None

    def __call__(
        self, hidden: Tensor, cache: Tensor, rows: DecodeRows, threads: int | None = None
    ) -> Tensor | None:
        """Overwrite `hidden` [T, D] and the rows' places in `cache` [num_pages, page_size, C + P].

        Both contiguous. `threads`: at most so many; else PyTorch's number.

        Returns:
            [T, D], the routed experts' input, if the layer was made to return it.

        Raises:
            ValueError: tensors that do not fit, or an index out of range; nothing was written.
            MemoryError: no room for the intermediate results.
        """
        dtype, pages = self._dtype, cache.shape
        if hidden.shape != (rows.count, self._hidden) or hidden.dtype != dtype:
            raise ValueError(
                f"hidden: {hidden.dtype} {tuple(hidden.shape)} must be {dtype} "
                f"{(rows.count, self._hidden)}"
            )
        if len(pages) != 3 or pages[2] != self._row or cache.dtype != dtype:
            raise ValueError(
                f"cache: {cache.dtype} {tuple(pages)} must be {dtype} "
                f"[num_pages, page_size, {self._row}]"
            )
        if rows.dtype != dtype or rows.rope != self._rope:
            raise ValueError(
                f"cos: {rows.dtype} [T, {rows.rope}] must be {dtype} [T, {self._rope}]"
            )
        if not (hidden.is_contiguous() and cache.is_contiguous()):
            raise ValueError(
                f"hidden, cache: strides {hidden.stride()}, {cache.stride()} must be contiguous"
            )
        normed = torch.empty_like(hidden) if self._returns_normed else None
        threads = threads or torch.get_num_threads()
        while True:
            memory = _scratch.memory
            fault = self._run(
                *self._choice,
                threads,
                self._address,
                rows.address,
                pages[0],
                pages[1],
                hidden.data_ptr(),
                cache.data_ptr(),
                None if normed is None else normed.data_ptr(),
                memory.data_ptr(),
                memory.numel(),
            )
            if fault <= 0:
                break
            _scratch.memory = torch.empty(fault, dtype=torch.uint8)
        if fault:
            raise_fault(
                -fault,
                rows.count,
                sequences=rows.sequences,
                pages=rows.pages,
                page_size=pages[1],
                cache_pages=pages[0],
                tiers=self._num_tiers,
            )
        return normed
