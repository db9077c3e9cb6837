"""The router for inference, tier -> group -> expert: C++ on CPUs, PyTorch's operators elsewhere.

The gate of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) with one selection bias per tier; or that
of DeepSeek-V2 (arXiv 2405.04434, section 2.1.2) and other softmax gates, over a tier's own pool.

Letters: T tokens, D hidden, E routed experts, P experts in the largest pool, G groups, K slots.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa_kernels.cpu.router import route_cpu


@dataclass(frozen=True)
class RouterTable:
    """What each tier may choose, base first; a tier's pool is the first experts.

    Raises:
        ValueError: fields of different lengths, or a tier that its pool cannot serve.
    """

    pool_sizes: tuple[int, ...]  # experts
    top_k: tuple[int, ...]  # experts of one token
    topk_group: tuple[int, ...]  # groups they may come from
    scaling: tuple[float, ...]  # factor of the weights
    group_size: int
    norm_topk_prob: bool  # weights sum to the factor
    softmax: bool = False  # scores: softmax over the tier's pool; else sigmoid
    best_of_group: int = 2  # a group's score: the sum of so many of its best choices, 1 or 2
    stripes: int = 0  # groups of striped pools: expert e is of group e % stripes; 0: contiguous

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("top_k", "topk_group", "scaling"):
            if len(getattr(self, name)) != len(self.pool_sizes):
                raise ValueError(f"{name}: {getattr(self, name)} must have one entry for each tier")
        if self.best_of_group not in (1, 2):
            raise ValueError(f"best_of_group: {self.best_of_group} must be 1 or 2")
        for tier, pool in enumerate(self.pool_sizes):
            groups, top_k = self.topk_group[tier], self.top_k[tier]
            unit = self.stripes or self.group_size
            if pool <= 0 or pool % unit:
                name = "stripes" if self.stripes else "group_size"
                raise ValueError(f"pool_sizes: {pool} must be a multiple of {name} {unit}")
            members = self.members(tier)
            is_limited = groups * members < pool
            if groups < 1 or (is_limited and members < self.best_of_group):
                raise ValueError(
                    f"topk_group: {groups} must be at least 1, and all of {pool // members}"
                    f" where groups have one expert"
                )
            if not 1 <= top_k <= min(groups * members, pool):
                raise ValueError(f"top_k: {top_k} must be in 1 .. {min(groups * members, pool)}")

    def members(self, tier: int) -> int:
        """Experts of a group that the tier may choose."""
        return self.pool_sizes[tier] // self.stripes if self.stripes else self.group_size

    def num_slots(self, max_tier: int) -> int:
        """K where no tier above this one is present."""
        return max(self.top_k[: max_tier + 1], default=0)


def route(
    hidden: Tensor,
    weight: Tensor,
    tier_bias: Tensor,
    tiers: Tensor,
    table: RouterTable,
    max_tier: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Each token's experts in falling order of choice: score plus its tier's bias.

    Only experts of the tier's pool and, where the tier is limited to some groups, of those whose
    best choices (`best_of_group` of them) have the largest sums. Of equals the lower index goes
    first (PyTorch, on other devices, promises no order). Scores are fp32. On CPUs a token's result
    does not depend on the others; PyTorch does it in the cases that `linear` names.

    Args:
        hidden: [T, D].
        weight: [E, D], contiguous, in the dtype of `hidden`.
        tier_bias: fp32 [tiers, E], contiguous.
        tiers: int64 [T]; negative: no experts.
        table: the tiers' limits.
        max_tier: none of `tiers` is above; looked up (on GPUs, waited for) if not given.

    Returns:
        (int64 [T, K] experts, E in an empty slot; fp32 [T, K] weights from scores without the bias,
        0 there). K is the largest number of experts of a token, of the tiers up to `max_tier`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or (on CPUs) a tier above.
    """
    experts = weight.shape[0]
    if hidden.dim() != 2 or weight.shape != (experts, hidden.shape[1]):
        raise ValueError(
            f"hidden, weight: shapes {tuple(hidden.shape)}, {tuple(weight.shape)} must be [T, D] "
            "and [E, D]"
        )
    if tier_bias.shape != (len(table.pool_sizes), experts) or tier_bias.dtype != torch.float32:
        raise ValueError(
            f"tier_bias: {tier_bias.dtype} {tuple(tier_bias.shape)} must be torch.float32 "
            f"{(len(table.pool_sizes), experts)}"
        )
    if max(table.pool_sizes) > experts:
        raise ValueError(f"table: pools {table.pool_sizes} must be within {experts} experts")
    if tiers.shape != hidden.shape[:1] or tiers.dtype != torch.int64:
        raise ValueError(
            f"tiers: {tiers.dtype} {tuple(tiers.shape)} must be torch.int64 ({len(hidden)},)"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight: dtype {weight.dtype} must be that of hidden, {hidden.dtype}")
    for name, value in {"weight": weight, "tier_bias": tier_bias}.items():
        if not value.is_contiguous():
            raise ValueError(f"{name}: strides {value.stride()} must be contiguous")
    for name, value in {"weight": weight, "tier_bias": tier_bias, "tiers": tiers}.items():
        if value.device != hidden.device:
            raise ValueError(f"{name}: on {value.device}, must be on {hidden.device} as hidden is")
    if max_tier is None:
        max_tier = int(tiers.max()) if len(tiers) else -1
    if max_tier >= len(table.pool_sizes):
        raise ValueError(f"max_tier: {max_tier} must be at most {len(table.pool_sizes) - 1}")
    operands = (hidden, weight, tier_bias, tiers, table, max_tier)
    chosen = route_cpu(*operands)
    return route_torch(*operands) if chosen is None else chosen


def route_torch(
    hidden: Tensor,
    weight: Tensor,
    tier_bias: Tensor,
    tiers: Tensor,
    table: RouterTable,
    max_tier: int,
) -> tuple[Tensor, Tensor]:
    """`route` in PyTorch's operators, on any device."""
    experts, known_T, slots = len(weight), tiers.clamp(min=0), table.num_slots(max_tier)

    def of_tier(values: tuple[int, ...] | tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=tiers.device)[known_T]

    logits_TE = F.linear(hidden.float(), weight.float())
    outside_TE = torch.arange(experts, device=tiers.device) >= of_tier(table.pool_sizes)[:, None]
    if table.softmax:
        scores_TE = logits_TE.masked_fill(outside_TE, float("-inf")).softmax(-1)
    else:
        scores_TE = logits_TE.sigmoid()
    choice_TE = (scores_TE + tier_bias[known_T]).masked_fill(outside_TE, float("-inf"))
    if any(
        groups * table.members(tier) < table.pool_sizes[tier]
        for tier, groups in enumerate(table.topk_group)
    ):
        if table.stripes:
            choice_TGE = choice_TE.view(len(hidden), -1, table.stripes).mT
        else:
            choice_TGE = choice_TE.view(len(hidden), -1, table.group_size)
        best_TG = choice_TGE.topk(table.best_of_group, -1).values.sum(-1)
        best_TG = best_TG.argsort(dim=-1, descending=True, stable=True)
        groups_T1 = of_tier(table.topk_group)[:, None]
        kept_TG = torch.arange(best_TG.shape[1], device=tiers.device) < groups_T1
        kept_TG = torch.zeros_like(kept_TG).scatter(1, best_TG, kept_TG)
        choice_TGE = choice_TGE.masked_fill(~kept_TG[..., None], float("-inf"))
        choice_TE = (choice_TGE.mT if table.stripes else choice_TGE).flatten(1)
    index_TK = choice_TE.argsort(dim=-1, descending=True, stable=True)[:, :slots]
    empty_TK = torch.arange(slots, device=tiers.device) >= of_tier(table.top_k)[:, None]
    empty_TK = empty_TK | (tiers < 0)[:, None]
    weight_TK = scores_TE.gather(1, index_TK).masked_fill(empty_TK, 0.0)
    if table.norm_topk_prob:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    weight_TK = weight_TK * of_tier(table.scaling)[:, None]
    return index_TK.masked_fill(empty_TK, experts), weight_TK
