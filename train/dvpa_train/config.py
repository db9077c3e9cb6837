"""Recipes: one YAML file, strict, with dotted overrides.

`load_recipe` is the only way in: unknown keys are rejected with their name, values are checked by
type (jsonargparse) and by range (here), and `--set a.b=c` reaches list items by index or by their
`name` (`--set stages.joint.steps=50`).
"""

from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from dvpa.config import DvpaConfig, find_config, load_model_config, load_yaml
from dvpa_train.initial import initial_config
from dvpa_train.recipe_checks import check

StageKind = Literal["foundation", "expansion", "joint"]
LoggerName = Literal["csv", "tensorboard", "wandb"]


@dataclass
class GradedData:
    """Embedded graded tasks (dvpa.tasks.GradedTasks)."""

    seed: int = 0
    num_facts: int = 3000
    recall_share: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5, 0.5])  # levels 0 .. 3
    filler: float = 0.0
    train_weights: list[float] = field(
        default_factory=lambda: [1.0, 1.0, 1.0, 1.0]
    )  # levels 0 .. 3
    evaluation_weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0, 1.0, 1.0])


@dataclass
class FileData:
    """One local file. Held out: question/answer rows by seed, text by position (its last part)."""

    path: str
    format: Literal["gsm8k", "svamp", "jsonl", "text", "chat"]
    evaluation_only: bool = False
    chat: bool = False  # write question and answer as two turns, by the chat template


@dataclass
class PackedPart:
    """One folder that `dvpa-train prepare` wrote."""

    path: str
    weight: float = 1.0  # of its share of the samples, against the other folders'
    name: str = ""  # in a stage's `mixture`; empty: the folder's name

    @property
    def label(self) -> str:
        """What a stage's `mixture` calls it."""
        return self.name or Path(self.path).name


@dataclass
class PackedData:
    """Prepared folders to train on, as rows of `sequence_length` tokens."""

    sources: list[PackedPart]
    sequence_length: int = 1024
    seed: int | None = None  # of the order; null: the recipe's


@dataclass
class DataConfig:
    """Where examples come from: `graded`, or `files`, not both.

    With `packed`, training rows come from there, and graded or files are for evaluation only.
    """

    graded: GradedData | None = None
    files: list[FileData] = field(default_factory=list)
    packed: PackedData | None = None
    validation_fraction: float = 0.15  # of files
    max_length: int = 64  # tokens per sequence; longer ones are cut, and counted
    prompt_loss: bool = False  # also learn to predict the prompt
    chat_template: str | None = None  # Jinja file; null: the tokenizer's own


@dataclass
class OptimizerConfig:
    """AdamW, with gradient clipping by norm."""

    learning_rate: float = 3e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 0.01
    gradient_clip: float = 1.0


@dataclass
class StageConfig:
    """One training stage. `num_tiers` tiers exist in it; new ones are grown at its start."""

    name: str
    kind: StageKind
    num_tiers: int
    steps: int
    batch_size: int = 256
    tier_weights: list[float] = field(default_factory=list)  # empty: uniform over its tiers
    level_weights: list[float] = field(default_factory=list)  # empty: data.graded.train_weights
    mixture: dict[str, float] = field(default_factory=dict)  # empty: data.packed's weights
    warmup_steps: int = 20
    learning_rate_scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0]
    )  # start, end (cosine)
    distillation: float = 0.0  # weight of KL(top || lower); > 0: every example also runs at the top
    distillation_temperature: float = 1.0
    teacher: Literal["in_place", "frozen"] = "in_place"  # frozen: the initial checkpoint's
    distill_top: bool = False  # the top tier learns from the frozen one too
    switch_fraction: float = 0.0  # of the lower rows: change tier inside the sequence
    bias_update_rate: float = 3e-3
    bias_frozen_fraction: float = 0.04  # of the stage, at its end


@dataclass
class MtpConfig:
    """The loss of the multi-token prediction module: no model is changed by it, only trained."""

    weight: list[float] = field(
        default_factory=lambda: [0.3, 0.1]
    )  # for the first two thirds of all stages' steps, then; 0: not run


@dataclass
class DifficultyStage:
    """Head training on the checkpoint's own outcomes; the backbone is frozen."""

    items: int = 2500
    steps: int = 800
    learning_rate: float = 1e-3
    weight_decay: float = 0.3
    batch_size: int = 256
    probe_layer: int | None = None  # of the head that a starting checkpoint without one gets
    hidden_size: int | None = None  # of that head's MLP


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) instead of the weights themselves; merged at the end."""

    rank: int = 8
    alpha: float = 16.0  # the adapter's product is scaled by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["attention", "experts"])  # parts.PARTS
    groups: list[int] = field(default_factory=list)  # of the experts; empty: every group


@dataclass
class CalibrationStage:
    """Fitting the tier map on disjoint splits of the evaluation items."""

    budget: str = "60%"
    kind: Literal["gain", "threshold"] = "gain"
    items: int = 2000  # per split


@dataclass
class StrategyConfig:
    """Over how many processes, and how. The launcher (torchrun) says how many there are.

    kind: `single` process; `ddp`: the whole model on each; `fsdp2`: everything sharded over all,
    experts by `expert_parallel`; `deepspeed`: ZeRO.
    """

    kind: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"
    expert_parallel: int = 1  # processes that share the experts of each group (fsdp2)
    zero_stage: Literal[1, 2, 3] = 2  # (deepspeed)
    offload_optimizer: bool = False  # keep its state in CPU memory (deepspeed)
    precision: Literal["fp32", "bf16"] = "fp32"  # of the products; weights are kept in fp32
    activation_checkpointing: bool = False  # compute layers again instead of keeping them
    accumulate: int = 1  # micro-batches of a step
    loss_chunk: int | None = None  # positions whose logits are made at a time, and again in the
    # backward pass; 0: all of a micro-batch; null: 1024 where those are more than 67 million
    compile: bool = False  # torch.compile of the layers
    timeout_s: float = 600.0  # until a process that does not answer counts as lost


@dataclass
class GuardConfig:
    """What to do about a step whose loss is not finite, or jumps: back, and round its batch."""

    spike_factor: float = 0.0  # loss over the median of the last `window`; 0: only NaN and infinity
    window: int = 50  # steps
    max_rollbacks: int = 3  # of one stage; then the run ends with an error


@dataclass
class Recipe:
    """A whole progressive run."""

    name: str
    data: DataConfig
    stages: list[StageConfig]
    model: str | None = None  # a model YAML, or
    initial_checkpoint: str | None = None  # a dvpa checkpoint folder to start from
    lora: LoraConfig | None = None  # with initial_checkpoint; null: the weights themselves
    freeze: list[str] = field(default_factory=list)  # parts.PARTS that stay as they are
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mtp: MtpConfig | None = None  # null: the default, if the model has such a module
    difficulty: DifficultyStage = field(default_factory=DifficultyStage)
    calibration: CalibrationStage | None = field(
        default_factory=CalibrationStage
    )  # null: the run ends with the stages, without a difficulty head
    tokenizer: str = ""  # a tokenizer or checkpoint folder; empty: trained on the data
    seed: int = 0
    threads: int = 2
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint_every: int = 100  # optimizer steps between resumable checkpoints
    keep_checkpoints: int = 2  # the latest ones of a stage
    loggers: list[LoggerName] = field(default_factory=lambda: ["csv", "wandb"])  # empty: no log
    log_every: int = 20  # optimizer steps between rows
    load_every: int = 0  # between pictures of the experts' load; 0: at the end of each stage only
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # WANDB_MODE wins

    def model_config(self) -> DvpaConfig:
        """The full model's configuration: of the model YAML, or of the starting checkpoint."""
        if self.initial_checkpoint is not None:
            head = self.difficulty
            return initial_config(self.initial_checkpoint, head.probe_layer, head.hidden_size)
        assert self.model is not None  # checked on reading
        return load_model_config(self.model)

    def mtp_weights(self) -> list[float]:
        """Weight of the multi-token prediction loss, early and late; zeros without the module."""
        if not self.model_config().num_nextn_predict_layers:
            return [0.0, 0.0]
        return (self.mtp or MtpConfig()).weight

    def sized_config(self, num_tokens: int) -> DvpaConfig:
        """The same for a tokenizer of so many tokens; a starting checkpoint keeps its own size."""
        config = self.model_config()
        if self.initial_checkpoint is None:
            config.vocab_size = num_tokens
        return config


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Raises:
        FileNotFoundError: the recipe, or the model file it names, does not exist.
        ValueError: unknown key, wrong type or value out of range.
    """
    path = find_config(path)
    data = load_yaml(path)
    for override in overrides or []:
        apply_override(data, override)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, as_group=False)
    try:
        parsed: Namespace = parser.parse_object(data)
        recipe: Recipe = Recipe(**vars(parser.instantiate(parsed)))
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    check(recipe, path)
    return recipe


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one key of nested YAML content, `a.b=c`; list items by index or by their `name`."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"--set {override}: must look like key.subkey=value")
    node: Any = data
    *parents, last = name.split(".")
    for part in parents:
        node = node[_key(node, part, override)]
        if node is None:
            raise ValueError(f"--set {override}: {part} is empty in the recipe")
    key = _key(node, last, override) if isinstance(node, list) else last
    node[key] = yaml.safe_load(text)


def _key(node: Any, part: str, override: str) -> str | int:
    if isinstance(node, dict):
        if part not in node:
            node[part] = {}
        return part
    if isinstance(node, list):
        names = [
            str(item.get("name", i)) if isinstance(item, dict) else str(i)
            for i, item in enumerate(node)
        ]
        if part in names:
            return names.index(part)
        if part.isdecimal() and int(part) < len(node):
            return int(part)
        raise ValueError(f"--set {override}: {part} is not one of {', '.join(names)}")
    raise ValueError(f"--set {override}: {part} has no parts of its own")
