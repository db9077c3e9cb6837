"""`dvpa convert` and `dvpa export`: other families' checkpoints in, and single tiers out."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvpa.cli_output import (
    console,
    count_of,
    params_of,
    pointing_to_what_is_left,
    show_status,
    write_json,
)

if TYPE_CHECKING:
    from dvpa.checkpoint.convert import ConversionReport
    from dvpa.checkpoint.export import ExportReport, TierSize
    from dvpa.checkpoint.number_format import FormatCounts

DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8")
FP8_HELP = "of weights (as they are, FP8 bit for bit); fp8: 128 x 128 blocks, as DeepSeek-V3"


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dvpa convert`."""
    parser.add_argument("source", metavar="SRC", type=Path, help="a checkpoint folder")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="a new folder; complete or absent, and after a kill the same command starts over",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="UTF-8 text that experts are measured on (default: Python's standard library)",
    )
    parser.add_argument(
        "--tokens", type=int, default=16384, help="of that text, a quarter for losses (16384)"
    )
    parser.add_argument(
        "--keep-order", action="store_true", help="measure nothing: experts stay as they are"
    )
    parser.add_argument(
        "--tiers",
        metavar="POOL:TOP_K,..",
        help="experts to choose from and experts of a token, base first, as in 128:4,256:8; "
        "NAME=POOL:TOP_K:SCALE says more (default: three tiers, the base at half the parameters)",
    )
    parser.add_argument(
        "--pool",
        choices=("auto", "prefix", "striped"),
        default="auto",
        help="whole groups, or a part of every group (default: what loses less on the text)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=FP8_HELP)
    parser.add_argument(
        "--drop-mtp", action="store_true", help="leave out the multi-token prediction module"
    )


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dvpa export`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a dvpa checkpoint")
    tier = parser.add_argument("--tier", required=True, help="a tier's name or index")
    out = parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument(
        "--list",
        action=_Instead,
        of=(tier, out),
        help="write nothing: show what every tier would weigh",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=FP8_HELP)
    parser.add_argument(
        "--keep-mtp",
        action="store_true",
        help="keep the multi-token prediction module, for engines that draft with it",
    )


class _Instead(argparse.Action):
    """A switch with which other arguments are not required."""

    def __init__(self, of: Sequence[argparse.Action], **kwargs: Any) -> None:
        super().__init__(nargs=0, default=False, **kwargs)
        self._of = of

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        setattr(namespace, self.dest, True)
        for action in self._of:
            action.required = False


def check_convert(arguments: argparse.Namespace) -> None:
    """What can be refused before anything heavy is imported.

    Raises:
        ValueError: options that do not go together, or a number out of range.
    """
    if arguments.keep_order and arguments.text:
        raise ValueError("--keep-order: measures nothing, so --text has no use")
    if arguments.tokens < 1024:
        raise ValueError(f"--tokens: {arguments.tokens} must be 1024 or more")


def check_export(arguments: argparse.Namespace) -> None:
    """As `check_convert`."""
    if arguments.list and (arguments.out is not None or arguments.tier is not None):
        raise ValueError("--list: shows every tier and writes nothing; no --tier, no OUT")


def convert_run(arguments: argparse.Namespace) -> None:
    """Take a checkpoint in and show what each tier loses."""
    from dvpa.checkpoint.calibration_text import SEQUENCE_LENGTH, read_calibration
    from dvpa.checkpoint.convert import convert_checkpoint
    from dvpa.checkpoint.pools import parse_tiers
    from dvpa.checkpoint.source import open_source

    tiers = None if arguments.tiers is None else parse_tiers(arguments.tiers)
    with pointing_to_what_is_left(arguments.out), show_status("reading") as progress:
        text = None
        if not arguments.keep_order:
            longest = open_source(arguments.source, arguments.drop_mtp).config
            length = min(SEQUENCE_LENGTH, longest.max_position_embeddings)
            text = read_calibration(arguments.source, arguments.text, arguments.tokens, length)
        report = convert_checkpoint(
            arguments.source,
            arguments.out,
            text,
            tiers=tiers,
            pool=arguments.pool,
            dtype=arguments.dtype,
            drop_mtp=arguments.drop_mtp,
            progress=progress,
        )
    if not write_json(arguments.json, report.to_dict()):
        show_conversion(arguments.out, report)


def export_run(arguments: argparse.Namespace) -> None:
    """Write one tier as a plain checkpoint."""
    from dvpa.checkpoint.export import export_tier

    with pointing_to_what_is_left(arguments.out), show_status("writing") as progress:
        report = export_tier(
            arguments.checkpoint,
            arguments.tier,
            arguments.out,
            keep_mtp=arguments.keep_mtp,
            dtype=arguments.dtype,
            progress=progress,
        )
    if write_json(arguments.json, asdict(report)):
        return
    console().print(f"{report.model_type} checkpoint of tier {arguments.tier}: {arguments.out}")
    show_resumed(report.resumed_shards)
    show_formats(report)
    if report.dropped_mtp:
        console().print(
            f"left out (--keep-mtp): {report.dropped_mtp} tensors of multi-token prediction"
        )
    if not report.is_in_transformers:
        console().print(
            f"{report.model_type} has no class in Transformers: it needs the original checkpoint's "
            "configuration and modelling files, and its auto_map, beside it"
        )


def list_run(arguments: argparse.Namespace) -> None:
    """List what every tier would weigh."""
    from dvpa.checkpoint.export import list_tiers

    sizes = list_tiers(arguments.checkpoint)
    if not write_json(arguments.json, {"tiers": [asdict(size) for size in sizes]}):
        show_sizes(arguments.checkpoint, sizes)


def show_conversion(out: Path, report: "ConversionReport") -> None:
    """Print the tiers of a conversion and what is to be known of it."""
    from rich.table import Table

    top = report.tiers[-1]
    table = Table(title=f"{out}: {report.source}, before any tuning", title_justify="left")
    table.add_column("tier")
    for heading in ("pool", "top_k", "activated", "of top", "nats/token", "over top"):
        table.add_column(heading, justify="right")
    for tier in report.tiers:
        has_loss = tier.nll is not None and top.nll is not None
        table.add_row(
            tier.name,
            str(tier.pool),
            str(tier.top_k),
            params_of(tier.activated_params),
            f"{tier.activated_params / top.activated_params:.0%}",
            f"{tier.nll:.3f}" if has_loss else "-",
            f"{tier.nll - top.nll:+.3f}" if has_loss else "-",  # type: ignore[operator]
        )
    console().print(table)
    show_resumed(report.resumed_shards)
    if report.text is not None:
        console().print(
            f"experts measured on {report.tokens:,} tokens of {report.text}; losses on "
            f"{report.held_out_tokens:,} others"
        )
    for kind, losses in report.pools.items() if len(report.pools) > 1 else ():
        chosen = " (chosen)" if kind == report.pool else ""
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        console().print(f"pool: {kind}: {shown}{chosen}")
    for kind, reason in report.not_possible.items():
        console().print(f"pool: {kind}: not compared: {reason}")
    if report.super_experts:
        console().print(f"super experts, first in every pool: {len(report.super_experts)}")
    if report.unpinned:
        console().print(f"of these without room in the base pool: {report.unpinned}")
    if report.never_chosen:
        console().print(f"experts that no token chose, ranked last: {report.never_chosen}")
    show_formats(report.formats)
    for reason, count in report.left_out.items():
        console().print(f"left out: {count} tensors: {reason}")


def show_resumed(count: int) -> None:
    """Say how many shards were there already."""
    if count:
        console().print(f"{count} shards were finished by an earlier run")


def show_formats(counts: "FormatCounts | ExportReport") -> None:
    """Print what became of weights in FP8, and what became FP8."""
    said = {
        "FP8 kept as it is": counts.kept_fp8,
        "quantised to FP8": counts.quantised,
        "dequantised from FP8": counts.dequantised,
    }
    for what, count in said.items():
        if count:
            console().print(f"{what}: {count:,} weights")


def show_sizes(checkpoint: Path, sizes: Sequence["TierSize"]) -> None:
    """Print what every tier would weigh as a checkpoint of its own."""
    from rich.table import Table

    table = Table(title=f"{checkpoint}: tiers as plain checkpoints", title_justify="left")
    for heading in ("tier", "format"):
        table.add_column(heading)
    for heading in ("experts", "top_k", "as stored", "bf16", "fp8"):
        table.add_column(heading, justify="right")
    for size in sizes:
        weights = [
            f"{count_of(size.num_bytes[dtype])}B" if size.num_bytes else "-"
            for dtype in ("auto", "bfloat16", "fp8")
        ]
        name = size.model_type or "none"
        table.add_row(size.tier_name, name, str(size.num_experts), str(size.top_k), *weights)
    console().print(table)
    for size in sizes:
        if size.reason is not None:
            console().print(f"{size.tier_name}: {size.reason}")
