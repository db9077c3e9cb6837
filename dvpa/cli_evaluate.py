"""`dvpa evaluate`: lm-eval's tasks at one tier, several, or routed."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvpa.cli_checkpoint import open_engine, require_checkpoint
from dvpa.cli_output import console, params_of, write_json

EXAMPLE = "runs/demo/checkpoint --tasks my_task.yaml --tier auto top"


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dvpa evaluate`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a dvpa checkpoint")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="a YAML file of lm-eval's format, or the name of one of its own tasks",
    )
    parser.add_argument(
        "--tier", nargs="+", default=["auto"], help="names or indices; auto (default) routes"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="default: the task's")
    parser.add_argument("--concurrency", type=int, default=16, help="at a time (default: 16)")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16, float32 (as stored)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")


def evaluate(arguments: argparse.Namespace) -> None:
    """Run the tasks, show a line per task, metric and tier."""
    for name in ("limit", "concurrency", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: {value} must be 1 or more")
    require_checkpoint(arguments.checkpoint)
    try:
        from dvpa.evaluate.harness import evaluate as run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ValueError("evaluate: needs lm-eval: pip install 'dvpa[eval]'") from None
    engine = open_engine(arguments, arguments.concurrency)
    from dvpa.tiers.policy import tier_index

    names = engine.model.config.tier_names
    tiers = dict.fromkeys(
        tier if tier == "auto" else names[tier_index(tier, names)] for tier in arguments.tier
    )
    try:
        found = run(
            engine,
            arguments.tasks,
            list(tiers),
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
        )
    finally:
        engine.close()
    if not write_json(arguments.json, {"tiers": found}):
        _show(found)


def _show(found: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="lm-eval", title_justify="left")
    for heading in ("task", "metric"):
        table.add_column(heading)
    for tier in found:
        table.add_column(tier, justify="right")
    first = next(iter(found.values()))["results"]
    for task, row in first.items():
        for key in row:
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            cells = []
            for of_tier in found.values():
                value = of_tier["results"][task][key]
                error = of_tier["results"][task].get(f"{metric}_stderr,{filtered}")
                shown = f"{value:.4f}" if isinstance(value, float) else str(value)
                cells.append(shown + (f" +- {error:.4f}" if isinstance(error, float) else ""))
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            table.add_row(task, name, *cells)
    table.add_section()
    activated = [params_of(tier["mean_activated_params"]) for tier in found.values()]
    table.add_row("all", "activated per token", *activated)
    sys.stderr.flush()
    console().print(table)
