"""A Mixture-of-Experts checkpoint of another family as a dvpa checkpoint with nested tiers.

Experts are ranked by what they add on a calibration text (REAP, see `importance`) and stored most
important first, so that a tier's pool is a prefix; experts whose outputs dwarf all others come
first whatever their rank. Routing is untouched but for the experts' numbers: the top tier computes
what the source computes. Nothing is trained; the report says what each tier loses by that.

One layer is in memory while experts are measured, one tensor while they are written. The new folder
appears complete or not at all; a conversion that was stopped goes on with what it had measured, and
with the shards it had finished.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvpa.architecture import TOP_TIER_FIELDS
from dvpa.checkpoint.calibration_text import CalibrationText
from dvpa.checkpoint.expert_choice import CHOICE_FILE, ExpertChoice, choose_experts
from dvpa.checkpoint.export import COPIED_FILES
from dvpa.checkpoint.families import limits_groups
from dvpa.checkpoint.folders import identity_of, resumable_folder
from dvpa.checkpoint.importance import Progress
from dvpa.checkpoint.number_format import (
    FORMATS,
    FormatCounts,
    Fp8,
    count_formats,
    is_weight_due,
    stored_as,
    write_weight,
)
from dvpa.checkpoint.pools import TierWish, default_tiers, tier_fields
from dvpa.checkpoint.shards import (
    DEFAULT_SHARD_BYTES,
    DTYPES,
    ShardWriter,
    TensorInfo,
    copy_file,
    write_json,
)
from dvpa.checkpoint.source import EMBEDDING, Source, open_source
from dvpa.config import FP8_QUANTIZATION, DvpaConfig
from dvpa.fp8 import CODES
from dvpa.model.causal_lm import TIER_MAP_FILE
from dvpa.model.standalone import AUTO_MAP, write_standalone
from dvpa.model.tensor_names import ROUTER_WEIGHT, TIER_BIAS, expert_index, tensor_shapes
from dvpa.pricing import price
from dvpa.tiers.tier_map import TierMap

RECORD_FILE = "conversion.json"
POOLS = ("prefix", "striped")


@dataclass(frozen=True)
class ConvertedTier:
    """A tier of the new checkpoint; `nll` (nats per token, held-out text) where it was measured."""

    name: str
    pool: int
    top_k: int
    topk_group: int
    routed_scaling_factor: float
    activated_params: int
    nll: float | None


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; `conversion.json` beside the weights.

    Attributes:
        source: the model type that was taken in.
        tiers: base first.
        text: where the calibration text came from; None where the source's order was kept.
        tokens, held_out_tokens: how many measured the experts, and the tiers.
        expert_order: by layer, the source's expert at each place.
        importance: by layer, REAP of the source's experts.
        pool: the kind of the tiers' pools.
        pools: losses of every tier by kind of pool, where they were measured.
        not_possible: kinds of pools that were not compared, and why.
        super_experts: (layer, source's expert) pairs put into every pool.
        unpinned: those of them that the base pool has no room for.
        never_chosen: experts without a single token, over all layers.
        left_out: tensors that were not taken over, by reason.
        formats: weights that were FP8 and are so bit for bit (`kept_fp8`), that became FP8, and
            that were FP8 and are so no longer; scales are not counted.
        num_tensors, num_bytes: what was written.
        resumed_shards: how many files an earlier run had finished.
    """

    source: str
    tiers: list[ConvertedTier]
    text: str | None
    tokens: int
    held_out_tokens: int
    pool: str
    pools: dict[str, list[float]]
    not_possible: dict[str, str]
    expert_order: dict[str, list[int]]
    importance: dict[str, list[float]]
    super_experts: list[tuple[int, int]]
    unpinned: list[tuple[int, int]]
    never_chosen: int
    left_out: dict[str, int]
    formats: FormatCounts
    num_tensors: int
    num_bytes: int
    resumed_shards: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)


def convert_checkpoint(
    source: Path | str,
    out: Path | str,
    text: CalibrationText | None,
    *,
    tiers: Sequence[TierWish] | None = None,
    pool: str = "auto",
    dtype: str = "auto",
    drop_mtp: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda text: None,
) -> ConversionReport:
    """Write the checkpoint folder `source` to the new folder `out`, as a dvpa checkpoint.

    Args:
        source: a folder with config.json and safetensors, of a family in `FAMILIES`.
        out: a new folder; it appears complete or not at all. A run that was killed or failed leaves
            `<out>.incomplete`, from which the same call goes on.
        text: what experts are measured on; None keeps their order.
        tiers: base first; default `default_tiers`.
        pool: "prefix", "striped", or "auto": the kind whose lower tiers lose less on the text.
        dtype: of the new weights, one of `FORMATS`: "auto" as they are, FP8 to the bit; "fp8" for
            matrices of attention and MLPs as DeepSeek-V3 stores them, the others bf16.
        drop_mtp: leave the multi-token prediction module out.
        shard_bytes: at most so many bytes of tensors in a file.
        progress: told what is being done.

    Raises:
        FileNotFoundError: no checkpoint there, or a shard is missing.
        ValueError: what `open_source` refuses; tiers that do not fit; `out` not empty.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype: {dtype!r} must be one of {', '.join(FORMATS)}")
    opened = open_source(source, drop_mtp)
    wishes = list(tiers) if tiers is not None else default_tiers(opened.config)
    configs, not_possible = _configs(opened, wishes, pool, text is not None)
    size = opened.config.vocab_size
    if text is not None and int(text.ids.max()) >= size:
        raise ValueError(
            f"calibration text: token {int(text.ids.max())} must be below vocab_size = {size}"
        )
    settings = {
        "tiers": [asdict(wish) for wish in wishes],
        "text": None if text is None else text.digest(),
        "options": [pool, dtype, drop_mtp, shard_bytes],
    }
    identity = identity_of([opened.folder / "config.json", *opened.reader.files], settings)
    with resumable_folder(Path(out), identity) as folder:  # refuses a full `out` before the work
        choice = ExpertChoice.load(folder)
        if choice is None:
            choice = choose_experts(opened, configs, text, progress)
            if text is not None:
                choice.save(folder)
        config = configs[choice.pool]
        progress("writing")
        plan = _plan(opened, config, dtype)
        resumed = _write(opened, config, choice, plan, folder, shard_bytes, progress)
        report = ConversionReport(
            source=opened.family.model_type,
            tiers=_tiers(config, choice.losses.get(choice.pool)),
            text=None if text is None else text.origin,
            tokens=0 if text is None else text.measuring.numel(),
            held_out_tokens=0 if text is None else text.held_out.numel(),
            pool=choice.pool,
            pools=choice.losses,
            not_possible=not_possible,
            expert_order=choice.orders,
            importance=choice.importance,
            super_experts=choice.super_experts,
            unpinned=choice.outside(config.pool_size(0)),
            never_chosen=choice.never_chosen,
            left_out=_count(opened.left_out.values()),
            formats=count_formats((opened.stored(n), plan[n]) for n in tensor_shapes(config)),
            num_tensors=len(plan),
            num_bytes=sum(info.num_bytes for info in plan.values()),
            resumed_shards=resumed,
        )
        write_json(folder / RECORD_FILE, report.to_dict())
        (folder / CHOICE_FILE).unlink(missing_ok=True)
    return report


def _configs(
    source: Source, wishes: Sequence[TierWish], pool: str, can_compare: bool
) -> tuple[dict[str, DvpaConfig], dict[str, str]]:
    """The new checkpoint's config by kind of pool, and why a kind is not among them.

    Raises:
        ValueError: tiers that fit no kind.
    """
    if pool not in ("auto", *POOLS):
        raise ValueError(f"pool: {pool!r} must be 'auto' or one of {', '.join(POOLS)}")
    wanted: Sequence[str] = (pool,)
    if pool == "auto":
        wanted = POOLS if can_compare and limits_groups(source.config) else POOLS[:1]
    configs, failed = {}, {}
    for kind in wanted:
        data = source.config.to_dict()
        for name in TOP_TIER_FIELDS:
            data.pop(name)
        try:
            data.update(tier_fields(source.config, wishes, kind))
            configs[kind] = DvpaConfig.from_dict(data)
        except ValueError as error:
            failed[kind] = error
    if not configs:
        raise next(iter(failed.values()))
    return configs, {kind: str(error) for kind, error in failed.items()}


def _plan(source: Source, config: DvpaConfig, dtype: str) -> dict[str, TensorInfo]:
    """What to write, in order."""
    plan = {}
    for name, shape in tensor_shapes(config).items():
        # A router's rows change places, which FP8 blocks cannot.
        stored = source.info(name) if name.endswith(ROUTER_WEIGHT) else source.stored(name)
        plan.update(stored_as(name, name, TensorInfo(stored.dtype, shape), dtype))
    return plan


def _write(
    source: Source,
    config: DvpaConfig,
    choice: ExpertChoice,
    plan: dict[str, TensorInfo],
    folder: Path,
    shard_bytes: int,
    progress: Progress,
) -> int:
    """Fill the new folder; how many shards of an earlier run were taken over."""
    with ShardWriter(folder, plan, shard_bytes, progress, resume=True) as writer:
        for name in tensor_shapes(config):
            if is_weight_due(writer, name, plan[name]):
                weight = _moved(source, config, choice, name)
                write_weight(writer, name, plan[name], weight, f"{source.folder}: {name}")
    for path in sorted(source.folder.iterdir()):
        if path.name in COPIED_FILES.split() or path.name.startswith("LICENSE"):
            copy_file(path, folder)
    config.architectures, config.auto_map = ["DvpaForCausalLM"], dict(AUTO_MAP)
    is_fp8 = any(info.dtype == CODES for info in plan.values())
    quantization = {"quantization_config": dict(FP8_QUANTIZATION)} if is_fp8 else {}
    embedding = plan[EMBEDDING].dtype
    config.dtype = torch.bfloat16 if embedding == CODES else DTYPES[embedding]
    write_json(folder / "config.json", {**config.to_dict(), **quantization})
    costs = [float(tier.activated_params) for tier in price(config).tiers]
    TierMap.untrained(config.tier_names, costs).save(folder / TIER_MAP_FILE)
    write_standalone(folder)
    return writer.resumed


def _moved(source: Source, config: DvpaConfig, choice: ExpertChoice, name: str) -> Tensor | Fp8:
    """A tensor of the new checkpoint."""
    if name.endswith((ROUTER_WEIGHT, TIER_BIAS)):
        order_E = choice.order(int(name.split(".")[2]))
        if name.endswith(TIER_BIAS):
            return source.read(name)[:, order_E].expand(config.num_tiers, -1)
        return source.read(name)[order_E]
    expert = expert_index(name)
    if expert is None:
        return source.read_stored(name)
    moved = choice.orders[name.split(".")[2]][expert]
    return source.read_stored(name.replace(f".experts.{expert}.", f".experts.{moved}."))


def _tiers(config: DvpaConfig, losses: Sequence[float] | None) -> list[ConvertedTier]:
    priced = price(config).tiers
    return [
        ConvertedTier(
            name=tier.name,
            pool=config.pool_size(i),
            top_k=tier.top_k,
            topk_group=tier.topk_group,
            routed_scaling_factor=tier.routed_scaling_factor,
            activated_params=priced[i].activated_params,
            nll=None if losses is None else losses[i],
        )
        for i, tier in enumerate(config.tiers)
    ]


def _count(reasons: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return counts
