"""The portable backend: `F.grouped_mm` over rows sorted by expert, on any device PyTorch runs on.

Letters: T tokens, D hidden, F expert width, E experts, R rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa_kernels.reference import moe_mlp_reference
from dvpa_kernels.routing import RowRouting

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_ALIGNMENT = 16  # bytes; what grouped_mm asks of every row


def moe_mlp_torch(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, routing: RowRouting
) -> Tensor:
    """As `moe_mlp_reference`, with two grouped GEMMs; differentiable in every floating input.

    What `grouped_mm` refuses (no rows, rows of an odd size, fp64) goes to the reference itself.
    """
    widths = (x_TD.shape[1] * x_TD.itemsize, down_EDF.shape[2] * x_TD.itemsize)
    aligned = not any(width % ROW_ALIGNMENT for width in widths)
    if not aligned or x_TD.dtype not in GROUPED_DTYPES or routing.token_index.numel() == 0:
        return moe_mlp_reference(x_TD, gate_up_E2FD, down_EDF, routing)
    ends_E = routing.expert_offsets[1:]
    x_RD = x_TD.index_select(0, routing.token_index)
    gate_RF, up_RF = F.grouped_mm(x_RD, gate_up_E2FD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    out_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, down_EDF.transpose(1, 2), offs=ends_E)
    weighted_RD = (out_RD * routing.weight[:, None]).to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, routing.token_index, weighted_RD)
