"""The `dvpa` command line: its parser, its errors, its exit codes.

Subcommands import what they need when they run, so that `dvpa --help` is instant. Bad input ends
with exit code 2 and one line on stderr; `DVPA_DEBUG=1` shows the traceback instead.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dvpa import __version__, cli_ablate, cli_calibrate, cli_evaluate
from dvpa import cli_commands as run
from dvpa.cli_assemble import add_assemble_arguments, assemble
from dvpa.cli_convert import add_convert_arguments, add_export_arguments
from dvpa.cli_plan import add_train_arguments
from dvpa.command_line import BAD_INPUT, INTERRUPTED, Parser, one_line

Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        command: Command = arguments.command
        command(arguments)
    except _bad_input() as error:
        if os.environ.get("DVPA_DEBUG") == "1":
            raise
        print(f"dvpa: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("dvpa: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _bad_input() -> tuple[type[BaseException], ...]:
    """Exceptions that mean bad input rather than a defect of ours."""
    errors: list[type[BaseException]] = [ValueError, OSError, argparse.ArgumentError]
    # Evaluated only when something was raised, and only then can SafetensorError be the one.
    if "safetensors" in sys.modules:
        from safetensors import SafetensorError

        errors.append(SafetensorError)
    return tuple(errors)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dvpa",
        description="Difficulty-adaptive Mixture-of-Experts language models.",
        epilog="example: dvpa demo && dvpa generate runs/demo/checkpoint 'your question'",
    )
    parser.add_argument("--version", action="version", version=f"dvpa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, text: str, example: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: dvpa {name} {example}",
        )
        parser.set_defaults(command=command)
        return parser

    demo = add("demo", run.demo, "train nano, calibrate it, report", "--seeds 3")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    demo.add_argument("--seeds", type=_positive, default=1, help="train that many seeds")
    demo.add_argument("--seed", type=_natural, default=0, help="the first seed (default: 0)")
    demo.add_argument(
        "--baselines",
        action="store_true",
        help="also train an ordinary MoE and one specialist per tier (several times as long)",
    )
    demo.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the recipe (repeatable)",
    )

    plan = add(
        "plan",
        run.plan,
        "price a model per tier, or plan its training; needs no weights",
        "model/dvpa-7b-32b.yaml --train --gpus 256 --gpu h100",
    )
    plan.add_argument("model", metavar="MODEL.yaml", help="a model config")
    plan.add_argument(
        "--context", type=_natural, default=0, help="earlier tokens attended to, for FLOPs/token"
    )
    add_train_arguments(plan)
    _add_json(plan)

    init = add("init", run.init, "write a random checkpoint", "model/pico.yaml runs/pico --seed 1")
    init.add_argument("model", metavar="MODEL.yaml", help="a model config")
    init.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    init.add_argument("--seed", type=_natural, default=0, help="default: 0")

    train = add(
        "train",
        run.train,
        "run or resume a progressive training recipe",
        "train/words.yaml --set trainer.seed=1",
    )
    train.epilog = f"{train.epilog}; large text is tokenised first: see `dvpa-train prepare --help`"
    train.add_argument("recipe", metavar="RECIPE.yaml", help="a training recipe")
    train.add_argument("--out", help="the run's folder (default: the recipe's)")
    train.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the recipe, as in a.b=c; may be repeated",
    )

    calibrate = add(
        "calibrate",
        cli_calibrate.calibrate,
        "fit the tier map under a budget, and report",
        cli_calibrate.EXAMPLE,
    )
    cli_calibrate.add_calibrate_arguments(calibrate)
    _add_json(calibrate)

    ablate = add(
        "ablate",
        cli_ablate.ablate,
        "sweep recipes and tier maps over seeds, in pairs, and report; resumable",
        cli_ablate.EXAMPLE,
    )
    cli_ablate.add_ablate_arguments(ablate)
    _add_json(ablate)

    evaluate = add(
        "evaluate", cli_evaluate.evaluate, "run lm-eval's tasks at any tier", cli_evaluate.EXAMPLE
    )
    cli_evaluate.add_evaluate_arguments(evaluate)
    _add_json(evaluate)

    score = add(
        "score",
        run.score,
        "difficulty of a prompt and the tier it would get, without generating",
        "runs/demo/checkpoint 'your question'",
    )
    _add_prompt(score)
    _add_json(score)

    generate = add(
        "generate",
        run.generate,
        "stream an answer, then its telemetry",
        "runs/demo/checkpoint 'your question' --tier top",
    )
    _add_prompt(generate)
    generate.add_argument("--tier", default="auto", help="a tier's name or index (default: auto)")
    generate.add_argument("--max-new-tokens", type=_positive, default=64, help="default: 64")

    convert = add(
        "convert",
        run.convert,
        "take in another family's MoE checkpoint as nested tiers",
        "models/OLMoE-1B-7B runs/olmoe --text my.txt",
    )
    add_convert_arguments(convert)
    _add_json(convert)

    export = add(
        "export",
        run.export,
        "write one tier as a plain checkpoint (deepseek_v3, or the family it came from)",
        "runs/demo/checkpoint --tier base runs/base",
    )
    add_export_arguments(export)
    _add_json(export)

    assembly = add(
        "assemble",
        assemble,
        "put a checkpoint together from several parents' tensors",
        "assemble/linear.yaml OUT --parent a=parents/a --parent b=parents/b",
    )
    add_assemble_arguments(assembly)

    serve = add(
        "serve",
        run.serve,
        "OpenAI-compatible server with tier telemetry, metrics and a dashboard",
        "runs/demo/checkpoint --port 8000",
    )
    serve.add_argument("checkpoint", metavar="CKPT", type=Path, help="a dvpa checkpoint")
    serve.add_argument("--config", metavar="FILE", help="settings, see configs/serve/default.yaml")
    serve.add_argument("--host", help="default: 127.0.0.1")
    serve.add_argument("--port", type=_natural, help="default: 8000; 0: any free one")
    serve.add_argument("--model-name", help="default: the checkpoint folder's name")
    serve.add_argument("--dtype", help="bfloat16, float16, float32 (default: as stored)")
    serve.add_argument("--threads", type=_positive, help="CPU threads (default: PyTorch's)")
    serve.add_argument("--api-key-file", metavar="FILE", help="one key a line")
    serve.add_argument(
        "--ray", type=_positive, metavar="N", help="N replicas on Ray Serve (needs dvpa[ray])"
    )
    serve.add_argument(
        "--ray-max", type=_positive, metavar="M", help="let load bring up to M replicas"
    )

    bench = add(
        "bench",
        run.bench,
        "measure the engine on a checkpoint: tokens per second by tier and concurrency",
        "engine runs/demo/checkpoint --mix 0.7,0.2,0.05,0.05",
    )
    bench.add_argument("what", choices=["engine"], help="what to measure")
    bench.add_argument("checkpoint", metavar="CKPT", type=Path, help="a dvpa checkpoint")
    bench.add_argument("--concurrency", type=_positive, nargs="+", default=[1, 8, 32])
    bench.add_argument("--input", type=_positive, default=32, help="prompt tokens (default: 32)")
    bench.add_argument("--output", type=_positive, default=32, help="new tokens (default: 32)")
    bench.add_argument(
        "--mix", type=_shares, default=[], help="shares of the tiers, base first, for mixed traffic"
    )
    bench.add_argument("--dtype", default="auto", help="bfloat16, float16, float32 (as stored)")
    bench.add_argument("--threads", type=_positive, help="default: PyTorch's")
    _add_json(bench)
    return parser


def _add_prompt(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", type=Path, help="a dvpa checkpoint")
    command.add_argument("text", help="the prompt")
    command.add_argument(
        "--chat", action="store_true", help="as a user's turn, by the tokenizer's chat template"
    )


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", metavar="FILE", help="also write the result as JSON ('-': stdout, nothing else)"
    )


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or more")
    return int(text)


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)
