"""Figures of a study, as PNG in a light and a dark version."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from scipy.stats import t as student_t

from dvpa.evaluate.figure import LIGHT, Theme

_GRID = 60  # costs at which curves of several seeds are averaged


def frontier_png(results: Mapping[str, Any], theme: Theme = LIGHT) -> bytes:
    """Quality against cost: the reference's frontier with its band over seeds, a random mix, and
    every configuration as a point.
    """
    figure = Figure(figsize=(7.4, 5.2), dpi=150, facecolor=theme.background)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.background)
    rows = [row for row in results["configurations"] if "infeasible" not in row]
    models = results["models"]
    top = models[0]["tiers"][-1]["activated_params"]
    reference = next((r for r in rows if r["name"] == results["reference"]), None)
    if reference is not None:
        _band(axes, reference["frontier"], top, theme.adaptive, "reference, budget swept")
        own = [model for model in models if model["recipe"] == reference["recipe"]]
        for name, colour, label in (
            ("oracle", theme.oracle, "oracle (outcomes known)"),
            ("random", theme.muted, "random mix of tiers"),
        ):
            _band(axes, [model["frontier"][name] for model in own], top, colour, label)
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    for recipe, marker in zip(recipes, "os^Dv<>PX*" * len(recipes), strict=False):
        points = [row for row in rows if row["recipe"] == recipe]
        axes.plot(
            [row["relative_cost"]["mean"] for row in points],
            [row["quality"]["mean"] for row in points],
            marker, color=theme.text, alpha=0.8, markersize=5.5, label=f"{recipe}, each map",
        )  # fmt: skip
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
    axes.set_xlabel("mean activated parameters, of the top tier's", color=theme.text)
    axes.set_ylabel("quality", color=theme.text)
    axes.tick_params(colors=theme.text)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(theme.muted)
    axes.legend(frameon=False, fontsize=9, labelcolor=theme.text, loc="best")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.background, metadata={"Software": None})
    return buffer.getvalue()


def _band(axes: Axes, curves: Any, top: float, colour: str, label: str) -> None:
    """The mean of several seeds' curves, and its t interval where there are several."""
    low = max(min(curve["cost"]) for curve in curves)
    high = min(max(curve["cost"]) for curve in curves)
    if not high > low:
        return
    at = np.linspace(low, high, _GRID)
    lines = []
    for curve in curves:
        cost, first = np.unique(curve["cost"], return_index=True)
        lines.append(np.interp(at, cost, np.asarray(curve["quality"], dtype=float)[first]))
    mean = np.mean(lines, axis=0)
    axes.plot(at / top, mean, color=colour, linewidth=2.0, label=label)
    if len(lines) > 1:
        half = student_t.ppf(0.975, len(lines) - 1) * np.std(lines, axis=0, ddof=1)
        half /= np.sqrt(len(lines))
        axes.fill_between(at / top, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
