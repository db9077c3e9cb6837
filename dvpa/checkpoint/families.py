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
LATENT_FIELDS = "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim"
EXPERT_FIELDS = """
moe_intermediate_size n_shared_experts n_routed_experts num_experts_per_tok routed_scaling_factor
norm_topk_prob first_k_dense_replace
"""


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    `read` turns its config, as Transformers reads it, into our fields, the router's groups left
    out; `fixed` are keys of config.json that must have one of these values where they are given.
    `names` are pieces of our tensor names and what stands in their place; `bias` is the name of the
    selection bias, None where there is none (ours is zero then).
    """

    model_type: str
    read: Callable[[Any], Fields]
    fixed: Mapping[str, tuple[Any, ...]]
    bias: str | None = None
    names: tuple[tuple[str, str], ...] = ()
    is_grouped: bool = False

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
    if model_type not in FAMILIES:
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
    theirs = _resolve(family, data)
    fields = {name: getattr(theirs, name) for name in SHARED_FIELDS.split()}
    fields.update(family.read(theirs))
    experts, top_k = fields["n_routed_experts"], fields["num_experts_per_tok"]
    groups, kept = _groups(family, theirs, experts, top_k)
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
    kept = {k: v for k, v in data.items() if k not in ("quantization_config", "auto_map")}
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(kept)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{family.model_type} config: {' '.join(str(error).split())}") from error


def _groups(family: Family, theirs: Any, experts: int, top_k: int) -> tuple[int, int]:
    """Our groups, and how many of them a token may use."""
    groups, kept = (theirs.n_group or 1, theirs.topk_group or 1) if family.is_grouped else (1, 1)
    if experts % groups:
        raise ValueError(f"n_group: {groups} must divide the {experts} routed experts")
    if not 1 <= kept <= groups:
        raise ValueError(f"topk_group: {kept} must be in 1 .. n_group = {groups}")
    if top_k > kept * (experts // groups):
        raise ValueError(
            f"num_experts_per_tok: {top_k} must be at most {kept * (experts // groups)}: topk_group "
            f"{kept} groups of {experts // groups} experts"
        )
    if kept == groups:  # nothing is limited: the groups are ours to choose
        groups = kept = experts // smallest_group(experts)
    return groups, kept


def _deepseek_v3(theirs: Any) -> Fields:
    names = f"{LATENT_FIELDS} {EXPERT_FIELDS} rope_interleave".split()
    fields = {name: getattr(theirs, name) for name in names}
    # Written by Transformers even where no such layer was saved; see `Source`.
    fields["num_nextn_predict_layers"] = getattr(theirs, "num_nextn_predict_layers", 0) or 0
    return fields


FAMILIES = {
    "deepseek_v3": Family(
        model_type="deepseek_v3",
        read=_deepseek_v3,
        fixed={
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
            "moe_layer_freq": (1,),
        },
        bias=".mlp.gate.e_score_correction_bias",
        is_grouped=True,
    ),
}
