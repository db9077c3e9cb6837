"""The decoder layers of a decode step in one call of C++.

Bitwise what the single operators of this package give one after the other (`rms_norm`, `linear`,
`latent_rows`, `latent_attention`, `swiglu`, `route`, `moe_mlp`, additions in this order), for any
number of threads and whatever the other rows are; about ninety small calls a layer less.

Letters: T rows, D hidden, P rope dims, C latent, F width, S sequences, M pages of one.
"""

import ctypes
import threading
from collections.abc import Sequence

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
    """One decoder layer over rows of single positions, for `DecodeLayers`; keeps its weights alive.

    hidden += attention(norm(hidden)), then hidden += mlp(normed) and hidden += experts(normed),
    normed = norm(hidden); attention in the absorbed form, rows enter the cache first.

    Args:
        attention_norm: [D].
        attention: its weights.
        mlp_norm: [D].
        eps: of these two norms.
        mlp: (gate_up [2F, D], down [D, F]) of the dense MLP or the shared experts, or None.
        routed: the router and its experts, or None.
        returns_normed: the experts are the caller's, who is given their input.
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
        self.library = library_for(isa)
        self.isa, self.dtype, self.returns_normed = isa, attention_norm.dtype, returns_normed
        self.struct = layer_struct(attention_norm, attention, mlp_norm, eps, mlp, routed)
        self.hidden, self.rope = self.struct.hidden, self.struct.rope
        self.num_tiers = 0 if routed is None else len(routed.table.pool_sizes)

    @property
    def row_width(self) -> int:
        """C + P, what the cache holds of a position."""
        return int(self.struct.latent) + int(self.struct.rope)

    @staticmethod
    def is_possible(weight: Tensor) -> bool:
        """Whether layers of such weights run here: fp32, bf16 or fp16 on a CPU with the library."""
        return kernel_isa(weight) is not None


class DecodeLayers:
    """Consecutive layers, each over its own cache [num_pages, page_size, C + P].

    Raises:
        ValueError: layers or caches that do not fit together, or a layer before the last whose
            experts are the caller's.
    """

    def __init__(self, layers: Sequence[DecodeLayer], caches: Sequence[Tensor]) -> None:
        if not layers or len(layers) != len(caches):
            raise ValueError(f"caches: {len(caches)} must be one for each of {len(layers)} layers")
        self._dtype, self._hidden, self._rope = layers[0].dtype, layers[0].hidden, layers[0].rope
        self._shape = (*caches[0].shape[:2], layers[0].row_width)
        for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            if (layer.dtype, layer.hidden, layer.rope) != (self._dtype, self._hidden, self._rope):
                raise ValueError(f"layers[{i}]: must have the sizes and the dtype of layers[0]")
            if cache.shape != self._shape or cache.dtype != self._dtype:
                raise ValueError(
                    f"caches[{i}]: {cache.dtype} {tuple(cache.shape)} must be {self._dtype} "
                    f"{self._shape}"
                )
            if not cache.is_contiguous():
                raise ValueError(f"caches[{i}]: strides {cache.stride()} must be contiguous")
            if layer.returns_normed and layer is not layers[-1]:
                raise ValueError(f"layers[{i}]: only the last may leave its experts to the caller")
        self._num_tiers = max(layer.num_tiers for layer in layers)
        self._returns_normed = layers[-1].returns_normed
        self._kept = (tuple(layers), tuple(caches))  # alive: C++ has pointers
        pointers = ctypes.c_void_p * len(layers)
        self._layers = pointers(*(ctypes.addressof(layer.struct) for layer in layers))
        self._caches = pointers(*(cache.data_ptr() for cache in caches))
        self._run = layers[0].library.dvpa_cpu_layers
        self._choice = (ISAS.index(layers[0].isa), FORMATS[self._dtype])
        arrays = (self._layers, self._caches)
        self._operands = (len(layers), *(ctypes.addressof(array) for array in arrays))

    def __call__(
        self, hidden: Tensor, rows: DecodeRows, threads: int | None = None
    ) -> Tensor | None:
        """Overwrite `hidden` [T, D], contiguous, and the rows' places in the caches.

        `threads`: at most so many; else PyTorch's number.

        Returns:
            [T, D], the input of the last layer's experts, if they are the caller's.

        Raises:
            ValueError: tensors that do not fit, or an index out of range; nothing was written.
            MemoryError: no room for the intermediate results.
        """
        dtype = self._dtype
        if hidden.shape != (rows.count, self._hidden) or hidden.dtype != dtype:
            raise ValueError(
                f"hidden: {hidden.dtype} {tuple(hidden.shape)} must be {dtype} "
                f"{(rows.count, self._hidden)}"
            )
        if not hidden.is_contiguous():
            raise ValueError(f"hidden: strides {hidden.stride()} must be contiguous")
        if rows.dtype != dtype or rows.rope != self._rope:
            raise ValueError(
                f"cos: {rows.dtype} [T, {rows.rope}] must be {dtype} [T, {self._rope}]"
            )
        normed = torch.empty_like(hidden) if self._returns_normed else None
        threads = threads or torch.get_num_threads()
        while True:
            memory = _scratch.memory
            fault = self._run(
                *self._choice,
                threads,
                *self._operands,
                rows.address,
                *self._shape[:2],
                hidden.data_ptr(),
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
                page_size=self._shape[1],
                cache_pages=self._shape[0],
                tiers=self._num_tiers,
            )
        return normed
