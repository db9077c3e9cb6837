"""How the `dvpa` command shows results: rich tables for people, JSON for programs."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

    from dvpa.engine.bench import BenchRow
    from dvpa.pricing import ModelPrice

T = TypeVar("T")


def console() -> "Console":
    """A console on stdout that does not colour or wrap what it was not asked to."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def write_json(target: str | None, report: Mapping[str, Any]) -> bool:
    """Write `report` where --json says; True if stdout is taken by it."""
    if target is None:
        return False
    text = json.dumps(report, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return True
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return False


@contextmanager
def pointing_to_what_is_left(out: Path) -> Iterator[None]:
    """After a failure, say that the next run need not start anew."""
    try:
        yield
    except BaseException:
        staging = out.with_name(f"{out.name}.incomplete")
        if finished := len(list(staging.glob("*.safetensors"))):
            print(
                f"dvpa: note: {staging} keeps {finished} finished shards; the same command goes "
                "on from there",
                file=sys.stderr,
            )
        raise


def show_plan(name: str, tiers: Sequence[Any], priced: "ModelPrice") -> None:
    """Print the table of `dvpa plan`; `tiers` are the config's, in the order of the prices."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{name}: {params_of(priced.total_params)} parameters",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # ten columns have to fit into 80 characters
        pad_edge=False,
    )
    table.add_column("tier")
    headings = ("groups", "top_k", "activated", "of\ntop", "stored", "FLOPs/\ntoken")
    for heading in (*headings, "KV B/\ntoken", "bf16", "FP8"):
        table.add_column(heading, justify="right")
    for tier, cost in zip(tiers, priced.tiers, strict=True):
        table.add_row(
            cost.name,
            str(tier.num_groups),
            str(tier.top_k),
            params_of(cost.activated_params),
            f"{cost.ratio_to_top:.0%}",
            params_of(cost.tier_params),
            count_of(cost.flops_per_token),
            f"{cost.kv_bytes_per_token:,}",
            count_of(cost.weight_bytes) + "B",
            count_of(cost.weight_bytes_fp8) + "B",
        )
    console().print(table)
    if priced.mtp_params:
        console().print(
            f"beside them, for training and drafts: {params_of(priced.mtp_params)} parameters of "
            "multi-token prediction"
        )


def show_bench(name: str, rows: Sequence["BenchRow"]) -> None:
    """Print the table of `dvpa bench engine`; ratios are against the top tier's row."""
    from rich.table import Table

    table = Table(title=f"{name}: output tokens per second", title_justify="left")
    table.add_column("at a time", justify="right")
    table.add_column("traffic")
    for heading in ("tok/s", "tok/CPU-s", "of top", "activated", "of top"):
        table.add_column(heading, justify="right")
    top_name = [row.traffic for row in rows if row.traffic != "mixed"][-1]
    top = {row.concurrency: row for row in rows if row.traffic == top_name}
    for row in rows:
        beside = top[row.concurrency]
        table.add_row(
            str(row.concurrency),
            row.traffic,
            f"{row.tokens_per_s:.1f}",
            f"{row.tokens_per_cpu_s:.1f}",
            f"{row.tokens_per_s / beside.tokens_per_s:.2f}",
            params_of(row.activated_params),
            f"{row.activated_params / beside.activated_params:.2f}",
        )
    console().print(table)


def show_progress(items: Iterable[T], text: str) -> Iterator[T]:
    """Pass items on, with a spinner and their number on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed}"))
    stderr = Console(stderr=True)
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as bar:
        task = bar.add_task(text, total=None)
        for item in items:
            bar.advance(task)
            yield item


@contextmanager
def show_status(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a text on stderr where that is a terminal; gives what changes the text."""
    from rich.console import Console

    stderr = Console(stderr=True)
    if not stderr.is_terminal:
        yield lambda text: None
        return
    with stderr.status(text) as status:
        yield status.update


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal; call it with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_record(title: str, record: Mapping[str, Any]) -> None:
    """Print one record, a field per row."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in record.items():
        table.add_row(key, _cell(value))
    console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return "-" if value is None else str(value)


def params_of(number: float) -> str:
    """A number of parameters, whose unit above the million is B by custom."""
    return count_of(number).replace("G", "B")


def count_of(number: float) -> str:
    """A count with three digits and a decimal unit, as in 31.8G."""
    for unit in ("", "K", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError("unreachable")
