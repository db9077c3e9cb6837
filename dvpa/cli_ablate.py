"""`dvpa ablate`: a study of recipes and tier maps -> results.json, report.html, figures, W&B."""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvpa.cli_checkpoint import quiet_transformers
from dvpa.cli_output import console, show_status, write_json

if TYPE_CHECKING:
    from dvpa.ablate.jobs import Say
    from dvpa.ablate.run import Points
    from dvpa.ablate.study import Study

EXAMPLE = "ablation/pico.yaml"
_EVERY_SECONDS = 30.0  # between two lines of progress, where there is no terminal


def add_ablate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dvpa ablate`."""
    parser.add_argument("study", metavar="ABLATION.yaml", help="a study, see configs/ablation/")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="default: runs/ablate/NAME; goes on where it stopped",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the study's)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, list what would run, stop"
    )


def ablate(arguments: argparse.Namespace) -> None:
    """Run or go on with a study, then write and show its results."""
    from dataclasses import replace

    from dvpa.ablate.study import load_study

    study = load_study(arguments.study)
    if arguments.workers is not None:
        if arguments.workers < 1:
            raise ValueError(f"--workers: {arguments.workers} must be 1 or more")
        study = replace(study, workers=arguments.workers)
    out = arguments.out or Path("runs") / "ablate" / study.name
    with quiet_transformers():
        from dvpa_train.point import resolve

        points = {}
        for recipe in study.recipes:
            for seed in study.seeds:
                try:
                    found = resolve(
                        study.recipe,
                        recipe.overrides(),
                        recipe.model,
                        seed,
                        is_text=bool(study.architectures),
                    )
                except ValueError as error:
                    raise ValueError(f"recipes: {recipe.name}: {error}") from None
                points[recipe.name, seed] = found
            for variant in study.maps_of(recipe.name):
                try:
                    variant.columns(found.tier_names)
                except ValueError as error:
                    raise ValueError(f"maps: {variant.name}: {error}") from None
    if arguments.dry_run:
        _list(study, points, out)
        return
    with _progress() as (say, show):
        results, files = _run(study, out, points, say, show)
    if not write_json(arguments.json, results):
        (_show_architectures if study.architectures else _show)(results)
        console().print(f"report    {files['report.html']}")
        console().print(f"results   {files['results.json']}")


def _run(
    study: "Study", out: Path, points: "Points", say: "Say", show: "Say"
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Train and measure what is missing, then write the results; they and their files."""
    from dvpa.ablate.architecture_report import write_architectures
    from dvpa.ablate.architectures import compare
    from dvpa.ablate.report import write_study
    from dvpa.ablate.run import run_points
    from dvpa.ablate.summary import summarise
    from dvpa.ablate.wandb_log import log_study

    command = [sys.executable, "-m", "dvpa_train.point"]
    run_points(study, out, points, command, say, show)
    show("summary")
    if study.architectures:
        results = compare(study, out, points)
        files = write_architectures(results, out)
    else:
        results = summarise(study, out, points)
        files = write_study(results, out)
    if log_study(results, files, out, study.wandb_mode):
        say(f"W&B: {out / 'wandb'}")
    return results, files


@contextmanager
def _progress() -> "Iterator[tuple[Say, Say]]":
    """Lines for events; the state in a status line, or as a line now and then."""
    began = time.monotonic()
    latest = [began, 0.0]

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"{minutes:3d}:{seconds:02d} {text}", file=sys.stderr, flush=True)

    if sys.stderr.isatty():
        with show_status("starting") as update:
            yield say, update
        return

    def show(text: str) -> None:
        if time.monotonic() - latest[0] >= _EVERY_SECONDS:
            latest[0] = time.monotonic()
            say(text)

    yield say, show


def _list(study: "Study", points: Mapping[tuple[str, int], Any], out: Path) -> None:
    """What would run."""
    from dvpa.ablate.models import DONE
    from dvpa.ablate.run import MODELS

    for (recipe, seed), point in points.items():
        is_done = (out / MODELS / point.key / DONE).is_file()
        state = "done" if is_done else f"{point.steps} steps"
        console().print(f"training  {recipe}, seed {seed}: {state} ({out / MODELS / point.key})")
    for configuration in study.configurations:
        console().print(f"measure   {configuration.name}")
    total = len(study.configurations) * len(study.seeds)
    maps = "" if study.architectures else f", {total} map points"
    console().print(f"in all    {len(points)} trainings{maps}")


def _show(results: Mapping[str, Any]) -> None:
    """The configurations, and the reference's goals."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=results["title"],
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("configuration")
    for heading in ("quality", "of top", "budget", "APGR", "mixed", "ECE", "minus\nfirst"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["configurations"]:
        if "infeasible" in row:
            table.add_row(row["name"], row["infeasible"])
            continue
        minus = row.get("minus_reference")
        compared = ""
        if minus:
            low, high = minus["quality"]["ci95"]
            sure = " " if low <= 0 <= high else "*"  # the interval excludes 0
            compared = f"{minus['quality']['difference']:+.3f}{sure}"
        eces = [tier["mean"] for tier in row["ece_by_tier"]]
        table.add_row(
            row["name"],
            _number(row["quality"]["mean"]),
            f"{row['relative_cost']['mean']:.1%}",
            _percent(row["budget_deviation"]["mean"]),
            _number(row["apgr"]["mean"]),
            _number(row["mixed_kind_apgr"]["mean"]),
            _number(None if None in eces else max(eces)),
            compared,
        )
    console().print(table)
    for name, goal in results["configurations"][0].get("goals", {}).items():
        verdict = {True: "holds", False: "does not hold", None: "undefined"}[goal["holds"]]
        detail = f", wanted {goal['bound']:g}" if "bound" in goal else ""
        if "ci95" in goal:
            low, high = goal["ci95"]
            detail = f" ({low:+.4f} to {high:+.4f})"
        console().print(f"goal      {name} {_number(goal['value'], 4)}{detail}: {verdict}")


def _show_architectures(results: Mapping[str, Any]) -> None:
    """A line per architecture and tier."""
    from rich import box
    from rich.table import Table

    from dvpa.evaluate.figure import format_params

    table = Table(title=results["title"], title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("architecture")
    for heading in ("total", "activated", "MFLOPs", "training", "nll", "minus\nreference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["architectures"]:
        minus = row.get("minus_reference")
        compared = ""
        if minus:
            low, high = minus["ci95"]
            sure = " " if low <= 0 <= high else "*"  # the interval excludes 0
            compared = f"{minus['difference']:+.4f}{sure}"
        table.add_row(
            row["label"],
            format_params(row["total_params"]),
            format_params(row["activated_params"]),
            f"{row['flops_per_token'] / 1e6:.2f}",
            f"{row['training_flops'] / 1e12:.2f} TFLOPs",
            _number(row["nll"]["mean"], 4),
            compared,
        )
    console().print(table)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"
