"""Hierarchical routing, tier -> group -> expert: DeepSeek-V3's gate with one bias per tier.

The gate is that of arXiv 2412.19437, section 2.1.2. With `scoring_func: softmax` scores are a
softmax over the tier's own pool, so that a tier is what a model of these experts alone computes;
with `topk_method: group_limited_greedy` a group's score is its best choice (both as in DeepSeek-V2,
arXiv 2405.04434, section 2.1.2).

Two gates are ablations of it, which no other model computes. `fixed_denominator`: weights are
scores over the sum of what the base tier would choose, so that an expert weighs the same at every
tier that has it. `group_quota`: that, and tier t adds its `top_k[t] - top_k[t-1]` best among the
experts that its pool adds, so that its choice is the lower tier's and more.

Letters: T tokens, D hidden, E routed experts, P experts in the largest pool, G groups, K slots.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvpa.config import DvpaConfig
from dvpa.model.precision import Fp32Buffers

NO_TIER = -1  # a padding position: it brings no expert rows


@dataclass(frozen=True)
class TierPlan:
    """The tier of each position, int64 [B, S] (or `NO_TIER`), and the largest among them."""

    tiers: Tensor
    max_tier: int


@dataclass(frozen=True)
class Routing:
    """What one layer's router decided.

    `topk_index` int64 [T, K] (E means an empty slot), `topk_weight` fp32 [T, K] (0 there), `scores`
    fp32 [T, P] before the bias, `tiers` int64 [T].
    """

    topk_index: Tensor
    topk_weight: Tensor
    scores: Tensor
    tiers: Tensor


class DvpaRouter(Fp32Buffers):
    """Scores over the pool; the tier's bias chooses, the unbiased score weighs."""

    tier_bias: Tensor  # fp32 [tiers, E]

    def __init__(self, config: DvpaConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.register_buffer(
            "tier_bias",
            torch.zeros(config.num_tiers, config.n_routed_experts, dtype=torch.float32),
        )

    def forward(self, hidden_TD: Tensor, plan: TierPlan) -> Routing:
        """Route T tokens, each inside the pool of its own tier (design: section 4)."""
        config, tiers_T = self.config, plan.tiers.reshape(-1)
        pool = config.pool_size(plan.max_tier)
        top_k = [tier.top_k for tier in config.tiers]
        known_T = tiers_T.clamp(min=0)
        pool_T = self._per_tier([config.pool_size(t) for t in range(config.num_tiers)], known_T)
        outside = torch.arange(pool, device=pool_T.device) >= pool_T[:, None]
        scores_TP = F.linear(hidden_TD.float(), self.weight[:pool].float())
        if config.scoring_func == "softmax":
            scores_TP = scores_TP.masked_fill(outside, float("-inf")).softmax(-1)
        else:
            scores_TP = scores_TP.sigmoid()
        if config.gate == "group_quota":
            index_TK = self._by_quota(scores_TP, plan.max_tier)
        else:
            choice_TP = scores_TP + self.tier_bias[known_T, :pool]
            choice_TP = choice_TP.masked_fill(outside, float("-inf"))
            choice_TP = self._limit_groups(choice_TP, known_T, plan.max_tier)
            index_TK = choice_TP.topk(max(top_k[: plan.max_tier + 1]), dim=-1).indices

        weight_TK = scores_TP.gather(1, index_TK)
        top_k_T = self._per_tier(top_k, known_T).masked_fill(tiers_T == NO_TIER, 0)
        empty = torch.arange(index_TK.shape[1], device=top_k_T.device) >= top_k_T[:, None]
        weight_TK = weight_TK.masked_fill(empty, 0.0)
        if config.gate != "deepseek_v3":
            weight_TK = weight_TK / (self._base_sum(scores_TP) + 1e-20)
        elif config.norm_topk_prob:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        scale_T = self._per_tier([t.routed_scaling_factor for t in config.tiers], known_T)
        return Routing(
            topk_index=index_TK.masked_fill(empty, config.n_routed_experts),
            topk_weight=weight_TK * scale_T[:, None],
            scores=scores_TP,
            tiers=tiers_T,
        )

    def _by_quota(self, scores_TP: Tensor, max_tier: int) -> Tensor:
        """Slots in order of the tiers that add them; each by the bias of the tier that does."""
        slots, start, top_k = [], 0, 0
        for tier, routing in enumerate(self.config.tiers[: max_tier + 1]):
            end, quota = self.config.pool_size(tier), routing.top_k - top_k
            choice = scores_TP[:, start:end] + self.tier_bias[tier, start:end]
            slots.append(choice.topk(quota, dim=-1).indices + start)
            start, top_k = end, routing.top_k
        return torch.cat(slots, dim=-1)

    def _base_sum(self, scores_TP: Tensor) -> Tensor:
        """The sum [T, 1] of the scores that the base tier would choose."""
        base_TP = scores_TP[:, : self.config.pool_size(0)]
        choice_TP = base_TP + self.tier_bias[0, : base_TP.shape[1]]
        if self.config.gate != "group_quota":
            tiers_T = torch.zeros(len(choice_TP), dtype=torch.long, device=choice_TP.device)
            choice_TP = self._limit_groups(choice_TP, tiers_T, 0)
        index_TK = choice_TP.topk(self.config.tiers[0].top_k, dim=-1).indices
        return base_TP.gather(1, index_TK).sum(-1, keepdim=True)

    def _limit_groups(self, choice_TP: Tensor, tiers_T: Tensor, max_tier: int) -> Tensor:
        """Keep each tier's best `topk_group` groups, by the sum of their best (two) choices."""
        config = self.config
        present = config.tiers[: max_tier + 1]
        if all(tier.topk_group == tier.num_groups for tier in present):
            return choice_TP  # every group of the pool stays: nothing to limit
        if config.pool == "striped":
            choice_TGE = choice_TP.view(len(choice_TP), -1, config.n_group).transpose(1, 2)
        else:
            choice_TGE = choice_TP.view(len(choice_TP), -1, config.group_size)
        best = 2 if config.topk_method == "noaux_tc" else 1
        group_TG = choice_TGE.topk(best, dim=-1).values.sum(-1)
        best_TG = group_TG.topk(max(tier.topk_group for tier in present), dim=-1).indices
        limit_T = self._per_tier([tier.topk_group for tier in config.tiers], tiers_T)
        kept = torch.arange(best_TG.shape[1], device=best_TG.device) < limit_T[:, None]
        mask_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(1, best_TG, kept)
        choice_TGE = choice_TGE.masked_fill(~mask_TG[..., None], float("-inf"))
        return (choice_TGE.mT if config.pool == "striped" else choice_TGE).flatten(1)

    @staticmethod
    def _per_tier(values: list[int] | list[float], tiers_T: Tensor) -> Tensor:
        return torch.tensor(values, device=tiers_T.device)[tiers_T]
