"""The compiled half of the training path: what an expert's rows meet between its products.

Letters: T tokens, D hidden, F expert width, B rows of a block.
"""

import ctypes

import torch
from torch import Tensor

from dvpa_kernels.cpu.library import ISAS, library_for, status
from dvpa_kernels.per_expert import RowOps


def row_ops(dtype: torch.dtype) -> RowOps:
    """The compiled operations for fp32 where they can be built, else PyTorch's."""
    isa = status().isa
    return CompiledRowOps(isa) if isa is not None and dtype == torch.float32 else RowOps()


class CompiledRowOps(RowOps):
    """`RowOps` in one pass over memory each; fp32, all operands contiguous and on the CPU.

    Raises:
        ValueError: `isa` is not one that this machine runs.
    """

    def __init__(self, isa: str) -> None:
        self._library: ctypes.CDLL = library_for(isa)
        self._choice = (ISAS.index(isa), torch.get_num_threads())

    def gather(self, source_TD: Tensor, token_B: Tensor, out_BD: Tensor) -> None:
        """As `RowOps.gather`."""
        self._library.dvpa_cpu_train_gather(
            *self._choice,
            *out_BD.shape,
            source_TD.data_ptr(),
            token_B.data_ptr(),
            out_BD.data_ptr(),
        )

    def add(
        self, sums_TD: Tensor, token_B: Tensor, values_BD: Tensor, weight_B: Tensor | None
    ) -> None:
        """As `RowOps.add`."""
        self._library.dvpa_cpu_train_add_rows(
            *self._choice,
            *values_BD.shape,
            values_BD.data_ptr(),
            token_B.data_ptr(),
            None if weight_B is None else weight_B.data_ptr(),
            sums_TD.data_ptr(),
        )

    def activation(self, h_B2F: Tensor, act_BF: Tensor) -> None:
        """As `RowOps.activation`."""
        self._library.dvpa_cpu_train_activation(
            *self._choice, *act_BF.shape, h_B2F.data_ptr(), act_BF.data_ptr()
        )

    def slope(self, h_B2F: Tensor, d_act_BF: Tensor, weight_B: Tensor, *out: Tensor) -> None:
        """As `RowOps.slope`."""
        tensors = (h_B2F, d_act_BF, weight_B, *out)
        self._library.dvpa_cpu_train_slope(
            *self._choice, *d_act_BF.shape, *(tensor.data_ptr() for tensor in tensors)
        )
