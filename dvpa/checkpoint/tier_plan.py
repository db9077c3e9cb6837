"""Which tensors an exported tier has, under which names, and what of ours each one comes from."""

from collections.abc import Mapping
from dataclasses import dataclass

from dvpa.checkpoint.formats import Format
from dvpa.checkpoint.number_format import stored_as
from dvpa.checkpoint.shards import TensorInfo
from dvpa.checkpoint.source import EMBEDDING, HEAD
from dvpa.config import DvpaConfig
from dvpa.model.tensor_names import (
    HEAD_PREFIX,
    ROUTER_WEIGHT,
    TIER_BIAS,
    expert_index,
    mtp_prefix,
    tensor_shapes,
)


@dataclass(frozen=True)
class Part:
    """A tensor to write, and the one of ours that it comes from."""

    info: TensorInfo
    source: str


def plan_tier(
    config: DvpaConfig,
    tier: int,
    tensors: Mapping[str, TensorInfo],
    keep_mtp: bool,
    style: Format,
    dtype: str,
) -> dict[str, Part]:
    """What to write, in order.

    Args:
        config: of the checkpoint.
        tier: the one to export.
        tensors: the checkpoint's.
        keep_mtp: with the multi-token prediction module, and the copies that V3 stores with it.
        style: the format to write.
        dtype: one of `FORMATS`.
    """
    number_of = {expert: number for number, expert in enumerate(exported_order(config, tier))}
    plan: dict[str, Part] = {}
    for source in tensor_shapes(config):
        if source.startswith(HEAD_PREFIX) or (is_mtp(config, source) and not keep_mtp):
            continue
        name = _exported_name(style, source, number_of)
        if name is not None:
            plan.update(_stored(name, source, _cut(config, tier, source, tensors[source]), dtype))
    copies = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
    if keep_mtp:  # V3 stores the module's embedding and head again
        prefix = mtp_prefix(config)
        copies[f"{prefix}embed_tokens.weight"] = EMBEDDING
        copies[f"{prefix}shared_head.head.weight"] = EMBEDDING if HEAD in copies else HEAD
    for name, source in copies.items():
        plan.update(_stored(name, source, tensors[source], dtype))
    return plan


def _exported_name(style: Format, source: str, number_of: Mapping[int, int]) -> str | None:
    """What a tensor is called in the export; None if it has no place there."""
    expert = expert_index(source)
    if expert is not None:
        if expert not in number_of:
            return None
        source = source.replace(f".experts.{expert}.", f".experts.{number_of[expert]}.")
    return style.family.name_of(source)


def exported_order(config: DvpaConfig, tier: int) -> list[int]:
    """Our experts of a tier in the order of the export, group by group."""
    pool = range(config.pool_size(tier))
    if config.pool == "prefix":
        return list(pool)
    return sorted(pool, key=lambda expert: (expert % config.n_group, expert // config.n_group))


def _cut(config: DvpaConfig, tier: int, source: str, info: TensorInfo) -> TensorInfo:
    """Shape and dtype of the part that the tier keeps."""
    if source.endswith(TIER_BIAS):
        return TensorInfo("F32", (config.pool_size(tier),))
    if source.endswith(ROUTER_WEIGHT):
        return TensorInfo(info.dtype, (config.pool_size(tier), config.hidden_size))
    return info


def _stored(name: str, source: str, info: TensorInfo, dtype: str) -> dict[str, Part]:
    """A tensor as it is stored; in FP8 with its scales, which come from the same of ours."""
    written = stored_as(name, source, info, dtype)
    return {each: Part(info, source) for each, info in written.items()}


def is_mtp(config: DvpaConfig, name: str) -> bool:
    """Whether a tensor is the multi-token prediction module's."""
    return bool(config.num_nextn_predict_layers) and name.startswith(mtp_prefix(config))
