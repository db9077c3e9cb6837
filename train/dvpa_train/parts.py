"""The parts of a model that a recipe can name: what `freeze` keeps and `lora.targets` adapts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dvpa.config import DvpaConfig
from dvpa.model.tensor_names import HEAD_PREFIX

if TYPE_CHECKING:
    from dvpa_train.config import Recipe, StageConfig

# Beginnings or pieces of parameter names; the first that fits decides.
_PIECES = {
    "embeddings": ("model.embed_tokens.",),
    "lm_head": ("lm_head.",),
    "norms": ("norm.", "layernorm."),
    "attention": (".self_attn.",),
    "router": (".mlp.gate.weight",),
    "tier_bias": (".mlp.gate.tier_bias",),
    "experts": (".mlp.experts.",),
    "shared_experts": (".mlp.shared_experts.",),
    "dense": (".mlp.",),  # the MLPs of the layers without experts
}
PARTS = tuple(_PIECES)
ADAPTABLE = ("attention", "experts", "shared_experts", "dense")


def part_of(name: str) -> str | None:
    """The part that a parameter, buffer or module belongs to; None for the difficulty head's."""
    if name.startswith(HEAD_PREFIX):
        return None
    for part, pieces in _PIECES.items():
        if any(piece in f"{name}." for piece in pieces):
            return part
    return None


def freeze(model: nn.Module, parts: Sequence[str]) -> int:
    """Exclude parts from training; the number of parameters (scalars) that stay as they are.

    `tier_bias` is no parameter: the load balancing of the stage has to leave it alone.
    """
    frozen = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)
        frozen += 0 if parameter.requires_grad else parameter.numel()
    return frozen


def check_finetuning(recipe: "Recipe", config: DvpaConfig, path: Path) -> None:
    """Check the keys that start from a checkpoint.

    Raises:
        ValueError: one of them is out of range, or given without `initial_checkpoint`.
    """
    for i, stage in enumerate(recipe.stages):
        _check_stage(recipe, config, stage, f"{path}: stages[{i}]")
    for name in recipe.freeze:
        if name not in PARTS:
            raise ValueError(f"{path}: freeze: {name!r} must be one of {', '.join(PARTS)}")
    if recipe.initial_checkpoint is None:
        if recipe.lora is not None:
            raise ValueError(f"{path}: lora: needs an initial_checkpoint to adapt")
        if recipe.freeze:
            raise ValueError(f"{path}: freeze: needs an initial_checkpoint")
        return
    if config.difficulty is None:
        raise ValueError(
            f"{path}: {recipe.initial_checkpoint} has no difficulty head: give "
            "difficulty.probe_layer and difficulty.hidden_size of the one to train"
        )
    if recipe.lora is not None:
        _check_lora(recipe, config, f"{path}: lora")


def _check_stage(recipe: "Recipe", config: DvpaConfig, stage: "StageConfig", where: str) -> None:
    if recipe.initial_checkpoint is not None:
        if stage.kind != "joint":
            raise ValueError(
                f"{where}.kind: {stage.kind} must be joint: all tiers of initial_checkpoint exist"
            )
        if stage.num_tiers != config.num_tiers:
            raise ValueError(
                f"{where}.num_tiers: {stage.num_tiers} must be the {config.num_tiers} of "
                f"{recipe.initial_checkpoint}"
            )
    if stage.teacher == "frozen":
        if recipe.initial_checkpoint is None:
            raise ValueError(f"{where}.teacher: frozen needs an initial_checkpoint")
        if not stage.distillation:
            raise ValueError(f"{where}.teacher: frozen needs distillation above 0")
        if config.num_tiers == 1:
            raise ValueError(f"{where}.teacher: frozen needs a tier below the top to learn from it")
    elif stage.distill_top:
        raise ValueError(f"{where}.distill_top: needs teacher: frozen")


def _check_lora(recipe: "Recipe", config: DvpaConfig, where: str) -> None:
    lora = recipe.lora
    assert lora is not None
    if recipe.freeze:
        raise ValueError(f"{where}: freezes everything else by itself; leave freeze out")
    if lora.rank < 1 or not lora.alpha > 0:
        raise ValueError(f"{where}: rank {lora.rank} and alpha {lora.alpha} must be positive")
    absent = {
        "shared_experts": not config.n_shared_experts,
        "dense": not config.first_k_dense_replace,
    }
    for name in lora.targets:
        if name not in ADAPTABLE:
            raise ValueError(f"{where}.targets: {name!r} must be one of {', '.join(ADAPTABLE)}")
        if absent.get(name):
            raise ValueError(f"{where}.targets: the model has no {name}")
    if not lora.targets:
        raise ValueError(f"{where}.targets: must not be empty")
    for group in lora.groups:
        if not 0 <= group < config.num_units:
            raise ValueError(f"{where}.groups: {group} must be in 0 .. {config.num_units - 1}")
    if lora.groups and "experts" not in lora.targets:
        raise ValueError(f"{where}.groups: only experts have groups, and targets leaves them out")
