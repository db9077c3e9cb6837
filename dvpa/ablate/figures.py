"""Drawing in a light and a dark version, and the frontier of a study."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from scipy.stats import t as student_t

from dvpa.evaluate.figure import LIGHT, Theme

FloatArray = npt.NDArray[np.float64]

WIDTH = 9.0  # inches; a report shows it as wide as its text
PERCENT = FuncFormatter(lambda x, _: f"{100 * x:.0f} %")
_DPI = 150
_GRID = 60  # costs at which curves of several seeds are averaged
_MARKERS = "os^Dv<>PX*"


def blank(height: float, theme: Theme) -> Figure:
    """An empty figure of the report's width."""
    figure = Figure(figsize=(WIDTH, height), dpi=_DPI, layout="constrained")
    figure.set_facecolor(theme.background)
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, theme: Theme, title: str = "") -> None:
    """Colours, a quiet grid, two spines."""
    axes.set_facecolor(theme.background)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(theme.muted)
    if title:
        axes.set_title(title, fontsize=10, color=theme.text)


def colours(theme: Theme) -> list[str]:
    """Of several lines of one kind."""
    return [theme.adaptive, theme.length, theme.baseline, theme.oracle, theme.muted]


def png(figure: Figure) -> bytes:
    """The picture; without metadata, so that the same results give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def band(axes: Axes, x: FloatArray, lines: Sequence[FloatArray], colour: str, label: str) -> None:
    """The mean of several seeds' lines over x, and its 95 % t interval where there are several."""
    mean = np.mean(lines, axis=0)
    axes.plot(x, mean, color=colour, linewidth=2.0, label=label)
    if len(lines) > 1:
        half = student_t.ppf(0.975, len(lines) - 1) * np.std(lines, axis=0, ddof=1)
        half /= np.sqrt(len(lines))
        axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def frontier_png(results: Mapping[str, Any], theme: Theme = LIGHT) -> bytes:
    """Quality against cost: the reference's frontier with its band over seeds, a random mix, and
    every configuration as a point.
    """
    figure = blank(5.6, theme)
    axes = figure.add_subplot()
    style(axes, theme)
    rows = [row for row in results["configurations"] if "infeasible" not in row]
    models = results["models"]
    top = models[0]["tiers"][-1]["activated_params"]
    reference = next((r for r in rows if r["name"] == results["reference"]), None)
    if reference is not None:
        own = [model for model in models if model["recipe"] == reference["recipe"]]
        for name, colour, label in (
            ("oracle", theme.oracle, "oracle (outcomes known)"),
            ("random", theme.muted, "random mix of tiers"),
        ):
            _frontier(axes, [model["frontier"][name] for model in own], top, colour, label)
        _frontier(axes, reference["frontier"], top, theme.adaptive, "reference, budget swept")
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    shades = [theme.text, theme.length, theme.baseline]
    for place, recipe in enumerate(recipes):
        points = [row for row in rows if row["recipe"] == recipe]
        axes.plot(
            [row["relative_cost"]["mean"] for row in points],
            [row["quality"]["mean"] for row in points],
            _MARKERS[place % len(_MARKERS)], color=shades[place % len(shades)], markersize=6.5,
            markeredgecolor=theme.background, label=f"{recipe}, each map", zorder=3,
        )  # fmt: skip
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("mean activated parameters, of the top tier's", color=theme.text)
    axes.set_ylabel("quality", color=theme.text)
    axes.legend(frameon=False, fontsize=9.5, labelcolor=theme.text, loc="lower right")
    return png(figure)


def _frontier(axes: Axes, curves: Any, top: float, colour: str, label: str) -> None:
    """Curves of several seeds, each with costs of its own, as one band."""
    low = max(min(curve["cost"]) for curve in curves)
    high = min(max(curve["cost"]) for curve in curves)
    if not high > low:
        return
    at = np.linspace(low, high, _GRID)
    lines = []
    for curve in curves:
        cost, first = np.unique(curve["cost"], return_index=True)
        lines.append(np.interp(at, cost, np.asarray(curve["quality"], dtype=float)[first]))
    band(axes, at / top, lines, colour, label)
