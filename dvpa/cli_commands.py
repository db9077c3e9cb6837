"""What each `dvpa` subcommand does: check the input, call one function, show the result."""

import argparse
import sys
from pathlib import Path
from typing import Any

from dvpa.cli_checkpoint import open_engine, quiet_transformers, reading, require_checkpoint
from dvpa.cli_convert import check_convert, check_export, convert_run, export_run, list_run
from dvpa.cli_output import (
    console,
    show_bench,
    show_plan,
    show_progress,
    show_record,
    write_json,
)
from dvpa.cli_plan import TRAIN_ONLY, plan_run


def demo(arguments: argparse.Namespace) -> None:
    """Train nano through every stage and report; see `dvpa_train.demo`."""
    from dvpa_train.demo import run_demo

    run_demo(
        arguments.out,
        arguments.seeds,
        arguments.seed,
        arguments.baselines,
        arguments.overrides,
    )


def plan(arguments: argparse.Namespace) -> None:
    """Price a model config per tier, or plan a run of it."""
    if arguments.train is not None:
        plan_run(arguments)
        return
    given = [name for name in TRAIN_ONLY if getattr(arguments, name) not in (None, [])]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')}: needs --train")
    from dvpa.architecture import find_config, load_architecture
    from dvpa.pricing import price

    path = find_config(arguments.model)
    config = load_architecture(path)
    priced = price(config, arguments.context)
    if not write_json(arguments.json, priced.to_dict()):
        show_plan(path.stem, config.tiers or (), priced)


def init(arguments: argparse.Namespace) -> None:
    """Write a random checkpoint."""
    from dvpa.config import load_model_config

    _require_new(arguments.out)
    config = load_model_config(arguments.model)
    with quiet_transformers():
        import torch

        from dvpa.model import DvpaForCausalLM

        torch.manual_seed(arguments.seed)
        DvpaForCausalLM(config).save_pretrained(arguments.out)
    console().print(f"random checkpoint (seed {arguments.seed}): {arguments.out}")


def train(arguments: argparse.Namespace) -> None:
    """Run or resume a training recipe."""
    from dvpa_train.interrupts import Stopped
    from dvpa_train.run_report import train_and_report

    try:
        train_and_report(arguments.recipe, arguments.out, arguments.overrides)
    except Stopped as stopped:
        print(f"dvpa: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None


def score(arguments: argparse.Namespace) -> None:
    """Read a prompt's difficulty and show the policy's decision."""
    model, tokenizer = _load(arguments.checkpoint, arguments.text)
    from dvpa.model.answer import decide, encode_prompt

    input_ids = encode_prompt(model, tokenizer, arguments.text, arguments.chat)
    decision, score_ms = decide(model, input_ids)
    report = {
        "difficulty": decision.difficulty,
        "tier": decision.tier,
        "tier_name": decision.tier_name,
        "decided_by": decision.decided_by,
        "success_by_tier": decision.success_by_tier,
        "thresholds": decision.thresholds,
        "prompt_tokens": int(input_ids.shape[1]),
        "score_ms": score_ms,
    }
    if not write_json(arguments.json, report):
        show_record("score", report)


def generate(arguments: argparse.Namespace) -> None:
    """Stream an answer, then its telemetry."""
    model, tokenizer = _load(arguments.checkpoint, arguments.text)
    from dvpa.model.answer import stream

    tier = arguments.tier
    if tier != "auto":
        tier = model.config.tier_index(tier)
    asked = (arguments.text, tier, arguments.max_new_tokens, arguments.chat)
    for piece in stream(model, tokenizer, *asked):
        if isinstance(piece, str):
            sys.stdout.write(piece)
            sys.stdout.flush()
        else:
            sys.stdout.write("\n\n")
            show_record("telemetry", piece.telemetry.to_dict())


def convert(arguments: argparse.Namespace) -> None:
    """Take in another family's checkpoint."""
    check_convert(arguments)
    if not (arguments.source / "config.json").is_file():
        raise FileNotFoundError(f"{arguments.source}: not a checkpoint folder (no config.json)")
    _require_new(arguments.out)
    with quiet_transformers(), reading(arguments.source):
        convert_run(arguments)


def export(arguments: argparse.Namespace) -> None:
    """Write one tier as a plain checkpoint, or list what all of them would weigh."""
    check_export(arguments)
    require_checkpoint(arguments.checkpoint)
    if arguments.list:
        with quiet_transformers(), reading(arguments.checkpoint):
            list_run(arguments)
        return
    _require_new(arguments.out)
    with quiet_transformers(), reading(arguments.checkpoint):
        export_run(arguments)


def serve(arguments: argparse.Namespace) -> None:
    """Answer requests over HTTP until a signal comes."""
    require_checkpoint(arguments.checkpoint)
    from dvpa.server.config import load_serve_config

    names = ("host", "port", "model_name", "dtype", "threads", "api_key_file")
    config = load_serve_config(
        arguments.config, **{name: getattr(arguments, name) for name in names}
    )
    if arguments.ray_max is not None and (arguments.ray or 0) > arguments.ray_max:
        raise ValueError(f"--ray-max: {arguments.ray_max} must be at least --ray")

    def announce(url: str) -> None:
        console().print(f"{arguments.checkpoint}: {url} (dashboard), {url}/v1 (API)")

    with quiet_transformers(), reading(arguments.checkpoint):
        if arguments.ray is not None:
            from dvpa.server.ray_app import run as run_ray

            run_ray(arguments.checkpoint, config, arguments.ray, arguments.ray_max, announce)
            return
        from dvpa.server.main import run

        run(arguments.checkpoint, config, announce)


def bench(arguments: argparse.Namespace) -> None:
    """Measure the engine on a checkpoint."""
    require_checkpoint(arguments.checkpoint)
    engine = open_engine(arguments, max(arguments.concurrency), prefix_caching=False)
    import torch

    from dvpa.engine.bench import bench_engine

    sizes = (arguments.concurrency, arguments.input, arguments.output, arguments.mix)
    rows = list(show_progress(bench_engine(engine, *sizes), "measuring"))
    report = {
        "threads": torch.get_num_threads(),
        "input": arguments.input,
        "output": arguments.output,
        "rows": [row.to_dict() for row in rows],
    }
    if not write_json(arguments.json, report):
        show_bench(arguments.checkpoint.name, rows)


def _load(checkpoint: Path, text: str) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint that is about to read the prompt `text`."""
    if not text.strip():
        raise ValueError("text: the prompt is empty")
    require_checkpoint(checkpoint)
    with quiet_transformers(), reading(checkpoint):
        from dvpa.model.answer import load

        loaded: tuple[Any, Any] = load(checkpoint)
    return loaded


def _require_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT: {out} exists already and is not an empty folder")
