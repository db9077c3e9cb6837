"""`dvpa assemble`: put a checkpoint together from several parents' tensors."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dvpa.cli_output import console, pointing_to_what_is_left, write_json

if TYPE_CHECKING:
    from dvpa.checkpoint.assembly_report import AssemblyReport


def add_assemble_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dvpa assemble`."""
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe; docs/assembling.md")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="a new folder; complete or absent, and after a kill the same command goes on",
    )
    parser.add_argument(
        "--parent",
        dest="parents",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="where a parent of the recipe lies (repeatable)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the plan and how far the parents differ; write nothing",
    )
    parser.add_argument(
        "--no-compare",
        action="store_true",
        help="do not read the base only to report how far the others are from it",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per CPU")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the report as JSON ('-': stdout, nothing else)"
    )


def assemble(arguments: argparse.Namespace) -> None:
    """Assemble, or show what would be done."""
    from dvpa.checkpoint.assemble import assemble_plan, survey_plan
    from dvpa.checkpoint.assembly_plan import plan_assembly
    from dvpa.checkpoint.recipe import load_recipe

    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads: {arguments.threads} must be 1 or more")
    recipe = load_recipe(arguments.recipe, _named_folders(arguments.parents))
    plan = plan_assembly(recipe)
    for text in plan.warnings:
        print(f"dvpa: note: {text}", file=sys.stderr)
    with _progress(
        plan.steps.num_bytes, "comparing" if arguments.dry_run else "assembling"
    ) as advance:
        if arguments.dry_run:
            report = survey_plan(plan, arguments.threads, advance)
        else:
            with pointing_to_what_is_left(arguments.out):
                compare = not arguments.no_compare
                report = assemble_plan(plan, arguments.out, arguments.threads, compare, advance)
    if not write_json(arguments.json, report.to_dict()):
        _show(report, None if arguments.dry_run else arguments.out)


def _named_folders(given: list[str]) -> dict[str, str]:
    folders = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--parent: {text!r} must look like NAME=FOLDER")
        folders[name] = folder
    return folders


@contextmanager
def _progress(total: int, text: str) -> Iterator[Callable[[int], object] | None]:
    """A bar with bytes per second and the time left on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    rates = (TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, *rates, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)


def _show(report: "AssemblyReport", out: Path | None) -> None:
    """What was done by class, then where it lies."""
    from rich import box
    from rich.table import Table

    from dvpa.checkpoint.step_table import ACTIONS

    name = report.recipe["name"]
    title = f"{name}: {report.tensors:,} tensors, {report.num_bytes / 1e9:.3g} GB"
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # nine columns have to fit into 80 characters
        pad_edge=False,
    )
    table.add_column("class")
    for heading in ("tensors", *ACTIONS, "median\ndiffer.", "95 %", "rela-\ntive"):
        table.add_column(heading, justify="right")
    for row in report.classes:
        spread = row.difference or {}
        table.add_row(
            row.name,
            f"{row.tensors:,}",
            *(f"{row.actions[action]:,}" for action in ACTIONS),
            *(f"{spread[key]:.2g}" if spread else "-" for key in ("median", "p95")),
            "-" if row.relative is None else f"{row.relative:.1%}",
        )
    console().print(table)
    for i, row in enumerate(report.rules):
        shares = report.recipe["rules"][i]["lambda"].items()
        mix = ", ".join(f"{share:g} {parent}" for parent, share in shares if share)
        console().print(f"rule {i}: {row.name}: {mix}; {row.tensors:,} tensors", markup=False)
    if report.resumed_shards:
        console().print(f"{report.resumed_shards} shards were finished by an earlier run")
    if out is None:
        console().print(f"nothing written; compared in {report.wall_seconds:.1f} s")
    else:
        rate = report.num_bytes / max(report.wall_seconds, 1e-9) / 1e6
        console().print(
            f"{out}: {report.wall_seconds:.1f} s, {rate:,.0f} MB/s; report: {out / 'assembly.html'}"
        )
