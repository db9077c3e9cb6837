"""The quality-compute frontier as a PNG, in a light and a dark version (matplotlib's Agg canvas, no
global state).
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance; the page's style sheet uses the same ones."""

    background: str
    text: str
    muted: str
    grid: str
    adaptive: str
    oracle: str
    length: str
    baseline: str


LIGHT = Theme(
    "#ffffff", "#1c1e21", "#62676e", "#e4e6e9", "#0b62c4", "#2b8a4b", "#b45f06", "#8a4fa3"
)
DARK = Theme("#16181b", "#e8eaed", "#9aa0a8", "#2f3338", "#6cb2ff", "#6fce8f", "#f0a95b", "#c79ade")

# Rows drawn as points of their own, besides the always-tiers: label, marker, theme colour.
_POINTS = {
    "length": ("prompt length", "s", "length"),
    "tfidf": ("TF-IDF", "D", "baseline"),
    "cascade": ("cascade, both calls paid", "X", "baseline"),
}
# Prefixes of rows from separate training runs: label, marker, sideways shift (of the cost range).
_RUNS = {
    "specialist_": ("specialist per tier", "^", -0.018),
    "fixed_": ("not elastic, same k", "v", 0.018),
}


def format_params(value: float) -> str:
    """Activated parameters in three digits: 812, 181k, 1.24M, 31.9B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.3g}{unit}" if scaled < 999.5 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def frontier_png(report: Mapping[str, Any], theme: Theme = LIGHT) -> bytes:
    """PNG of quality against mean activated parameters; needs `tiers` and `routers`, uses
    `frontier` if present.
    """
    figure = Figure(figsize=(6.8, 5.2), dpi=200, facecolor=theme.background)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.background)
    _style(axes, theme)
    _curves(axes, report, theme)
    _points(axes, report, theme)
    tiers = report["tiers"]
    top = float(tiers[-1]["activated_params"])
    share = axes.secondary_xaxis("top", functions=(_scale(1 / top), _scale(top)))
    share.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
    lowest = float(tiers[0]["activated_params"]) / top
    share.set_ticks([x for x in MaxNLocator(6).tick_values(lowest, 1) if lowest * 0.95 <= x <= 1])
    share.tick_params(colors=theme.muted, labelsize=9, length=3)
    share.spines["top"].set_visible(False)
    share.set_xlabel("share of the top tier", color=theme.muted, fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower center",
        ncols=3,
        frameon=False,
        fontsize=9.5,
        labelcolor=theme.text,
        columnspacing=1.6,
        handlelength=2.2,
        markerscale=0.85,
    )
    rows_of_legend = -(-len(labels) // 3)
    figure.tight_layout(rect=(0, 0.01 + 0.04 * rows_of_legend, 1, 1))
    buffer = io.BytesIO()
    # No metadata: the same report gives the same bytes whatever the matplotlib version's banner.
    figure.savefig(buffer, format="png", facecolor=theme.background, metadata={"Software": None})
    return buffer.getvalue()


def _scale(factor: float) -> Callable[[Any], Any]:
    """Multiplication by a constant, as matplotlib wants an axis transform."""
    return lambda values: values * factor


def _style(axes: Axes, theme: Theme) -> None:
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.1)  # room for the top tier's name
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(theme.muted)
    axes.tick_params(colors=theme.text, labelsize=10)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_params(x)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("mean activated parameters per token", color=theme.text, fontsize=10.5)
    axes.set_ylabel("quality", color=theme.text, fontsize=10.5)


def _curves(axes: Axes, report: Mapping[str, Any], theme: Theme) -> None:
    frontier = report.get("frontier") or {}
    styles = {
        "oracle": ("oracle (outcomes known)", theme.oracle, ":", 1.8),
        "adaptive": ("adaptive, budget swept", theme.adaptive, "-", 2.4),
        "length": ("prompt length, budget swept", theme.length, "--", 1.5),
    }
    for name, (label, colour, style, width) in styles.items():
        if name not in frontier:
            continue
        points = sorted(zip(frontier[name]["cost"], frontier[name]["quality"], strict=True))
        axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=width, label=label)
    # Mixing the tiers by a coin; the base tier reads routed prompts.
    tiers = report["tiers"]
    mixed = frontier.get("random") or {
        "cost": [tier["activated_params"] for tier in tiers],
        "quality": [tier["quality"] for tier in tiers],
    }
    axes.plot(
        mixed["cost"],
        mixed["quality"],
        "-",
        color=theme.muted,
        linewidth=1.3,
        label="random mix of tiers",
        zorder=1.5,
    )


def _points(axes: Axes, report: Mapping[str, Any], theme: Theme) -> None:
    routers, tiers = report["routers"], report["tiers"]
    for index, tier in enumerate(tiers):
        row = routers.get(f"always_{tier['name']}", {})
        cost, quality = tier["activated_params"], tier["quality"]
        label = "always one tier" if index == 0 else None
        _point(axes, cost, quality, row.get("ci95"), "o", 6.5, theme.text, label)
        # Below and to the right: everything worth reading lies on or above the random-mix line.
        is_last = index == len(tiers) - 1
        axes.annotate(
            tier["name"],
            (cost, quality),
            xytext=(12, 0) if is_last else (16, -14),
            textcoords="offset points",
            va="center" if is_last else "baseline",
            color=theme.text,
            fontsize=10,
        )
    spread = tiers[-1]["activated_params"] - tiers[0]["activated_params"]
    for prefix, (label, marker, shift) in _RUNS.items():
        rows = [row for name, row in routers.items() if name.startswith(prefix)]
        for index, row in enumerate(rows):
            # Beside the always-point of the same cost, not on top of it.
            cost = row["mean_activated_params"] + shift * spread
            legend = label if index == 0 else None
            _point(axes, cost, row["quality"], row.get("ci95"), marker, 6.5, theme.baseline, legend)
    for name, (label, marker, colour) in _POINTS.items():
        if name in routers:
            row = routers[name]
            cost = row["mean_activated_params"]
            _point(axes, cost, row["quality"], None, marker, 6.5, getattr(theme, colour), label)
    if "adaptive" in routers:
        row = routers["adaptive"]
        cost = row["mean_activated_params"]
        _point(
            axes,
            cost,
            row["quality"],
            row.get("ci95"),
            "*",
            15,
            theme.adaptive,
            "adaptive, as calibrated",
        )


def _point(
    axes: Axes,
    cost: float,
    quality: float,
    interval: list[float] | None,
    marker: str,
    size: float,
    colour: str,
    label: str | None,
) -> None:
    """One marker with its 95 % interval."""
    error = None
    if interval is not None and None not in interval:
        # An interval of a mean over seeds need not contain a rounded mean: never pass a negative
        # length.
        error = [[max(quality - interval[0], 0.0)], [max(interval[1] - quality, 0.0)]]
    axes.errorbar(
        [cost],
        [quality],
        yerr=error,
        fmt=marker,
        markersize=size,
        color=colour,
        ecolor=colour,
        elinewidth=1.2,
        capsize=3,
        label=label,
        zorder=3,
    )
