"""A finished run on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_report(
    report: Mapping[str, Any], console: Console, files: Mapping[str, Path], checkpoint: Path
) -> None:
    """Quality per level and tier, the routers at equal cost, sample requests, where things are."""
    console.print(levels_table(report))
    console.print(routers_table(report))
    for sample in report["samples"][:5]:
        record = sample["telemetry"]
        score = "-" if record["difficulty"] is None else f"{record['difficulty']:.2f}"
        verdict = (
            "right" if sample["text"] == sample["expected"] else f"expected {sample['expected']}"
        )
        console.print(
            f"  {sample['question']} [bold]{sample['text']}[/] ({verdict})   "
            f"tier {record['tier_name']}, difficulty {score}, {record['decided_by']}, "
            f"{record['total_ms']:.0f} ms",
            highlight=False,
        )
    kept, adaptive = report["quality_kept"], report["routers"]["adaptive"]
    share = "an undefined share" if kept is None else f"{kept:.1%}"
    console.print(
        f"\nadaptive keeps {share} of the top tier's quality at "
        f"{adaptive['relative_cost']:.0%} of its activated parameters "
        f"({report['wall_seconds'] / 60:.1f} min in all)"
    )
    console.print(f"report      {files['report.html']}", soft_wrap=True)
    console.print(f"checkpoint  {checkpoint}", soft_wrap=True)
    console.print(
        f'try         dvpa generate {checkpoint} "{report["samples"][0]["question"]}"',
        soft_wrap=True,
    )


def levels_table(report: Mapping[str, Any]) -> Table:
    """Quality by level (rows) and tier (columns)."""
    table = Table(title="quality by level and tier (held-out requests)")
    table.add_column("level")
    for tier in report["tiers"]:
        table.add_column(
            f"{tier['name']} ({tier['activated_params'] / 1e3:,.0f}k)", justify="right"
        )
    for row, level in enumerate(report["levels"]):
        table.add_row(
            str(level), *(f"{tier['quality_by_level'][row]:.3f}" for tier in report["tiers"])
        )
    table.add_section()
    table.add_row("all", *(f"{tier['quality']:.3f}" for tier in report["tiers"]))
    return table


def routers_table(report: Mapping[str, Any]) -> Table:
    """Every router with its quality, 95 % interval, cost and time."""
    title = "routers (random, length, tfidf, cascade spend what adaptive spends)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("router", no_wrap=True)
    headings = ("quality", "95 % interval", "activated", "of top", "ms\neach")
    for name in (*headings, "adaptive\nminus"):  # all of it in 80 columns
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in report["routers"].items():
        low, high = row["ci95"]
        difference = row.get("adaptive_minus")
        ms = row.get("ms_per_request")
        table.add_row(
            f"[bold]{name}[/]" if name == "adaptive" else name,
            f"{row['quality']:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{row['mean_activated_params'] / 1e3:,.0f}k",
            f"{row['relative_cost']:.0%}" if "relative_cost" in row else "",
            "" if ms is None else f"{ms:.2f}",
            "" if difference is None else f"{difference['difference']:+.3f}",
        )
    return table
