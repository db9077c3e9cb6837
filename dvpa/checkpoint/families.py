"""The families of checkpoints that `convert` takes in: their config fields and tensor names.

A `Family` says what a `model_type` must have for our one model to compute the same, and how it
calls our tensors. Config files are read by Transformers' own classes, where it has them, so that
defaults and the older spellings of the rotary settings are theirs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from dvpa.config import DvpaConfig
from dvpa.model.tensor_names import TIER_BIAS

Fields = dict[str, Any]

# What every family calls as we do.
SHARED_FIELDS = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act
max_position_embeddings initializer_range rms_norm_eps use_cache rope_parameters attention_bias
attention_dropout tie_word_embeddings bos_token_id eos_token_id pad_token_id dtype
"""
OPTIONAL_FIELDS = {"attention_bias": False}  # of those, with what their absence means
LATENT_FIELDS = "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim"
EXPERT_FIELDS = """
moe_intermediate_size n_shared_experts n_routed_experts num_experts_per_tok norm_topk_prob
first_k_dense_replace
"""
SOFTMAX = {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    `read` turns its config, as Transformers reads it, into our fields, the router's groups left
    out; `fixed` are keys of config.json that must have one of these values where they are given;
    `needed` must be given. `names` are pieces of our tensor names and what stands in their place;
    `bias` is the name of the selection bias, None where there is none (ours is zero then).
    `read_by`: whose config class in Transformers reads it.
    """

    model_type: str
    read: Callable[[Any], Fields]
    fixed: Mapping[str, tuple[Any, ...]]
    needed: tuple[str, ...] = ()
    bias: str | None = None
    names: tuple[tuple[str, str], ...] = ()
    read_by: str | None = None

    def name_of(self, ours: str) -> str | None:
        """What a tensor of ours is called there; None if it has no such tensor."""
        if ours.endswith(TIER_BIAS):
            return None if self.bias is None else ours.removesuffix(TIER_BIAS) + self.bias
        for piece, theirs in self.names:
            ours = ours.replace(piece, theirs)
        return ours


def find_family(data: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: `model_type` is none of ours.
    """
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type: {model_type!r} must be one of {known}")
    return FAMILIES[model_type]


def read_fields(family: Family, data: Mapping[str, Any]) -> Fields:
    """Our fields for a config.json: a model of one tier, its experts in the order they have there.

    Raises:
        ValueError: a key is missing or wrong, or asks for what our model does not compute; the
            message names it.
    """
    for key, allowed in family.fixed.items():
        value = data.get(key, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ValueError(f"{key}: {value!r} must be {choices}: nothing else is supported")
    for key in family.needed:
        if data.get(key) is None:
            raise ValueError(f"{key}: missing")
    theirs = _resolve(family, data)
    fields: Fields = {
        name: getattr(theirs, name, OPTIONAL_FIELDS.get(name)) for name in SHARED_FIELDS.split()
    }
    fields.update(family.read(theirs))
    experts, top_k = fields["n_routed_experts"], fields.pop("num_experts_per_tok")
    groups, kept = _groups(fields.pop("n_group", 1), fields.pop("topk_group", 1), experts, top_k)
    scale = fields.pop("routed_scaling_factor", 1.0)
    fields["n_group"] = groups
    fields["tiers"] = [
        {
            "name": "top",
            "num_groups": groups,
            "top_k": top_k,
            "topk_group": kept,
            "routed_scaling_factor": scale,
        }
    ]
    return fields


def limits_groups(config: DvpaConfig) -> bool:
    """Whether the top tier keeps only its best groups, so that groups carry meaning."""
    return config.tiers[-1].topk_group < config.n_group


def smallest_group(num_experts: int, at_most: int = 8) -> int:
    """Experts of a group where groups mean nothing: the smallest divisor that leaves few groups.

    Raises:
        ValueError: `num_experts` has no divisor of 2 or more (it is below 2).
    """
    least = max(2, math.ceil(num_experts / at_most))
    for size in range(least, num_experts + 1):
        if num_experts % size == 0:
            return size
    raise ValueError(f"n_routed_experts: {num_experts} must be 2 or more")


def _resolve(family: Family, data: Mapping[str, Any]) -> Any:
    """The config as Transformers reads it."""
    reader = family.read_by or family.model_type
    kept = {k: v for k, v in data.items() if k not in ("quantization_config", "auto_map")}
    try:
        return CONFIG_MAPPING[reader].from_dict({**kept, "model_type": reader})
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{family.model_type} config: {' '.join(str(error).split())}") from error


def _groups(groups: int, kept: int, experts: int, top_k: int | None) -> tuple[int, int]:
    """Our groups, and how many of them a token may use, for theirs."""
    if experts % groups:
        raise ValueError(f"n_group: {groups} must divide the {experts} routed experts")
    if not 1 <= kept <= groups:
        raise ValueError(f"topk_group: {kept} must be in 1 .. n_group = {groups}")
    reachable = kept * (experts // groups)
    if top_k is None or not 1 <= top_k <= reachable:
        raise ValueError(
            f"num_experts_per_tok: {top_k} must be in 1 .. {reachable}: topk_group {kept} groups "
            f"of {experts // groups} experts"
        )
    if kept == groups:  # nothing is limited: the groups are ours to choose
        groups = kept = experts // smallest_group(experts)
    return groups, kept


def _deepseek_v3(theirs: Any) -> Fields:
    return {
        **_latent(theirs),
        "rope_interleave": theirs.rope_interleave,
        # Written by Transformers even where no such layer was saved; see `Source`.
        "num_nextn_predict_layers": getattr(theirs, "num_nextn_predict_layers", 0) or 0,
    }


def _deepseek_v2(theirs: Any) -> Fields:
    fields = {**_latent(theirs), **SOFTMAX}
    if theirs.topk_method == "greedy":  # groups, where it names some, are not looked at
        fields.update(n_group=1, topk_group=1)
    return fields


def _latent(theirs: Any) -> Fields:
    """What DeepSeek-V2 and V3 share."""
    fields = {name: getattr(theirs, name) for name in f"{LATENT_FIELDS} {EXPERT_FIELDS}".split()}
    return fields | {
        "routed_scaling_factor": theirs.routed_scaling_factor,
        "n_group": theirs.n_group or 1,
        "topk_group": theirs.topk_group or 1,
    }


def _deepseek(theirs: Any) -> Fields:
    fields = {name: getattr(theirs, name, None) for name in EXPERT_FIELDS.split()}
    fields["n_shared_experts"] = fields["n_shared_experts"] or 0
    fields["norm_topk_prob"] = bool(fields["norm_topk_prob"])
    return {**_grouped_query(theirs), **SOFTMAX, **fields}


def _olmoe(theirs: Any) -> Fields:
    return {
        **_grouped_query(theirs),
        **_unshared(theirs, theirs.intermediate_size, theirs.num_experts),
        "qk_norm": "projection",
        "norm_topk_prob": theirs.norm_topk_prob,
    }


def _qwen3_moe(theirs: Any) -> Fields:
    sparse = [
        layer
        for layer in range(theirs.num_hidden_layers)
        if layer not in theirs.mlp_only_layers and (layer + 1) % theirs.decoder_sparse_step == 0
    ]
    dense = theirs.num_hidden_layers - len(sparse)
    if sparse != list(range(dense, theirs.num_hidden_layers)):
        raise ValueError(
            f"mlp_only_layers, decoder_sparse_step: {theirs.mlp_only_layers}, "
            f"{theirs.decoder_sparse_step} put dense layers after MoE layers; only leading ones "
            "are supported"
        )
    return {
        **_grouped_query(theirs),
        **_unshared(theirs, theirs.moe_intermediate_size, theirs.num_experts),
        "qk_norm": "head",
        "norm_topk_prob": theirs.norm_topk_prob,
        "first_k_dense_replace": dense,
    }


def _mixtral(theirs: Any) -> Fields:
    return {
        **_grouped_query(theirs),
        **_unshared(theirs, theirs.intermediate_size, theirs.num_local_experts),
        "norm_topk_prob": True,
    }


def _grouped_query(theirs: Any) -> Fields:
    head_dim = getattr(theirs, "head_dim", None)
    return {
        "kv_lora_rank": None,
        "q_lora_rank": None,
        "num_key_value_heads": theirs.num_key_value_heads,
        "head_dim": head_dim or theirs.hidden_size // theirs.num_attention_heads,
        "rope_interleave": False,
    }


def _unshared(theirs: Any, width: int, experts: int) -> Fields:
    """Softmax over routed experts alone, in every layer."""
    return {
        **SOFTMAX,
        "n_shared_experts": 0,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": width,
        "n_routed_experts": experts,
        "num_experts_per_tok": theirs.num_experts_per_tok,
    }


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="deepseek_v3",
            read=_deepseek_v3,
            fixed={
                "scoring_func": ("sigmoid",),
                "topk_method": ("noaux_tc",),
                "moe_layer_freq": (1,),
            },
            bias=".mlp.gate.e_score_correction_bias",
        ),
        Family(
            model_type="deepseek_v2",
            read=_deepseek_v2,
            fixed={
                "scoring_func": ("softmax",),
                "topk_method": ("greedy", "group_limited_greedy"),
                "moe_layer_freq": (1,),
                "mlp_bias": (False,),
                # Implementations differ in whether the scale then applies; no published model.
                "norm_topk_prob": (False,),
            },
        ),
        Family(
            model_type="deepseek",  # DeepSeekMoE-16B; its class is not in Transformers
            read=_deepseek,
            fixed={"scoring_func": ("softmax",), "moe_layer_freq": (1,)},
            needed=(
                *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
                *("num_attention_heads", "n_routed_experts", "moe_intermediate_size"),
                *("num_experts_per_tok", "first_k_dense_replace"),
            ),
            read_by="llama",
        ),
        Family(model_type="olmoe", read=_olmoe, fixed={"clip_qkv": (None,)}),
        Family(model_type="qwen3_moe", read=_qwen3_moe, fixed={"use_sliding_window": (False,)}),
        Family(
            model_type="mixtral",
            read=_mixtral,
            fixed={"sliding_window": (None,)},
            names=(
                (".mlp.", ".block_sparse_moe."),
                (".gate_proj.", ".w1."),
                (".up_proj.", ".w3."),
                (".down_proj.", ".w2."),
            ),
        ),
    )
}
