"""One tier of a dvpa checkpoint as a plain `deepseek_v3` checkpoint.

A tier is a slice: its pool's experts, those rows of each router, its row of the selection bias; all
else is copied as it is. The result holds nothing of ours, so Transformers, vLLM and SGLang load it
with their own DeepSeek-V3. Streams tensor by tensor and never builds a model.

A multi-token prediction module is left out unless asked for: vLLM and SGLang draft with it, but
Transformers expects it at layer 61, as in V3, and warns of unexpected tensors at any other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvpa.checkpoint.shards import (
    DEFAULT_SHARD_BYTES,
    DTYPES,
    ShardReader,
    ShardWriter,
    TensorInfo,
    copy_file,
    staged_folder,
    write_json,
)
from dvpa.config import DvpaConfig
from dvpa.model.tensor_names import (
    HEAD_PREFIX,
    ROUTER_WEIGHT,
    TIER_BIAS,
    Shape,
    expert_index,
    mtp_prefix,
    tensor_shapes,
)

SHARED_FIELDS = """
vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
num_key_value_heads n_shared_experts kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim
v_head_dim first_k_dense_replace norm_topk_prob hidden_act max_position_embeddings initializer_range
rms_norm_eps use_cache rope_parameters rope_interleave attention_bias attention_dropout
tie_word_embeddings bos_token_id eos_token_id pad_token_id dtype
"""
EMBEDDING = "model.embed_tokens.weight"
COPIED_FILES = """
tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json
vocab.json merges.txt chat_template.jinja generation_config.json
"""


@dataclass(frozen=True)
class ExportReport:
    """What an export did: tensors copied whole, cut, and left out; `num_bytes` of tensor data.

    `dropped_mtp` of those left out are a multi-token prediction module that was not kept. Where it
    is kept, the copies of embedding and head that V3 stores with it count as copied.
    """

    tier: int
    tier_name: str
    copied: int
    sliced: int
    dropped: int
    dropped_mtp: int
    num_bytes: int


def export_tier(
    checkpoint: Path | str,
    tier: int | str,
    out: Path | str,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    keep_mtp: bool = False,
) -> ExportReport:
    """Write tier `tier` (index or name) of `checkpoint` to the new folder `out`.

    `out` appears complete or not at all; memory holds one tensor at a time. `keep_mtp` keeps the
    multi-token prediction module, as V3 stores it, cut to the tier like any other layer.

    Raises:
        FileNotFoundError: no checkpoint there, or a shard is missing.
        ValueError: unknown tier; no module to keep; `out` not empty; a tensor that is missing,
            unknown, or of the wrong shape or dtype (the message names it); a corrupt shard or
            config.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = read_config(checkpoint)
    tier = config.tier_index(tier)
    if keep_mtp and not config.num_nextn_predict_layers:
        raise ValueError(f"keep_mtp: {checkpoint} has no multi-token prediction module")
    reader = ShardReader(checkpoint)
    _check(checkpoint, config, reader.tensors)
    plan, sources = _plan(config, tier, reader.tensors, keep_mtp)
    with staged_folder(out) as folder:
        with ShardWriter(folder, plan, shard_bytes) as writer:
            for name in plan:
                writer.write(name, _part(reader, config, tier, sources[name]))
        for name in COPIED_FILES.split():
            if (checkpoint / name).is_file():
                copy_file(checkpoint / name, folder)
        write_json(folder / "config.json", deepseek_config(config, tier, keep_mtp))
    sliced = sum(plan[name] != reader.tensors[source] for name, source in sources.items())
    dropped = reader.tensors.keys() - set(sources.values())
    return ExportReport(
        tier=tier,
        tier_name=config.tier_names[tier],
        copied=len(plan) - sliced,
        sliced=sliced,
        dropped=len(dropped),
        dropped_mtp=0 if keep_mtp else sum(_is_mtp(config, name) for name in dropped),
        num_bytes=sum(info.num_bytes for info in plan.values()),
    )


def read_config(checkpoint: Path) -> DvpaConfig:
    """The model config of a checkpoint folder, validated.

    Raises:
        FileNotFoundError: no config there.
        ValueError: not JSON, not a dvpa config, or a bad field.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if model_type != DvpaConfig.model_type:
        raise ValueError(f"{path}: model_type: {model_type!r} must be {DvpaConfig.model_type!r}")
    try:
        config: DvpaConfig = DvpaConfig.from_dict(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def deepseek_config(config: DvpaConfig, tier: int, keep_mtp: bool = False) -> dict[str, Any]:
    """`config.json` of the exported tier: DeepSeek-V3's fields, none of ours."""
    routing, full = config.tiers[tier], config.to_dict()
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{name: full[name] for name in SHARED_FIELDS.split() if name in full},
        "n_routed_experts": config.pool_size(tier),
        "n_group": routing.num_groups,
        "topk_group": routing.topk_group,
        "num_experts_per_tok": routing.top_k,
        "routed_scaling_factor": routing.routed_scaling_factor,
        # vLLM and SGLang choose the router by these two; Transformers has no other.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": config.num_nextn_predict_layers if keep_mtp else 0,
    }


def _check(checkpoint: Path, config: DvpaConfig, tensors: Mapping[str, TensorInfo]) -> None:
    expected: dict[str, Shape] = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{checkpoint}: {name}: missing")
        if tensors[name].shape != shape:
            raise ValueError(f"{checkpoint}: {name}: shape {tensors[name].shape}, expected {shape}")
        if not DTYPES[tensors[name].dtype].is_floating_point:
            raise ValueError(f"{checkpoint}: {name}: dtype {tensors[name].dtype} is not a float's")
    for name in tensors:
        if name not in expected:
            raise ValueError(f"{checkpoint}: {name}: unknown tensor")


def _plan(
    config: DvpaConfig, tier: int, tensors: Mapping[str, TensorInfo], keep_mtp: bool
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What to write, in order, and the tensor that each one comes from."""
    plan, sources = {}, {}
    pool = config.pool_size(tier)
    for source in tensor_shapes(config):
        expert = expert_index(source)
        if source.startswith(HEAD_PREFIX) or (expert is not None and expert >= pool):
            continue
        if _is_mtp(config, source) and not keep_mtp:
            continue
        name, info = source, tensors[source]
        if source.endswith(TIER_BIAS):
            name = source.replace("tier_bias", "e_score_correction_bias")
            info = TensorInfo("F32", (pool,))
        elif source.endswith(ROUTER_WEIGHT):
            info = TensorInfo(info.dtype, (pool, config.hidden_size))
        plan[name], sources[name] = info, source
    if keep_mtp:  # V3 stores the module's embedding and head again
        head = EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
        for name, source in (("embed_tokens", EMBEDDING), ("shared_head.head", head)):
            name = f"{mtp_prefix(config)}{name}.weight"
            plan[name], sources[name] = tensors[source], source
    return plan, sources


def _is_mtp(config: DvpaConfig, name: str) -> bool:
    return bool(config.num_nextn_predict_layers) and name.startswith(mtp_prefix(config))


def _part(reader: ShardReader, config: DvpaConfig, tier: int, source: str) -> Tensor:
    """The part of a tensor that the tier keeps."""
    pool = slice(0, config.pool_size(tier))
    if source.endswith(TIER_BIAS):
        return reader.read(source, (slice(tier, tier + 1), pool))[0].to(torch.float32)
    return reader.read(source, (pool,) if source.endswith(ROUTER_WEIGHT) else ())
