"""docs/benchmarks/tier_map.json as tables and a figure."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dvpa.evaluate.figure import LIGHT

FIGURE = "tier_map.png"
Row = dict[str, Any]
Part = tuple[str, list[str], list[list[str]]]
SHOWN = (0.9, 0.95, 0.98)  # floors in the table


def tier_map_parts(result: Row) -> list[Part]:
    """(text, head, rows) of each table."""
    return [_solver(result), _guard(result["guard"]), *_hopeless(result)]


def _solver(result: Row) -> Part:
    rows = []
    for row in result["solver"]:
        exact = "" if "is_exact" not in row else "yes" if row["is_exact"] else f"{row['gap']:.0e}"
        price = "" if "price_s" not in row else f"{1000 * row['price_s']:.2f}"
        rows.append(
            [f"{row['requests']:,}", row["kind"], f"{row['solve_s']:.2f}",
             f"{row['solve_cpu_s']:.2f}", price, f"{row['fit_s']:.2f}", exact]
        )  # fmt: skip
    text = (
        f"`{result['command']}`: seconds to choose lambda or the cuts for a budget (four tiers, "
        f"one thread, medians of {result['rounds']}), milliseconds for one price of the dynamic "
        "programme, and seconds for all of `fit_tier_map`. Exact: proved optimal, or the proved "
        "relative distance to the best."
    )
    head = ["requests", "kind", "solve s", "CPU s", "ms per price", "fit s", "exact"]
    return text, head, rows


def _guard(guard: Row) -> Part:
    rows = [
        [
            f"{row['requests']:,}",
            row["bounds"],
            f"{row['exceeded']:.1%}",
            f"{row['least_cost']:.1%}",
        ]
        for row in guard["rows"]
    ]
    text = (
        f"The guard at alpha {guard['alpha']:g}, delta {guard['delta']:g}, over "
        f"{guard['resamples']} calibration sets with hopeless requests: how often more than alpha "
        "of the requests kept below the top tier lose against it (allowed: "
        f"{guard['delta']:.0%}), and the least cost it leaves, of the top tier's. `regions`: each "
        "tier's region bounded by itself, as is often done."
    )
    return text, ["calibrate requests", "what is bounded", "exceeded", "least cost"], rows


def _hopeless(result: Row) -> list[Part]:
    parts = []
    share = result["hopeless"]["share"]
    sources = [(f"{share:.0%} hopeless requests, drawn", [result["hopeless"]["rows"]])]
    trained = result.get("trained") or []
    if trained:
        mean = np.mean([run["hopeless"] for run in trained])
        label = f"nano, {len(trained)} seed(s): {mean:.0%} of test requests no tier got right"
        sources.append((label, [run["rows"] for run in trained]))
    for label, runs in sources:
        rows = []
        for floor in SHOWN:
            for kind in dict.fromkeys(row["kind"] for row in runs[0]):
                found = [r for rows_ in runs for r in rows_
                         if r["kind"] == kind and r["floor"] == floor]  # fmt: skip
                if found:
                    keys = ("quality_kept", "cost", "cost_on_hopeless", "hopeless_at_top")
                    means = (np.mean([row[key] for row in found]) for key in keys)
                    rows.append([f"{floor:.0%}", kind, *(f"{value:.1%}" for value in means)])
        head = ["floor", "map", "quality kept", "cost", "cost of a hopeless one", "of them at top"]
        parts.append((f"{label}. Cheapest map that keeps the floor:", head, rows))
    return parts


def tier_map_png(result: Row) -> bytes:
    """What a hopeless request costs against the quality kept, by kind of map."""
    panels = [("drawn requests", [result["hopeless"]["rows"]])]
    if result.get("trained"):
        panels.append(("nano's test requests", [run["rows"] for run in result["trained"]]))
    figure = Figure(figsize=(5.6 * len(panels), 4.2), dpi=150, facecolor=LIGHT.background)
    FigureCanvasAgg(figure)
    colours = {"gain": LIGHT.adaptive, "threshold": LIGHT.length,
               "threshold, upper cut": LIGHT.oracle}  # fmt: skip
    handles: list[Any] = []
    labels: list[str] = []
    for place, (title, runs) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1, facecolor=LIGHT.background)
        axes.grid(color=LIGHT.grid, linewidth=0.8)
        for kind, colour in colours.items():
            x, y = _curve(runs, kind)
            axes.plot(x, y, "o-", color=colour, label=kind, markersize=4.5)
        axes.set_title(title, color=LIGHT.text, fontsize=11)
        axes.set_xlabel("quality kept, of the top tier's", color=LIGHT.text)
        axes.set_ylim(0, 1.04)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if place == 0:
            axes.set_ylabel("cost of a hopeless request, of the top tier's", color=LIGHT.text)
            handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9.5)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=LIGHT.background, metadata={"Software": None})
    return buffer.getvalue()


def _curve(runs: Sequence[Sequence[Row]], kind: str) -> tuple[list[float], list[float]]:
    """Means over the runs, floor by floor."""
    floors = sorted({row["floor"] for rows in runs for row in rows if row["kind"] == kind})
    points = []
    for floor in floors:
        found = [r for rows in runs for r in rows if (r["kind"], r["floor"]) == (kind, floor)]
        points.append(
            [np.mean([r[key] for r in found]) for key in ("quality_kept", "cost_on_hopeless")]
        )
    x, y = np.array(points).T
    return x.tolist(), y.tolist()
