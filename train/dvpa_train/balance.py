"""Auxiliary-loss-free load balancing, per tier (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

After an optimizer step every expert of a tier's pool whose load was above that tier's mean gets a
slightly lower selection bias, the others a slightly higher one. Biases choose experts and never
weigh them, so no gradient is involved.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM, Routing
from dvpa_train.processes import Processes

FloatArray = npt.NDArray[np.float64]


class LoadBalancer:
    """Counts routed rows per layer, tier and expert, and moves the selection biases."""

    def __init__(self, model: DvpaForCausalLM, among: Processes | None = None) -> None:
        config, self.among = model.config, among or Processes()
        layers: list[Any] = list(model.model.layers)  # ModuleList hides their class
        # The last one may be the multi-token prediction module's, which not every step runs.
        self.routers = [layer.mlp.gate for layer in layers if layer.is_moe]
        self.pools = [config.pool_size(tier) for tier in range(config.num_tiers)]
        self.has_quotas = config.gate == "group_quota"
        self.num_experts = config.n_routed_experts
        self.load = torch.zeros(len(self.routers), len(self.pools), self.num_experts)
        self.last_load = torch.zeros_like(self.load)  # of the last step, of all processes

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
        """Move every tier's biases by `rate` toward even load; the counts become `last_load`."""
        if rate:
            for layer, router in enumerate(self.routers):
                start = 0
                for tier, pool in enumerate(self.pools):
                    load = self.load[layer, tier, :pool]
                    if self.has_quotas:  # among those that the tier adds, at all tiers with them
                        load = self.load[layer, tier:, start:pool].sum(0)
                    step = rate * torch.sign(load.mean() - load)
                    router.tier_bias[tier, pool - len(load) : pool] += step.to(router.tier_bias)
                    start = pool
        self.last_load, self.load = self.load, torch.zeros_like(self.load)


def load_metrics(load: Tensor, config: DvpaConfig) -> dict[str, float]:
    """How evenly the rows of one step fell on the experts, by tier name and group.

    MaxVio is max / mean load - 1 over the experts of a layer; its mean over layers is MaxVio_batch
    of Wang et al. (arXiv 2408.15664). The worst layer's is given as well, and the mean inside each
    group. `load_share` is a group's part of its tier's rows. Layers that have not run at a tier and
    groups without rows have no MaxVio.

    Args:
        load: rows [MoE layers, tiers, experts].
    """
    found: dict[str, float] = {}
    counts = load.double().cpu().numpy()
    for tier, name in enumerate(config.tier_names):
        own = counts[:, tier, : config.pool_size(tier)]
        own = own[own.sum(-1) > 0]
        if not len(own):
            continue
        violation = _max_violation(own)
        found[f"balance/max_violation/{name}"] = float(violation.mean())
        found[f"balance/max_violation_worst_layer/{name}"] = float(violation.max())
        found[f"balance/dead_experts/{name}"] = float((own == 0).sum())
        groups = own.reshape(len(own), -1, config.unit_size)
        shares = groups.sum(-1) / own.sum(-1, keepdims=True)
        for group in range(groups.shape[1]):
            inside, place = groups[:, group], f"{name}/group_{group}"
            found[f"balance/load_share/{place}"] = float(shares[:, group].mean())
            found[f"balance/dead_experts/{place}"] = float((inside == 0).sum())
            used = inside[inside.sum(-1) > 0]
            if len(used):
                found[f"balance/max_violation/{place}"] = float(_max_violation(used).mean())
    return found


def _max_violation(load: FloatArray) -> FloatArray:
    """Of each row of counts [N, experts]; every row has some."""
    violation: FloatArray = load.max(-1) / load.mean(-1) - 1
    return violation
