"""How the `dvpa` command shows results: rich tables for people, JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from dvpa.pricing import ModelPrice


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


def show_plan(name: str, tiers: Sequence[Any], priced: "ModelPrice") -> None:
    """Print the table of `dvpa plan`; `tiers` are the config's, in the order of the prices."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{name}: {_params(priced.total_params)} parameters",
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
            _params(cost.activated_params),
            f"{cost.ratio_to_top:.0%}",
            _params(cost.tier_params),
            _count(cost.flops_per_token),
            f"{cost.kv_bytes_per_token:,}",
            _count(cost.weight_bytes) + "B",
            _count(cost.weight_bytes_fp8) + "B",
        )
    console().print(table)


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


def _params(number: int) -> str:
    """A number of parameters, whose unit above the million is B by custom."""
    return _count(number).replace("G", "B")


def _count(number: float) -> str:
    """A count with three digits and a decimal unit, as in 31.8G."""
    for unit in ("", "K", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError("unreachable")
