"""Auxiliary-loss-free load balancing, per tier (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

After an optimizer step every expert of a tier's pool whose load was above that tier's mean gets a
slightly lower selection bias, the others a slightly higher one. Biases choose experts and never
weigh them, so no gradient is involved.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dvpa.model import DvpaForCausalLM, Routing
from dvpa_train.processes import Processes


class LoadBalancer:
    """Counts routed rows per layer, tier and expert, and moves the selection biases."""

    def __init__(self, model: DvpaForCausalLM, among: Processes | None = None) -> None:
        config, self.among = model.config, among or Processes()
        layers: list[Any] = list(model.model.layers)  # ModuleList hides their class
        # The last one may be the multi-token prediction module's, which not every step runs.
        self.routers = [layer.mlp.gate for layer in layers if layer.is_moe]
        self.pools = [config.pool_size(tier) for tier in range(config.num_tiers)]
        self.group_size = config.unit_size
        self.num_experts = config.n_routed_experts
        self.load = torch.zeros(len(self.routers), len(self.pools), self.num_experts)

    @torch.no_grad()
    def observe(self, routing: Sequence[Routing]) -> None:
        """Add one forward pass's rows to the counts; layers in order, as many as have run."""
        experts, tiers = self.num_experts, len(self.pools)
        for layer, routed in enumerate(routing):
            used = (routed.topk_index < experts) & (routed.tiers >= 0)[:, None]
            cell = routed.tiers[:, None] * experts + routed.topk_index
            count = torch.bincount(cell[used], minlength=tiers * experts)
            self.load[layer] += count.view(tiers, experts).to(self.load)

    def gather(self) -> None:
        """Count the rows of all processes."""
        self.load = self.among.sum(self.load)

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Move every tier's biases by `rate` toward even load, and forget the counts."""
        if rate:
            for layer, router in enumerate(self.routers):
                for tier, pool in enumerate(self.pools):
                    load = self.load[layer, tier, :pool]
                    step = rate * torch.sign(load.mean() - load)
                    router.tier_bias[tier, :pool] += step.to(router.tier_bias)
        self.load.zero_()

    def max_violation(self) -> dict[str, float]:
        """MaxVio (max / mean load - 1, worst layer) and dead experts, per tier and per group."""
        out: dict[str, float] = {}
        for tier, pool in enumerate(self.pools):
            load = self.load[:, tier, :pool]
            load = load[load.sum(-1) > 0]  # layers that have run at this tier
            if not len(load):
                continue
            out[f"max_violation/tier_{tier}"] = _violation(load)
            out[f"dead_experts/tier_{tier}"] = float((load == 0).sum())
            groups = load.view(len(load), -1, self.group_size)
            for group in range(groups.shape[1]):
                if groups[:, group].sum():
                    out[f"max_violation/tier_{tier}/group_{group}"] = _violation(groups[:, group])
                out[f"dead_experts/tier_{tier}/group_{group}"] = float(
                    (groups[:, group] == 0).sum()
                )
        return out


def _violation(load: Tensor) -> float:
    mean = load.mean(-1).clamp(min=1e-9)
    return float((load.amax(-1) / mean - 1).max())
