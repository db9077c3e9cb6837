"""`dvpa plan --train`: a recipe's stages on machines that need not exist yet."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvpa.cli_output import console, write_json

if TYPE_CHECKING:
    from dvpa.plan import StagePrediction, TrainingPlan, TrainStage

BESIDE_THE_MODEL = ""  # `--train` without a recipe
# Options that say nothing without --train.
TRAIN_ONLY = [
    *("gpus", "gpu", "gpu_file", "sequence", "expert_parallel", "shard", "micro_batch"),
    *("checkpointing", "loss_chunk", "assume", "explain"),
]


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dvpa plan` that have to do with training."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--train",
        nargs="?",
        const=BESIDE_THE_MODEL,
        metavar="RECIPE.yaml",
        help="plan a run of this recipe (default: the one named like the model)",
    )
    group.add_argument("--gpus", type=int, help="how many; each is one rank")
    group.add_argument("--gpu", help="h100 (default), h200, a100-80gb or cpu")
    group.add_argument("--gpu-file", metavar="FILE", help="YAML of another machine instead")
    group.add_argument("--sequence", type=int, help="positions of a sequence (the recipe's)")
    group.add_argument("--expert-parallel", type=int, help="settle it (default: the fastest)")
    group.add_argument("--shard", type=int, help="ranks that share the state (the fastest)")
    group.add_argument("--micro-batch", type=int, help="examples of one pass (the fastest)")
    group.add_argument("--checkpointing", choices=["on", "off"], help="(the fastest)")
    group.add_argument(
        "--loss-chunk",
        type=int,
        help="positions whose logits are alive at once; 0: all (default; chunks if nothing fits)",
    )
    group.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change an assumption, as in efficiency=0.4; the plan lists all of them (repeatable)",
    )
    group.add_argument("--explain", metavar="STAGE", help="the stage to explain (the tightest)")


def plan_run(arguments: argparse.Namespace) -> None:
    """Search a layout and show what it would cost."""
    from dvpa.architecture import find_config, load_architecture
    from dvpa.plan import Wishes, find_machine, plan_training, read_assumptions

    path = find_config(arguments.model)
    config = load_architecture(path)
    if arguments.gpus is None:
        raise ValueError("--train needs --gpus N")
    if arguments.gpu is not None and arguments.gpu_file is not None:
        raise ValueError("--gpu and --gpu-file: give one of the two")
    machine = find_machine(arguments.gpu or "h100", arguments.gpu_file)
    assumptions = read_assumptions(arguments.assume)
    stages = _read_stages(arguments, path)
    checkpointing = {None: None, "on": True, "off": False}[arguments.checkpointing]
    wishes = Wishes(
        arguments.expert_parallel,
        arguments.shard,
        arguments.micro_batch,
        checkpointing,
        arguments.loss_chunk,
    )
    names = [stage.name for stage in stages]
    if arguments.explain is not None and arguments.explain not in names:
        raise ValueError(f"--explain: {arguments.explain!r} must be one of {', '.join(names)}")
    plan = plan_training(config, stages, machine, arguments.gpus, assumptions, wishes)
    if not write_json(arguments.json, plan.to_dict()):
        _show(path.stem, plan, arguments.explain)


def _read_stages(arguments: argparse.Namespace, model: Path) -> list["TrainStage"]:
    """The recipe's stages in plain numbers; the recipe has to train this model."""
    from dvpa.architecture import find_config, load_architecture
    from dvpa.plan import TrainStage
    from dvpa_train.config import load_recipe

    sequence = arguments.sequence
    recipe = load_recipe(arguments.train or f"train/{model.stem}.yaml")
    if recipe.model is None:
        raise ValueError(
            f"--train: recipe {recipe.name} starts from a checkpoint, not {model.name}"
        )
    packed = recipe.data.packed
    length = recipe.data.max_length if packed is None else packed.sequence_length
    if load_architecture(find_config(recipe.model)) != load_architecture(model):
        raise ValueError(f"--train: recipe {recipe.name} trains {recipe.model}, not {model.name}")
    return [
        TrainStage(
            name=stage.name,
            num_tiers=stage.num_tiers,
            steps=stage.steps,
            examples=stage.batch_size,
            sequence=length if sequence is None else sequence,
            tier_weights=tuple(stage.tier_weights),
            is_paired=stage.distillation > 0,
            switch_fraction=stage.switch_fraction,
        )
        for stage in recipe.stages
    ]


def _show(name: str, plan: "TrainingPlan", explain: str | None) -> None:
    """The stages in a table, then where every number comes from."""
    from rich import box
    from rich.table import Table

    out = console()
    out.print(
        f"{name} on {plan.num_gpus} x {plan.machine.name}: {plan.model_params / 1e9:.4g}B "
        f"parameters; {plan.gpu_hours:,.0f} GPU-hours, {plan.days:.1f} days"
    )
    out.print(f"layout: {plan.layout.describe(plan.num_gpus)}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage")
    headings = ("micro x\naccum.", "GB a\nrank", "all-to-\nall GB", "weights\nGB", "s a\nstep")
    for heading in (*headings, "tokens\n/s", "MFU", "days"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        table.add_row(
            stage.name,
            f"{stage.micro_batch} x {stage.accumulate}",
            f"{stage.memory_bytes / 1e9:.3g}",
            f"{stage.alltoall_bytes / 1e9:,.0f}",
            f"{stage.weight_bytes / 1e9:,.0f}",
            f"{stage.step_seconds:.3g}",
            _short(stage.tokens_per_second),
            f"{stage.mfu:.0%}",
            f"{stage.days:.3g}",
        )
    out.print(table)
    counts = "; ".join(f"{count} {reason}" for reason, count in plan.passed_over.items())
    out.print(f"other layouts: {counts or 'none'}")
    days = ", ".join(f"{ranks}: {d:.1f}" for ranks, d in plan.days_by_expert_parallel.items())
    out.print(f"days of the fastest layout by expert_parallel: {days}")
    for line in plan.host_memory:
        out.print(f"host memory, {line.name}: {line.value / 1e9:.3g} GB = {line.formula}")
    explained = max(plan.stages, key=lambda stage: stage.memory_bytes)
    for stage in plan.stages:
        explained = stage if stage.name == explain else explained
    _explain(explained)
    machine, assumed = vars(plan.machine), vars(plan.assumptions)
    for title, values in (("machine", machine), ("assumed (--assume)", assumed)):
        out.print(f"\n{title}: " + ", ".join(f"{key} {_plain(v)}" for key, v in values.items()))


def _explain(stage: "StagePrediction") -> None:
    """Every number of one stage with its formula."""
    out = console()
    out.print(
        f"\nstage {stage.name}, one rank, one step of {_short(stage.tokens_per_step)} tokens at a "
        f"mean k of {stage.mean_top_k:.3g}; GB are 10^9 bytes"
    )
    parts: list[tuple[str, Any, float, str]] = [
        ("memory", stage.memory, 1e9, "GB"),
        ("sent", stage.traffic, 1e9, "GB"),
        ("time", stage.time, 1.0, "s"),
    ]
    for title, lines, unit, symbol in parts:
        for line in lines:
            if title == "sent" and not line.value:
                continue
            out.print(f"  {title}: {line.name} {line.value / unit:.4g} {symbol} = {line.formula}")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(number: float) -> str:
    from dvpa.plan.stage_model import amount

    return amount(number)
