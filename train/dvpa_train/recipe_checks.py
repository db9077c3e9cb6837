"""What a recipe must not say: ranges, and keys that do not go together."""

from pathlib import Path
from typing import TYPE_CHECKING

from dvpa.config import DvpaConfig
from dvpa_train.parts import check_finetuning

if TYPE_CHECKING:
    from dvpa_train.config import MtpConfig, Recipe


def check(recipe: "Recipe", path: Path) -> None:
    """ValueError naming the key and the file for a recipe that cannot be run."""
    if (recipe.model is None) == (recipe.initial_checkpoint is None):
        raise ValueError(f"{path}: give either model or initial_checkpoint")
    config = recipe.model_config()
    check_finetuning(recipe, config, path)
    if (recipe.data.graded is None) != bool(recipe.data.files):
        raise ValueError(f"{path}: data: give either graded or files")
    _check_strategy(recipe, path, config)
    if recipe.mtp is not None:
        _check_mtp(recipe.mtp, config, path)
    _check_packed(recipe, path, config)
    if recipe.calibration is not None and config.difficulty is None:
        raise ValueError(
            f"{path}: calibration: the model has no difficulty head; give it one (difficulty), or "
            "say calibration: null"
        )
    if not recipe.stages:
        raise ValueError(f"{path}: stages: must not be empty")
    previous = 0
    for i, stage in enumerate(recipe.stages):
        where = f"{path}: stages[{i}]"
        least = max(previous, 1)
        if not least <= stage.num_tiers <= config.num_tiers:
            raise ValueError(
                f"{where}.num_tiers: {stage.num_tiers} must be in {least} .. {config.num_tiers}"
            )
        if stage.kind == "foundation" and (i > 0 or stage.num_tiers != 1):
            raise ValueError(f"{where}.kind: foundation must be the first stage, with num_tiers 1")
        if stage.kind == "expansion" and stage.num_tiers == previous:
            raise ValueError(f"{where}.kind: expansion must add tiers to the stage before it")
        if stage.tier_weights and len(stage.tier_weights) != stage.num_tiers:
            raise ValueError(f"{where}.tier_weights: needs {stage.num_tiers} numbers, one per tier")
        if any(w < 0 for w in stage.tier_weights) or (
            stage.tier_weights and not sum(stage.tier_weights)
        ):
            raise ValueError(f"{where}.tier_weights: must be non-negative with a positive sum")
        if stage.level_weights and (recipe.data.graded is None or recipe.data.packed):
            raise ValueError(f"{where}.level_weights: only graded tasks have levels")
        for name in ("steps", "batch_size"):
            if getattr(stage, name) < 1:
                raise ValueError(f"{where}.{name}: {getattr(stage, name)} must be positive")
        for name in ("distillation", "switch_fraction", "bias_frozen_fraction"):
            if not 0 <= getattr(stage, name) <= 1:
                raise ValueError(f"{where}.{name}: {getattr(stage, name)} must be in 0 .. 1")
        previous = stage.num_tiers
    if previous != config.num_tiers:
        raise ValueError(
            f"{path}: stages: the last stage has {previous} tiers, the model {config.num_tiers}"
        )


def _check_strategy(recipe: "Recipe", path: Path, config: DvpaConfig) -> None:
    strategy, where = recipe.strategy, f"{path}: strategy"
    for name in ("expert_parallel", "accumulate", "timeout_s"):
        if getattr(strategy, name) <= 0:
            raise ValueError(f"{where}.{name}: {getattr(strategy, name)} must be positive")
    if strategy.expert_parallel > 1 and strategy.kind != "fsdp2":
        # ZeRO-3 overwrites own experts with rank 0's, without a word; 1 and 2 cannot save them.
        raise ValueError(f"{where}.expert_parallel: needs kind fsdp2, not {strategy.kind}")
    if strategy.loss_chunk is not None and strategy.loss_chunk < 0:
        raise ValueError(
            f"{where}.loss_chunk: {strategy.loss_chunk} must be 0 (all at once) or positive"
        )
    if config.unit_size % strategy.expert_parallel:
        raise ValueError(
            f"{where}.expert_parallel: {strategy.expert_parallel} must divide the "
            f"{config.unit_size} experts of a group"
        )
    if recipe.lora is not None and strategy.kind not in ("single", "ddp"):
        raise ValueError(f"{where}.kind: lora needs single or ddp, not {strategy.kind}")
    for stage in recipe.stages:
        if stage.teacher == "frozen" and strategy.kind == "deepspeed":
            raise ValueError(
                f"{where}.kind: stages.{stage.name}.teacher: frozen needs single, ddp or fsdp2, "
                "not deepspeed"
            )
    if strategy.kind == "ddp" and config.num_nextn_predict_layers:
        weights = recipe.mtp_weights()
        if 0 in weights:  # DDP waits for the gradients of what has not run
            raise ValueError(f"{path}: mtp.weight: {weights} must not be 0 with strategy.kind ddp")
    if strategy.precision == "bf16" and strategy.kind not in ("fsdp2", "deepspeed"):
        raise ValueError(f"{where}.precision: bf16 needs kind fsdp2 or deepspeed")
    if recipe.freeze and strategy.kind == "deepspeed" and strategy.precision == "bf16":
        # It keeps fp32 weights of what is trained only: the others would come back rounded.
        raise ValueError(f"{where}.precision: bf16 with freeze needs kind fsdp2, not deepspeed")
    if strategy.offload_optimizer and strategy.kind != "deepspeed":
        raise ValueError(f"{where}.offload_optimizer: needs kind deepspeed, not {strategy.kind}")
    if recipe.keep_checkpoints < 1 or recipe.checkpoint_every < 1:
        raise ValueError(f"{path}: keep_checkpoints, checkpoint_every: must be positive")
    _check_log(recipe, path)
    guard = recipe.guard
    if guard.spike_factor and guard.spike_factor <= 1:
        raise ValueError(f"{path}: guard.spike_factor: {guard.spike_factor} must be 0 or above 1")
    if guard.window < 1 or guard.max_rollbacks < 0:
        raise ValueError(f"{path}: guard: window must be positive, max_rollbacks 0 or more")


def _check_log(recipe: "Recipe", path: Path) -> None:
    names = recipe.loggers
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: loggers: {', '.join(names)}: each at most once")
    if "wandb" in names and "csv" not in names:
        raise ValueError(f"{path}: loggers: wandb needs csv, from which a resumed run is completed")
    if recipe.log_every < 1 or recipe.load_every < 0:
        raise ValueError(f"{path}: log_every must be positive, load_every 0 or more")


def _check_mtp(mtp: "MtpConfig", config: DvpaConfig, path: Path) -> None:
    if len(mtp.weight) != 2 or not all(0 <= weight <= 1 for weight in mtp.weight):
        raise ValueError(f"{path}: mtp.weight: {mtp.weight} must be two numbers in 0 .. 1")
    if any(mtp.weight) and not config.num_nextn_predict_layers:
        raise ValueError(
            f"{path}: mtp.weight: {mtp.weight} needs a model with num_nextn_predict_layers: 1"
        )


def _check_packed(recipe: "Recipe", path: Path, config: DvpaConfig) -> None:
    packed = recipe.data.packed
    if packed is None:
        for i, stage in enumerate(recipe.stages):
            if stage.mixture:
                raise ValueError(f"{path}: stages[{i}].mixture: only packed data is mixed")
        return
    if not recipe.tokenizer:
        raise ValueError(f"{path}: tokenizer: packed data needs the one it was prepared with")
    if not 2 <= packed.sequence_length <= config.max_position_embeddings:
        raise ValueError(
            f"{path}: data.packed.sequence_length: {packed.sequence_length} must be in 2 .. "
            f"{config.max_position_embeddings} (the model's max_position_embeddings)"
        )
    names = [part.label for part in packed.sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: data.packed.sources: {names} must be different names, not none")
    _check_weights({p.label: p.weight for p in packed.sources}, f"{path}: data.packed.sources")
    for i, stage in enumerate(recipe.stages):
        where = f"{path}: stages[{i}].mixture"
        for name in stage.mixture:
            if name not in names:
                raise ValueError(f"{where}: {name} is not one of {', '.join(names)}")
        _check_weights(stage.mixture, where)


def _check_weights(weights: dict[str, float], where: str) -> None:
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"{where}: {name}: weight {weight} must be positive and finite")
