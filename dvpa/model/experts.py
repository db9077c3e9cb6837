"""Nested routed experts beside the shared ones (DeepSeekMoE, arXiv 2401.06066, section 3).

Letters: T tokens, D hidden, E routed experts, F expert width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvpa.config import DvpaConfig
from dvpa.model.router import DvpaRouter, Routing, TierPlan
from dvpa.ops import expert_mlp


class DvpaMLP(nn.Module):
    """SwiGLU feed-forward: the dense trunk layers and the shared experts."""

    def __init__(self, config: DvpaConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DvpaExperts(nn.Module):
    """All routed experts, stacked; a tier is the slice of its pool. Saved one by one, as in V3."""

    def __init__(self, config: DvpaConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.backend = "auto"  # or a key of dvpa_kernels.BACKENDS

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's experts; outside every pool present none is touched."""
        pool = routing.scores.shape[1]
        return expert_mlp(
            hidden_TD,
            self.gate_up_proj[:pool],
            self.down_proj[:pool],
            routing.topk_index.clamp(max=pool),
            routing.topk_weight,
            self.backend,
        )


class DvpaMoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: DvpaConfig) -> None:
        super().__init__()
        self.gate = DvpaRouter(config)
        self.experts = DvpaExperts(config)
        shared_width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = DvpaMLP(config, shared_width) if shared_width else None

    def forward(self, hidden_BSD: Tensor, plan: TierPlan, **kwargs: Any) -> tuple[Tensor, Routing]:
        """[B, S, D] -> ([B, S, D], what the router decided)."""
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        routing = self.gate(hidden_TD, plan)
        out = self.experts(hidden_TD, routing).view_as(hidden_BSD)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden_BSD)
        return out, routing
