"""The escalation benchmark's part of docs/benchmarks.md: tables and the figure."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dvpa.evaluate.figure import LIGHT, format_params

FIGURE = "escalation.png"
Row = Mapping[str, Any]
Part = tuple[str, list[str], list[list[str]]]
ROWS = {
    "never": "never",
    "escalate": "**escalate**, cache kept",
    "default": "escalate, default bounds",
    "redo": "redo from the prompt",
    "random": "random, same rate",
    "jump": "jump to top (replayed)",
    "coin": "coin between starts, same cost",
    "map": "map refitted, same cost",
}
STARTS = {"map": "fitted tier map", "base": "always base", "small": "always small"}


def escalation_parts(result: Row) -> list[Part]:
    """(text, head, rows) of every table."""
    return [_main(result), _instead(result), _doubt(result), _readings(result)]


def _interval(row: Row, key: str = "ci95_requests") -> str:
    low, high = row[key]
    return f"{row['mean']:+.3f} ({low:+.3f} .. {high:+.3f})"


def _main(result: Row) -> Part:
    rows = []
    for start, block in result["starts"].items():
        for name, label in ROWS.items():
            row = block["rows"][name]
            over_seeds = row["above_coin"].get("ci95_seeds")
            rows.append(
                [
                    STARTS[start],
                    label,
                    f"{row['quality']:.3f}",
                    f"{row['flops'] / 1e6:.2f}",
                    format_params(row["activated"]),
                    f"{row['goes_up']:.0%}" if row["goes_up"] else "",
                    "" if name == "coin" else _interval(row["above_coin"]),
                    "" if name == "coin" or not over_seeds
                    else f"{over_seeds[0]:+.3f} .. {over_seeds[1]:+.3f}",
                    "" if name == "escalate" else _interval(row["escalate_minus"]),
                ]
            )  # fmt: skip
    head = ["start", "then", "quality", "MFLOPs/request", "activated", "goes up"]
    head += ["above coin (95 %, requests)", "95 %, seeds", "escalate minus this"]
    static = ", ".join(
        f"{name} {row['quality']:.3f} at {row['flops'] / 1e6:.2f} (reading the prompt itself "
        f"{whole['quality']:.3f} at {whole['flops'] / 1e6:.2f})"
        for name, row, whole in zip(
            result["tier_names"], result["static"], result["whole"], strict=True
        )
    )
    text = (
        f"{result['requests']:,} fresh requests for each of the seeds "
        f"{', '.join(map(str, result['seeds']))}. Static tiers over a base-read prompt, quality at "
        f"MFLOPs a request: {static}. Above coin: beside a coin between the start as it is and the "
        "static tiers, at the row's own cost."
    )
    return text, head, rows


def _instead(result: Row) -> Part:
    labels = {"map": "fitted tier map, never", "escalate": "base, escalate", "jump": "base, jump"}
    rows = []
    for name, row in result["instead_of_map"].items():
        seeds = row["minus_map"].get("ci95_seeds")
        line = [labels[name], f"{row['quality']:.3f}", f"{row['flops'] / 1e6:.2f}"]
        line += [format_params(row["activated"])]
        is_map = name == "map"
        line += ["" if is_map else _interval(row["minus_map"])]
        line += ["" if is_map or not seeds else f"{seeds[0]:+.3f} .. {seeds[1]:+.3f}"]
        rows.append(line)
    head = ["who decides", "quality", "MFLOPs/request", "activated", "minus map (95 %, requests)"]
    text = (
        "Doubt instead of the map: all start at base, bounds of the best quality for at most the "
        "map's FLOPs on the calibrate split:"
    )
    return text, [*head, "95 %, seeds"], rows


def _doubt(result: Row) -> Part:
    rows = []
    seeds = result["doubt_per_seed"]
    for scope, label in ((s, n) for s in seeds[0] for n in seeds[0][s] if n != "requests"):
        found = [seed[scope][label] for seed in seeds]
        cells = [f"{np.mean([f['share'] for f in found]):.0%}"]
        for statistic in ("first", "mean", "difficulty"):
            values = [f[statistic] for f in found]
            each = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"{np.mean(values):.3f} ({each})")
        rows.append([scope, label, *cells])
    head = ["requests", "to be told", "share", "first token", "mean", "difficulty head"]
    return "AUROC of the base tier's doubt (each seed's in brackets):", head, rows


def _readings(result: Row) -> Part:
    rows = [
        [
            *name.split(", "),
            f"{row['quality']:.3f}",
            f"{row['flops'] / 1e6:.2f}",
            f"{1000 * row['wall_s'] / result['requests']:.2f}",
            f"{1000 * row['cpu_s'] / result['requests']:.2f}",
            _interval(row["minus_base"]) if name.startswith("tier") else "",
        ]
        for name, row in result["readings"].items()
    ]
    head = ["read_prompt", "then", "quality", "MFLOPs/request", "wall ms/request"]
    head += ["CPU ms/request", "quality minus base"]
    text = (
        f"Who reads a routed prompt (fitted map, batch {result['batch']}, one thread, medians of "
        f"{result['rounds']} interleaved rounds):"
    )
    return text, head, rows


def escalation_png(result: Row) -> bytes:
    """Quality against cost, one panel per start, over the static tiers."""
    figure = Figure(figsize=(13, 4.6), dpi=150, facecolor=LIGHT.background)
    FigureCanvasAgg(figure)
    colours = {"never": LIGHT.text, "escalate": LIGHT.adaptive, "redo": LIGHT.length,
               "random": LIGHT.muted, "jump": LIGHT.oracle, "map": LIGHT.baseline}  # fmt: skip
    for place, (start, block) in enumerate(result["starts"].items()):
        axes = figure.add_subplot(1, 3, place + 1, facecolor=LIGHT.background)
        axes.grid(color=LIGHT.grid, linewidth=0.8)
        axes.plot(*_line(result["static"]), "o-", color=LIGHT.muted, label="static tiers, coin")
        for key, name in (("sweep", "escalate"), ("sweep_jump", "jump")):
            curves = [told[key] for told in block["told_per_seed"]]
            x, y = np.mean(curves, axis=0).T
            axes.plot(x, y, "-", color=colours[name], linewidth=1.4, label=f"{name}, upper swept")
        for name, colour in colours.items():
            row = block["rows"][name]
            marker = "*" if name == "escalate" else "D"
            size = 13 if name == "escalate" else 6
            axes.plot(
                row["activated"], row["quality"], marker, color=colour, markersize=size, label=name
            )
        axes.set_title(f"start: {STARTS[start]}", color=LIGHT.text, fontsize=11)
        axes.set_xlabel("mean activated parameters per token", color=LIGHT.text)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_params(x)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if place == 0:
            axes.set_ylabel("quality", color=LIGHT.text)
            handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=LIGHT.background, metadata={"Software": None})
    return buffer.getvalue()


def _line(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["activated"] for row in rows], [row["quality"] for row in rows]
