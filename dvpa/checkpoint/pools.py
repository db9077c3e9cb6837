"""Which experts a converted checkpoint's tiers may use, and in what order experts are stored.

Fewer activated experts cost little, fewer experts in all cost much (arXiv 2505.03531), so by
default the lower tiers choose fewer from pools that are still large.

Where a source's router keeps only its best groups (DeepSeek-V2 and V3), groups carry meaning:
whole groups may move, and experts inside their own group, but none from one group to another. A
pool then is the best groups (`prefix`) or the best experts of every group (`striped`). Elsewhere
any order will do, and a pool is the best experts.

Letters: E routed experts, G routing groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dvpa.checkpoint.families import Fields, limits_groups, smallest_group
from dvpa.config import DvpaConfig
from dvpa.pricing import price

POOL_SHARES = (0.5, 0.75, 1.0)  # of the experts, by default
LEAST_ACTIVATED = 0.5  # the base tier's activated parameters, as a share of the top tier's


@dataclass(frozen=True)
class TierWish:
    """A tier as the user asks for it: experts to choose from, experts of a token."""

    name: str
    pool: int
    top_k: int
    routed_scaling_factor: float | None = None  # None: from the top tier's


def parse_tiers(text: str) -> list[TierWish]:
    """`[NAME=]POOL:TOP_K[:SCALE],..`, base first, as in `128:4,192:6,256:8`.

    Raises:
        ValueError: not of that form; the message has the part.
    """
    parts = text.split(",")
    wishes = []
    for i, part in enumerate(parts):
        name, _, numbers = part.rpartition("=")
        fields = numbers.split(":")
        try:
            if len(fields) not in (2, 3):
                raise ValueError
            pool, top_k = int(fields[0]), int(fields[1])
            scale = float(fields[2]) if len(fields) == 3 else None
        except ValueError:
            raise ValueError(
                f"tiers: {part!r} must be [NAME=]POOL:TOP_K[:SCALE], as in 128:4 (experts to "
                "choose from, experts of a token)"
            ) from None
        wishes.append(TierWish(name.strip() or _name(i, len(parts)), pool, top_k, scale))
    return wishes


def default_tiers(source: DvpaConfig) -> list[TierWish]:
    """Three tiers whose activated parameters fall evenly to half of the source's.

    Evenly in their logarithm, as near as whole experts come; never below a quarter of its top_k.
    """
    experts, top = source.n_routed_experts, source.tiers[-1]
    step = _pool_step(source)
    pools = sorted({math.ceil(share * experts / step) * step for share in POOL_SHARES})
    whole = price(source).tiers[-1].activated_params
    one = 3 * source.hidden_size * source.moe_intermediate_size  # an expert of one layer
    one *= source.num_hidden_layers - source.first_k_dense_replace
    least = max(1, top.top_k // 4)
    wishes = []
    for i, pool in enumerate(pools):
        below = (len(pools) - 1 - i) / max(1, len(pools) - 1)
        wanted = whole * LEAST_ACTIVATED**below
        top_k = round(top.top_k - (whole - wanted) / one)
        top_k = min(max(top_k, least), top.top_k, pool)
        wishes.append(TierWish(_name(i, len(pools)), pool, top_k))
    return wishes


def tier_fields(source: DvpaConfig, wishes: Sequence[TierWish], pool: str) -> Fields:
    """The fields of the converted model's groups and tiers, with pools of one kind.

    Raises:
        ValueError: tiers that do not fit the source; the message names the tier.
    """
    is_limited, is_striped = limits_groups(source), pool == "striped"
    if is_striped and not is_limited:
        raise ValueError("pool: striped is for routers that keep only their best groups")
    top = source.tiers[-1]
    last = wishes[-1]
    if (last.pool, last.top_k) != (source.n_routed_experts, top.top_k):
        raise ValueError(
            f"tiers: {last.name}: {last.pool}:{last.top_k} must be the source's own "
            f"{source.n_routed_experts}:{top.top_k}: the top tier is the source"
        )
    if last.routed_scaling_factor not in (None, top.routed_scaling_factor):
        raise ValueError(
            f"tiers: {last.name}: scale {last.routed_scaling_factor} must be the source's own "
            f"{top.routed_scaling_factor} (or be left out)"
        )
    unit = source.n_group if is_striped else _group_size(source, wishes)
    tiers: list[dict[str, Any]] = []
    for wish in wishes:
        units, beyond = divmod(wish.pool, unit)
        if beyond or units < 1:
            raise ValueError(
                f"tiers: {wish.name}: a pool of {wish.pool} experts must be a multiple of {unit}, "
                f"up to {source.n_routed_experts} (pool: {pool})"
            )
        groups = source.n_group if is_striped else units
        scale = wish.routed_scaling_factor
        tiers.append(
            {
                "name": wish.name,
                "experts_per_group" if is_striped else "num_groups": units,
                "top_k": wish.top_k,
                "topk_group": min(groups, top.topk_group) if is_limited else groups,
                "routed_scaling_factor": _scale(source, wish.top_k) if scale is None else scale,
            }
        )
    num_groups = source.n_group if is_striped else source.n_routed_experts // unit
    return {"pool": pool, "n_group": num_groups, "tiers": tiers}


def order_experts(source: DvpaConfig, importance: Tensor, pinned: Tensor, pool: str) -> Tensor:
    """The source's experts in the order in which they are stored, most important first.

    Args:
        source: its config, of one tier.
        importance: [E].
        pinned: bool [E], experts that come before all others.
        pool: "prefix" or "striped".

    Returns:
        int64 [E]: place -> the source's expert. Equals keep their order.
    """
    ranked = _rank(importance, pinned)
    if not limits_groups(source):
        return ranked
    group_of_E = torch.arange(len(importance)) // source.group_size
    if pool == "striped":
        of_groups = [ranked[group_of_E[ranked] == group] for group in range(source.n_group)]
        return torch.stack(of_groups, 1).flatten()
    by_group_GE = importance.view(source.n_group, -1)
    groups = _rank(by_group_GE.sum(1), pinned.view(source.n_group, -1).any(1))
    return torch.cat([ranked[group_of_E[ranked] == group] for group in groups])


def _rank(importance: Tensor, pinned: Tensor) -> Tensor:
    """Indices by falling importance, the pinned before all; equals keep their order."""
    falling = importance.argsort(descending=True, stable=True)
    return falling[pinned[falling].to(torch.int8).argsort(descending=True, stable=True)]


def _name(index: int, count: int) -> str:
    if index == count - 1:
        return "top"
    if index == 0:
        return "base"
    return "middle" if count == 3 else f"middle{index}"


def _pool_step(source: DvpaConfig) -> int:
    """What default pools are multiples of: groups, if possible of pools of either kind."""
    if not limits_groups(source):
        return smallest_group(source.n_routed_experts)
    both = math.lcm(source.group_size, source.n_group)
    return both if both < source.n_routed_experts else source.group_size


def _group_size(source: DvpaConfig, wishes: Sequence[TierWish]) -> int:
    """Experts of a group: the source's, or the largest that all pools are whole numbers of."""
    if limits_groups(source):
        return source.group_size
    size = math.gcd(*(wish.pool for wish in wishes))
    if size < 2:
        pools = ", ".join(str(wish.pool) for wish in wishes)
        raise ValueError(f"tiers: pools {pools} must have a common divisor of 2 or more")
    return size


def _scale(source: DvpaConfig, top_k: int) -> float:
    """The scale of a tier: proportional to sqrt(top_k) where weights are normalised.

    Not where the family's format has no scale, lest the tier cannot be exported.
    """
    top = source.tiers[-1]
    scale = float(top.routed_scaling_factor)
    has_scale = source.kv_lora_rank is not None
    if not source.norm_topk_prob or not has_scale or top_k == top.top_k:
        return scale
    return scale * math.sqrt(top_k / top.top_k)


def as_mapping(order: Mapping[int, Tensor]) -> dict[str, list[int]]:
    """Orders by layer, ready for JSON."""
    return {str(layer): [int(i) for i in places] for layer, places in order.items()}
