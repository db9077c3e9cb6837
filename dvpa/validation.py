"""What an `Architecture` must satisfy: each field by itself, then the fields against each other.

Every failure is one `ValueError` that names the field, its value and what is allowed. No torch.
"""

import math
from collections.abc import Mapping
from typing import Any

_POSITIVE = """
vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
num_key_value_heads n_routed_experts n_group qk_rope_head_dim v_head_dim head_dim
max_position_embeddings
"""
_SWITCHES = "norm_topk_prob use_cache rope_interleave attention_bias tie_word_embeddings"
_NUMBERS = {
    "initializer_range": (0.0, 10.0),
    "rms_norm_eps": (0.0, 1.0),
    "attention_dropout": (0.0, 1.0),
}
CHOICES = {
    "pool": ("prefix", "striped"),
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("noaux_tc", "group_limited_greedy"),
    "gate": ("deepseek_v3", "fixed_denominator", "group_quota"),
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def validate_config(config: Any) -> None:
    """Check a whole `Architecture`.

    Raises:
        ValueError: the first field that is wrong.
    """
    _validate_values(config)
    _validate_attention(config)
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim: {config.qk_rope_head_dim} must be even")
    if not 0 <= config.first_k_dense_replace <= config.num_hidden_layers:
        raise ValueError(
            f"first_k_dense_replace: {config.first_k_dense_replace} must be in "
            f"0 .. num_hidden_layers = {config.num_hidden_layers}"
        )
    if config.first_k_dense_replace == config.num_hidden_layers and config.num_tiers > 1:
        raise ValueError(
            f"first_k_dense_replace: {config.first_k_dense_replace} leaves no layer with experts, "
            f"but there are {config.num_tiers} tiers"
        )
    if config.n_routed_experts % config.n_group:
        raise ValueError(
            f"n_routed_experts: {config.n_routed_experts} must be a whole number of groups "
            f"(n_group: {config.n_group})"
        )
    if config.group_size < 2:
        raise ValueError(
            f"n_group: {config.n_group} leaves {config.group_size} expert per group; "
            "group scores need 2"
        )
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(
                f"{name}: {getattr(config, name)!r} must be one of {', '.join(choices)}"
            )
    _validate_tiers(config)
    if config.gate != "deepseek_v3":
        _validate_gate(config)
    if config.difficulty is not None:
        probe = config.difficulty.probe_layer
        low, high = max(1, config.first_k_dense_replace), config.num_hidden_layers
        if not low <= probe <= high:
            raise ValueError(f"difficulty.probe_layer: {probe} must be in {low} .. {high}")
        if config.difficulty.hidden_size < 1:
            raise ValueError("difficulty.hidden_size: must be positive")


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _validate_values(config: Any) -> None:
    """Each field by itself: type and range."""
    for name in _POSITIVE.split():
        if not _is_whole(getattr(config, name), 1):
            raise ValueError(f"{name}: {getattr(config, name)!r} must be a positive whole number")
    for name in ("n_shared_experts", "first_k_dense_replace"):
        if not _is_whole(getattr(config, name), 0):
            raise ValueError(f"{name}: {getattr(config, name)!r} must be a whole number, 0 or more")
    if not _is_whole(config.num_nextn_predict_layers, 0) or config.num_nextn_predict_layers > 1:
        raise ValueError(
            f"num_nextn_predict_layers: {config.num_nextn_predict_layers!r} must be 0 or 1 "
            "(the module predicts one token further)"
        )
    for name in ("q_lora_rank", "kv_lora_rank"):
        value = getattr(config, name)
        if value is not None and not _is_whole(value, 1):
            raise ValueError(f"{name}: {value!r} must be null or positive and whole")
    for name in _SWITCHES.split():
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}: {getattr(config, name)!r} must be true or false")
    for name, (low, high) in _NUMBERS.items():
        value = getattr(config, name)  # YAML reads 1e-6 as text and 1.0e-6 as a number
        if not _is_number(value) or not low <= value <= high:
            raise ValueError(f"{name}: {value!r} must be a number in {low:g} .. {high:g}")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act: {config.hidden_act!r} must be 'silu' (SwiGLU, as in V3)")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, list) and name == "eos_token_id" else [value]:
            if token is not None and not (_is_whole(token, 0) and token < config.vocab_size):
                raise ValueError(
                    f"{name}: {value!r} must be null or a token in 0 .. {config.vocab_size - 1}"
                )
    rope = config.rope_parameters
    if rope is not None and not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters: {rope!r} must be null or a mapping")
    kind = (rope or {}).get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise ValueError(f"rope_parameters.rope_type: {kind!r} must be in {', '.join(_ROPE_TYPES)}")
    factor = (rope or {}).get("factor", 1.0)
    if not _is_number(factor) or factor < 1:
        raise ValueError(f"rope_parameters.factor: {factor!r} must be a number, 1 or more")


def _validate_attention(config: Any) -> None:
    """Fields that only one of the two kinds of attention has."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.kv_lora_rank is not None:
        if not _is_whole(config.qk_nope_head_dim, 1):
            raise ValueError(
                f"qk_nope_head_dim: {config.qk_nope_head_dim!r} must be a positive whole number"
            )
        if groups != heads:
            raise ValueError(
                f"num_key_value_heads: {groups} must be num_attention_heads = {heads} (or be left "
                "out): MLA has no grouped heads"
            )
        if config.qk_norm is not None:
            raise ValueError(f"qk_norm: {config.qk_norm!r} must be null: MLA has norms of its own")
        return
    if config.q_lora_rank is not None:
        raise ValueError(f"q_lora_rank: {config.q_lora_rank} must be null where kv_lora_rank is")
    if heads % groups:
        raise ValueError(f"num_key_value_heads: {groups} must divide num_attention_heads = {heads}")
    if config.qk_norm not in (None, "head", "projection"):
        raise ValueError(f"qk_norm: {config.qk_norm!r} must be null, 'head' or 'projection'")


def _validate_tiers(config: Any) -> None:
    previous = 0
    for i, tier in enumerate(config.tiers or ()):
        where, pool = f"tiers[{i}]", config.pool_size(i)
        if not tier.name or tier.name == "auto" or tier.name.isdecimal():
            raise ValueError(f"{where}.name: {tier.name!r} must be a word other than 'auto'")
        previous = _validate_pool(config, tier, where, previous)
        if not 1 <= tier.topk_group <= tier.num_groups:
            raise ValueError(
                f"{where}.topk_group: {tier.topk_group} must be in 1 .. {tier.num_groups}"
            )
        reachable = tier.topk_group * config.experts_per_group(i)
        if not 1 <= tier.top_k <= reachable:
            raise ValueError(
                f"{where}.top_k: {tier.top_k} must be in 1 .. {reachable} (its pool has {pool} "
                f"experts, {reachable} of them in the best {tier.topk_group} groups)"
            )
        if i and tier.top_k < config.tiers[i - 1].top_k:
            raise ValueError(f"{where}.top_k: {tier.top_k} must not be below the tier before it")
        if not math.isfinite(tier.routed_scaling_factor) or tier.routed_scaling_factor <= 0:
            raise ValueError(
                f"{where}.routed_scaling_factor: {tier.routed_scaling_factor} must be positive"
            )
    if config.pool == "prefix" and previous != config.n_group:
        raise ValueError(
            f"tiers[{config.top_tier}].num_groups: {previous} must be n_group = {config.n_group}: "
            "the top tier uses every group"
        )
    if config.pool == "striped" and previous != config.group_size:
        raise ValueError(
            f"tiers[{config.top_tier}].experts_per_group: {previous} must be all of a group's "
            f"{config.group_size}: the top tier uses every expert"
        )
    if len(set(config.tier_names)) != config.num_tiers:
        raise ValueError(f"tiers: names must differ, got {', '.join(config.tier_names)}")


def _validate_gate(config: Any) -> None:
    """Gates whose weights are shares of the base tier's; quotas of what each tier adds."""
    for name, needed in (("scoring_func", "sigmoid"), ("norm_topk_prob", True)):
        if getattr(config, name) != needed:
            raise ValueError(
                f"{name}: {getattr(config, name)!r} must be {needed!r} with gate: {config.gate}"
            )
    if config.gate != "group_quota":
        return
    top_k = pool = 0
    for i, tier in enumerate(config.tiers):
        quota, added = tier.top_k - top_k, config.pool_size(i) - pool
        if not 1 <= quota <= added:
            raise ValueError(
                f"tiers[{i}].top_k: {tier.top_k} must be in {top_k + 1} .. {top_k + added} with "
                f"gate: group_quota (the tier before it has {top_k}, {added} experts are added)"
            )
        if tier.topk_group != tier.num_groups:
            raise ValueError(
                f"tiers[{i}].topk_group: {tier.topk_group} must be all {tier.num_groups} with "
                "gate: group_quota"
            )
        top_k, pool = tier.top_k, config.pool_size(i)


def _validate_pool(config: Any, tier: Any, where: str, previous: int) -> int:
    """What a tier says of its pool; returns its groups, or its share of each in a striped pool."""
    if config.pool == "prefix":
        if tier.experts_per_group is not None:
            raise ValueError(
                f"{where}.experts_per_group: {tier.experts_per_group} is for pool: striped"
            )
        if not previous < tier.num_groups <= config.n_group:
            raise ValueError(
                f"{where}.num_groups: {tier.num_groups} must be in {previous + 1} .. "
                f"{config.n_group} (strictly increasing whole groups)"
            )
        return int(tier.num_groups)
    if tier.num_groups != config.n_group:
        raise ValueError(
            f"{where}.num_groups: {tier.num_groups} must be n_group = {config.n_group} (or be left "
            "out): a striped pool has a part of every group"
        )
    share = tier.experts_per_group
    low = max(previous + 1, 2)  # group scores need 2
    if share is None or not low <= share <= config.group_size:
        raise ValueError(
            f"{where}.experts_per_group: {share} must be in {low} .. {config.group_size} "
            "(strictly increasing)"
        )
    return int(share)
