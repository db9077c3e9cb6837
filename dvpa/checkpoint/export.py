"""One tier of a dvpa checkpoint as a plain checkpoint of its own family, usually `deepseek_v3`.

A tier is a slice: its pool's experts, those rows of each router, its row of the selection bias; all
else is copied as it is. The result holds nothing of ours, so Transformers, vLLM and SGLang load it
with their own code (which family that is: `formats`). Streams tensor by tensor and never builds a
model.

The head is always written, tied or not: not every engine reads a tied one. A multi-token prediction
module is left out unless asked for: vLLM and SGLang draft with it, but Transformers expects it at
layer 61, as in V3, and warns of unexpected tensors at any other.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvpa.checkpoint import fp8
from dvpa.checkpoint.folders import identity_of, resumable_folder
from dvpa.checkpoint.formats import Format, find_format
from dvpa.checkpoint.number_format import (
    FORMATS,
    Fp8,
    check_format,
    count_formats,
    fp8_names,
    is_weight_due,
    read_weight,
    write_weight,
)
from dvpa.checkpoint.shards import (
    DEFAULT_SHARD_BYTES,
    DTYPES,
    ShardReader,
    ShardWriter,
    TensorInfo,
    copy_file,
    write_json,
)
from dvpa.checkpoint.source import EMBEDDING
from dvpa.checkpoint.tier_plan import Part, exported_order, is_mtp, plan_tier
from dvpa.config import FP8_QUANTIZATION, DvpaConfig
from dvpa.model.tensor_names import (
    ROUTER_WEIGHT,
    TIER_BIAS,
    Shape,
    tensor_shapes,
)

COPIED_FILES = """
tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json
vocab.json merges.txt chat_template.jinja generation_config.json
"""


@dataclass(frozen=True)
class ExportReport:
    """What an export did: tensors copied whole, cut, and left out; `num_bytes` of tensor data.

    `model_type` is the family whose format it is in; `is_in_transformers`: Transformers has a class
    for it. `quantised` of the copied have become FP8, `dequantised` were FP8 and are so no longer,
    `kept_fp8` were and are, bit for bit; their scales are not counted as tensors.
    `dropped_mtp` of those left out are a multi-token prediction module that was not kept. Where it
    is kept, the copies of embedding and head that V3 stores with it count as copied.
    `resumed_shards` files had been finished by an earlier run.
    """

    tier: int
    tier_name: str
    model_type: str
    copied: int
    sliced: int
    quantised: int
    dequantised: int
    kept_fp8: int
    dropped: int
    dropped_mtp: int
    num_bytes: int
    is_in_transformers: bool
    resumed_shards: int


@dataclass(frozen=True)
class TierSize:
    """What a tier would weigh as a checkpoint of its own: bytes of tensor data by dtype.

    `model_type` is the family whose format it would have; where there is none, `reason` says why
    and there are no bytes.
    """

    tier: int
    tier_name: str
    num_experts: int
    top_k: int
    model_type: str | None
    num_bytes: dict[str, int]
    reason: str | None = None


def export_tier(
    checkpoint: Path | str,
    tier: int | str,
    out: Path | str,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    keep_mtp: bool = False,
    dtype: str = "auto",
    progress: Callable[[str], object] = lambda text: None,
) -> ExportReport:
    """Write tier `tier` (index or name) of `checkpoint` to the new folder `out`.

    `out` appears complete or not at all; a run that was killed or failed leaves `<out>.incomplete`,
    and the same call goes on from the shards in it. Memory holds one tensor at a time. `keep_mtp`
    keeps the multi-token prediction module, as V3 stores it, cut to the tier like any other layer.
    `dtype` is one of `FORMATS`: "auto" leaves weights as they are, "fp8" stores attention and MLP
    matrices in 128 x 128 blocks of E4M3, as DeepSeek-V3 does, and the others as bf16; what is FP8
    already stays so to the bit in both. `progress` is told how far it is.

    Raises:
        FileNotFoundError: no checkpoint there, or a shard is missing.
        ValueError: unknown tier or dtype; a tier that no family computes (see `find_format`), or
            whose selection bias its family does not have; no module to keep; `out` not empty; a
            tensor that is missing, unknown, or of the wrong shape or dtype (the message names it);
            a corrupt shard or config.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if dtype not in FORMATS:
        raise ValueError(f"dtype: {dtype!r} must be one of {', '.join(FORMATS)}")
    config = read_config(checkpoint)
    tier = config.tier_index(tier)
    style = find_format(config, tier)
    if keep_mtp and (not config.num_nextn_predict_layers or not style.has_bias):
        raise ValueError(f"keep_mtp: {checkpoint} has no multi-token prediction module to keep")
    reader = ShardReader(checkpoint)
    _check(checkpoint, config, reader.tensors)
    if not style.has_bias:
        _check_bias(reader, config, tier, style)
    plan = plan_tier(config, tier, reader.tensors, keep_mtp, style, dtype)
    files = [checkpoint / "config.json", *reader.files]
    identity = identity_of(files, [tier, shard_bytes, keep_mtp, dtype])
    with resumable_folder(out, identity) as folder:
        infos = {name: part.info for name, part in plan.items()}
        with ShardWriter(folder, infos, shard_bytes, progress, resume=True) as writer:
            _write(writer, reader, config, tier, plan)
        for name in COPIED_FILES.split():
            if (checkpoint / name).is_file():
                copy_file(checkpoint / name, folder)
        write_json(folder / "config.json", _config(style, config, tier, keep_mtp, plan))
    return _report(config, tier, reader, plan, style, keep_mtp, writer.resumed)


def list_tiers(checkpoint: Path | str) -> list[TierSize]:
    """What each tier would weigh in every dtype, base first; reads headers only.

    Raises:
        FileNotFoundError, ValueError: as `export_tier`, of the checkpoint.
    """
    checkpoint = Path(checkpoint)
    config = read_config(checkpoint)
    reader = ShardReader(checkpoint)
    _check(checkpoint, config, reader.tensors)
    sizes = []
    for tier in range(config.num_tiers):
        num_bytes: dict[str, int] = {}
        model_type, reason = None, None
        try:
            style = find_format(config, tier)
            model_type = style.family.model_type
            for dtype in FORMATS:
                plan = plan_tier(config, tier, reader.tensors, False, style, dtype)
                num_bytes[dtype] = sum(part.info.num_bytes for part in plan.values())
        except ValueError as error:
            reason = str(error)
        sizes.append(
            TierSize(
                tier=tier,
                tier_name=config.tier_names[tier],
                num_experts=config.pool_size(tier),
                top_k=config.tiers[tier].top_k,
                model_type=model_type,
                num_bytes=num_bytes,
                reason=reason,
            )
        )
    return sizes


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


def _check(checkpoint: Path, config: DvpaConfig, tensors: Mapping[str, TensorInfo]) -> None:
    expected: dict[str, Shape] = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{checkpoint}: {name}: missing")
        if tensors[name].shape != shape:
            raise ValueError(f"{checkpoint}: {name}: shape {tensors[name].shape}, expected {shape}")
        check_format(checkpoint, name, tensors, config.has_fp8_weights)
    coded = fp8_names(tensors)
    for name in tensors:
        if name not in expected and not fp8.is_scale(name, coded):
            raise ValueError(f"{checkpoint}: {name}: unknown tensor")


def _check_bias(reader: ShardReader, config: DvpaConfig, tier: int, style: Format) -> None:
    """Refuse a selection bias that the family's router would not have."""
    for name in tensor_shapes(config):
        if name.endswith(TIER_BIAS) and _bias(reader, config, tier, name).any():
            raise ValueError(
                f"{reader.folder}: {name}: not zero for tier {config.tier_names[tier]}, and the "
                f"router of {style.family.model_type} has no selection bias"
            )


def _write(
    writer: ShardWriter,
    reader: ShardReader,
    config: DvpaConfig,
    tier: int,
    plan: Mapping[str, Part],
) -> None:
    for name, part in plan.items():
        if name.endswith(fp8.SCALE_SUFFIX):
            continue  # written with its weight
        if is_weight_due(writer, name, part.info):
            weight = _part(reader, config, tier, part.source)
            write_weight(writer, name, part.info, weight, f"{reader.folder}: {part.source}")


def _part(reader: ShardReader, config: DvpaConfig, tier: int, source: str) -> Tensor | Fp8:
    """The part of a tensor that the tier keeps, its experts in the order of the export."""
    if source.endswith(TIER_BIAS):
        return _bias(reader, config, tier, source)
    if not source.endswith(ROUTER_WEIGHT):
        return read_weight(reader, source)
    rows = reader.read(source, (slice(0, config.pool_size(tier)),))
    return rows if config.pool == "prefix" else rows[exported_order(config, tier)]


def _bias(reader: ShardReader, config: DvpaConfig, tier: int, source: str) -> Tensor:
    """A tier's row of a selection bias, fp32 [experts of the pool]."""
    pool = slice(0, config.pool_size(tier))
    row = reader.read(source, (slice(tier, tier + 1), pool))[0].to(torch.float32)
    return row if config.pool == "prefix" else row[exported_order(config, tier)]


def _config(
    style: Format, config: DvpaConfig, tier: int, keep_mtp: bool, plan: Mapping[str, Part]
) -> dict[str, Any]:
    """`config.json`, with the number format that was written."""
    written = style.config(config, tier, keep_mtp)
    written["dtype"] = str(DTYPES[plan[EMBEDDING].info.dtype]).removeprefix("torch.")
    if any(part.info.dtype == "F8_E4M3" for part in plan.values()):
        written["quantization_config"] = dict(FP8_QUANTIZATION)
        if not style.has_bias:  # others than V3's classes make linear layers of these, too
            kept = [name.removesuffix(".weight") for name in plan if name.endswith("gate.weight")]
            written["quantization_config"]["modules_to_not_convert"] = ["lm_head", *kept]
    return written


def _report(
    config: DvpaConfig,
    tier: int,
    reader: ShardReader,
    plan: Mapping[str, Part],
    style: Format,
    keep_mtp: bool,
    resumed: int,
) -> ExportReport:
    tensors = reader.tensors
    whole = [part for name, part in plan.items() if not name.endswith(fp8.SCALE_SUFFIX)]
    formats = count_formats((tensors[part.source], part.info) for part in whole)
    sliced = sum(part.info.shape != tensors[part.source].shape for part in whole)
    coded = fp8_names(tensors)
    dropped = {name for name in tensors if not fp8.is_scale(name, coded)}
    dropped -= {part.source for part in whole}
    return ExportReport(
        tier=tier,
        tier_name=config.tier_names[tier],
        model_type=style.family.model_type,
        copied=len(whole) - sliced,
        sliced=sliced,
        quantised=formats.quantised,
        dequantised=formats.dequantised,
        kept_fp8=formats.kept_fp8,
        dropped=len(dropped),
        dropped_mtp=0 if keep_mtp else sum(is_mtp(config, name) for name in dropped),
        num_bytes=sum(part.info.num_bytes for part in plan.values()),
        is_in_transformers=style.is_in_transformers,
        resumed_shards=resumed,
    )
