"""Which family's format a tier is written in, and the config.json it gets there.

A tier is a model of its own: the experts of its pool, and no tiers. The format follows from the
switches of our config; what no family computes is refused, so that an export never answers
otherwise than the tier it was cut from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dvpa.checkpoint.families import FAMILIES, Family, Fields
from dvpa.config import DvpaConfig

# What every family calls as we do; without `tie_word_embeddings`, since every export has a head.
SHARED_FIELDS = """
vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
max_position_embeddings initializer_range rms_norm_eps use_cache rope_parameters attention_dropout
bos_token_id eos_token_id pad_token_id dtype
"""
LATENT_FIELDS = """
intermediate_size moe_intermediate_size n_shared_experts kv_lora_rank q_lora_rank qk_rope_head_dim
qk_nope_head_dim v_head_dim first_k_dense_replace norm_topk_prob attention_bias
"""


@dataclass(frozen=True)
class Format:
    """A family's format, for tiers of one config.

    `architecture` is the class that config.json names, `write` gives the family's own fields for a
    tier. `is_in_transformers`: Transformers loads it without the code of others.
    """

    family: Family
    architecture: str
    write: Callable[[DvpaConfig, int], Fields]
    is_in_transformers: bool = True

    @property
    def has_bias(self) -> bool:
        """Whether its router has a selection bias."""
        return self.family.bias is not None

    def config(self, config: DvpaConfig, tier: int, keep_mtp: bool = False) -> dict[str, Any]:
        """`config.json` of the exported tier; none of our own fields."""
        full = config.to_dict()
        fields = {name: full[name] for name in SHARED_FIELDS.split() if name in full}
        written = {
            "architectures": [self.architecture],
            "model_type": self.family.model_type,
            **fields,
            "tie_word_embeddings": False,
            "num_experts_per_tok": config.tiers[tier].top_k,
            **self.write(config, tier),
        }
        if self.family.model_type == "deepseek_v3":
            written["num_nextn_predict_layers"] = config.num_nextn_predict_layers * keep_mtp
        return written


def find_format(config: DvpaConfig, tier: int) -> Format:
    """The format of a tier.

    Raises:
        ValueError: no family that we know computes what this tier does; the message names the field
            that is in the way.
    """
    if config.gate != "deepseek_v3":
        raise ValueError(
            f"gate: {config.gate!r} is an ablation that no other model computes; only "
            "'deepseek_v3' can be exported"
        )
    is_latent, is_softmax = config.kv_lora_rank is not None, config.scoring_func == "softmax"
    routing = config.tiers[tier]
    is_limited = routing.topk_group < routing.num_groups
    if is_latent and not is_softmax:
        _require(config, "deepseek_v3", topk_method=("noaux_tc",) if is_limited else None)
        return FORMATS["deepseek_v3"]
    if is_latent:
        method = ("group_limited_greedy",) if is_limited else None
        _require(config, "deepseek_v2", norm_topk_prob=(False,), topk_method=method)
        _require(config, "deepseek_v2", rope_interleave=(True,))
        return FORMATS["deepseek_v2"]
    name, needed = _grouped_query(config)
    _require(config, name, scoring_func=("softmax",), rope_interleave=(False,), **needed)
    if is_limited:
        raise ValueError(
            f"tiers[{tier}].topk_group: {routing.topk_group} must be {routing.num_groups} in the "
            f"format of {name}, which limits no groups"
        )
    if routing.routed_scaling_factor != 1.0:
        raise ValueError(
            f"tiers[{tier}].routed_scaling_factor: {routing.routed_scaling_factor} must be 1.0 in "
            f"the format of {name}, which scales nothing"
        )
    return FORMATS[name]


def _grouped_query(config: DvpaConfig) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """The family nearest to a model with grouped-query attention, and what it must have."""
    width = config.hidden_size // config.num_attention_heads
    if config.n_shared_experts:
        return "deepseek", {"qk_norm": (None,), "head_dim": (width,)}
    if config.qk_norm == "head":
        return "qwen3_moe", {}
    if config.qk_norm == "projection":
        return "olmoe", {"first_k_dense_replace": (0,), "head_dim": (width,)}
    mixtral = {"first_k_dense_replace": (0,), "norm_topk_prob": (True,), "attention_bias": (False,)}
    return "mixtral", mixtral


def _require(config: DvpaConfig, family: str, **allowed: tuple[Any, ...] | None) -> None:
    """ValueError naming the first field whose value is none of those allowed (None: any)."""
    for name, values in allowed.items():
        given = getattr(config, name)
        if values is not None and given not in values:
            choices = " or ".join(repr(value) for value in values)
            raise ValueError(
                f"{name}: {given!r} must be {choices} in the format of {family}, the nearest to "
                "this model; it has no plain form"
            )


def _named(config: DvpaConfig, names: str) -> Fields:
    return {name: getattr(config, name) for name in names.split()}


def _deepseek_v3(config: DvpaConfig, tier: int) -> Fields:
    return {
        **_named(config, LATENT_FIELDS),
        **_pool(config, tier),
        "rope_interleave": config.rope_interleave,
        # vLLM and SGLang choose the router by these two; Transformers has no other.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
    }


def _deepseek_v2(config: DvpaConfig, tier: int) -> Fields:
    routing = config.tiers[tier]
    is_limited = routing.topk_group < routing.num_groups
    groups = {} if is_limited else {"n_group": 1, "topk_group": 1}  # as V2-Lite
    return {
        **_named(config, LATENT_FIELDS),
        **_pool(config, tier),
        **groups,
        "topk_method": "group_limited_greedy" if is_limited else "greedy",
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
    }


def _pool(config: DvpaConfig, tier: int) -> Fields:
    """The routed experts of a tier, as DeepSeek-V2 and V3 tell of them."""
    routing = config.tiers[tier]
    return {
        "n_routed_experts": config.pool_size(tier),
        "n_group": routing.num_groups,
        "topk_group": routing.topk_group,
        "routed_scaling_factor": routing.routed_scaling_factor,
    }


def _deepseek(config: DvpaConfig, tier: int) -> Fields:
    names = """
    intermediate_size moe_intermediate_size n_shared_experts first_k_dense_replace norm_topk_prob
    attention_bias
    """
    return {
        **_named(config, names),
        "head_dim": config.head_dim,
        "n_routed_experts": config.pool_size(tier),
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        # What reads this format as remote code knows the older spellings only.
        "rope_theta": (config.rope_parameters or {}).get("rope_theta", 10000.0),
    }


def _qwen3_moe(config: DvpaConfig, tier: int) -> Fields:
    names = "intermediate_size moe_intermediate_size norm_topk_prob attention_bias head_dim"
    return {
        **_named(config, names),
        "num_experts": config.pool_size(tier),
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.first_k_dense_replace)),
        "use_sliding_window": False,
    }


def _olmoe(config: DvpaConfig, tier: int) -> Fields:
    return {
        **_named(config, "norm_topk_prob attention_bias"),
        "intermediate_size": config.moe_intermediate_size,
        "num_experts": config.pool_size(tier),
        "clip_qkv": None,
    }


def _mixtral(config: DvpaConfig, tier: int) -> Fields:
    return {
        "head_dim": config.head_dim,
        "intermediate_size": config.moe_intermediate_size,
        "num_local_experts": config.pool_size(tier),
        "sliding_window": None,
    }


FORMATS = {
    "deepseek_v3": Format(FAMILIES["deepseek_v3"], "DeepseekV3ForCausalLM", _deepseek_v3),
    "deepseek_v2": Format(FAMILIES["deepseek_v2"], "DeepseekV2ForCausalLM", _deepseek_v2),
    "deepseek": Format(FAMILIES["deepseek"], "DeepseekForCausalLM", _deepseek, False),
    "qwen3_moe": Format(FAMILIES["qwen3_moe"], "Qwen3MoeForCausalLM", _qwen3_moe),
    "olmoe": Format(FAMILIES["olmoe"], "OlmoeForCausalLM", _olmoe),
    "mixtral": Format(FAMILIES["mixtral"], "MixtralForCausalLM", _mixtral),
}
