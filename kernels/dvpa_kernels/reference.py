"""The oracle every backend is compared with: one expert after the other, nothing clever.

Letters: T tokens, D hidden, F expert width, E experts, R rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa_kernels.routing import RowRouting


def moe_mlp_reference(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, routing: RowRouting
) -> Tensor:
    """`y[t] = sum_r weight[r] * down[e] (silu(gate[e] x[t]) * up[e] x[t])` over the rows r of t."""
    y_TD = torch.zeros_like(x_TD)
    bounds = routing.expert_offsets.tolist()
    for expert in range(routing.num_experts):
        rows = slice(bounds[expert], bounds[expert + 1])
        token = routing.token_index[rows]
        gate, up = F.linear(x_TD[token], gate_up_E2FD[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down_EDF[expert])
        y_TD = y_TD.index_add(0, token, (out * routing.weight[rows, None]).to(y_TD.dtype))
    return y_TD
