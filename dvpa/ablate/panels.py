"""The figures of a study besides its frontier: calibration, risk, confusion, thresholds, load."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dvpa.ablate.figures import PERCENT, band, blank, colours, png, style
from dvpa.evaluate.figure import Theme

_WIDE = 4  # panels in a row
_SEEDS = "osD^v<>"


def calibration_png(curves: Sequence[Mapping[str, Any]], theme: Theme) -> bytes:
    """Promised against observed quality, a panel per tier, a marker per seed.

    curves: what `dvpa.evaluate.reliability.reliability` gave, by seed.
    """
    names = list(dict.fromkeys(name for curve in curves for name in curve["tier"]))
    figure, panels = _grid(len(names), 2.2, theme)
    for axes, name in zip(panels, names, strict=False):
        style(axes, theme, name)
        axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1.0)
        for seed, curve in enumerate(curves):
            lines = [i for i, tier in enumerate(curve["tier"]) if tier == name]
            own = {
                column: np.array([curve[column][i] for i in lines])
                for column in ("predicted", "observed", "low", "high")
            }
            spread = [own["observed"] - own["low"], own["high"] - own["observed"]]
            axes.errorbar(
                own["predicted"], own["observed"], yerr=np.maximum(spread, 0.0),
                fmt=_SEEDS[seed % len(_SEEDS)], markersize=4.5, elinewidth=0.9, alpha=0.85,
                color=colours(theme)[seed % 4], label=f"seed {curve['seed']}",
            )  # fmt: skip
        axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
    panels[0].legend(frameon=False, fontsize=8.5, labelcolor=theme.text, handletextpad=0.2)
    figure.supxlabel("success that the map promises", fontsize=9.5, color=theme.text)
    figure.supylabel("quality of the tier", fontsize=9.5, color=theme.text)
    return png(figure)


def risk_png(curves: Sequence[Mapping[str, Any]], theme: Theme) -> bytes:
    """Risk against coverage: a line per recipe with its band over seeds, and the first one's
    oracle order.
    """
    figure = blank(4.2, theme)
    axes = figure.add_subplot()
    style(axes, theme)
    first = curves[0]
    coverage = np.array(first["coverage"])
    oracle = [np.array(line) for line in first["oracle"]]
    band(axes, coverage, oracle, theme.muted, f"{first['recipe']}, best order there is")
    for place, curve in enumerate(curves):
        lines = [np.array(line) for line in curve["risk"]]
        band(axes, coverage, lines, colours(theme)[place % 4], curve["recipe"])
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("share of requests answered, surest first", color=theme.text)
    axes.set_ylabel("risk: 1 - quality of those", color=theme.text)
    axes.set_xlim(0, 1.01)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9.5, labelcolor=theme.text, loc="upper left")
    return png(figure)


def confusion_png(
    tables: Sequence[tuple[str, Sequence[Sequence[int]]]], names: Sequence[str], theme: Theme
) -> bytes:
    """A panel per map: of the requests whose cheapest best tier is the row's, the share that the
    map sent to each tier.

    tables: name and counts [T, T] of each map.
    """
    figure, panels = _grid(len(tables), 2.55, theme)
    shades = _shades(theme)
    for axes, (title, counts) in zip(panels, tables, strict=False):
        table = np.array(counts, dtype=float)
        total = table.sum(axis=1, keepdims=True)
        share = np.divide(table, total, out=np.zeros_like(table), where=total > 0)
        axes.set_facecolor(theme.background)
        axes.imshow(share, cmap=shades, vmin=0.0, vmax=1.0)
        for row, column in np.ndindex(*share.shape):
            axes.text(
                column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center",
                fontsize=9, color=theme.background if share[row, column] > 0.55 else theme.text,
                fontweight="bold" if row == column else "normal",
            )  # fmt: skip
        same = np.trace(table) / max(table.sum(), 1.0)
        axes.set_title(f"{title}\n{same:.0%} the same", fontsize=9, color=theme.text)
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=30)
        rows = [f"{name} {part:.0%}" for name, part in zip(names, _parts(total), strict=True)]
        axes.set_yticks(range(len(names)), rows, fontsize=8)
        axes.tick_params(length=0, colors=theme.text)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.supxlabel("tier that the map chose, % of the row", fontsize=9.5, color=theme.text)
    figure.supylabel("oracle's tier, of all requests", fontsize=9.5, color=theme.text)
    return png(figure)


def _parts(total: Any) -> list[float]:
    return (total[:, 0] / max(float(total.sum()), 1.0)).tolist()


def surface_png(surfaces: Sequence[Mapping[str, Any]], theme: Theme) -> bytes:
    """Quality by colour and cost by contours, over the share of requests below each of two cuts."""
    columns = min(len(surfaces), 3)
    rows = -(-len(surfaces) // columns)
    figure = blank(0.3 + (4.0 if columns < 3 else 3.1) * rows, theme)
    panels = figure.subplots(rows, columns, squeeze=False)
    every = [
        value for s in surfaces for line in s["quality"] for value in line if value is not None
    ]
    scale = Normalize(min(every), max(every))
    for axes, surface in zip(panels.flat, surfaces, strict=False):
        _surface(axes, surface, scale, theme)
    for axes in list(panels.flat)[len(surfaces) :]:
        axes.set_visible(False)
    image = panels.flat[0].images[0]
    bar = figure.colorbar(image, ax=panels, fraction=0.03, aspect=22, shrink=0.8)
    bar.set_label("quality", color=theme.text, fontsize=9.5)
    bar.ax.tick_params(colors=theme.text, labelsize=8.5)
    bar.outline.set_visible(False)
    return png(figure)


def _surface(axes: Axes, surface: Mapping[str, Any], scale: Normalize, theme: Theme) -> None:
    base, middle, top = surface["tiers"]
    share = np.array(surface["share"])
    quality, cost = (
        np.array([[np.nan if v is None else v for v in line] for line in surface[name]]).T
        for name in ("quality", "relative_cost")
    )  # [second cut, first cut]
    style(axes, theme, f"{base} / {middle} / {top}")
    half = (share[1] - share[0]) / 2
    extent = (-half, 1 + half, -half, 1 + half)
    axes.imshow(
        np.ma.masked_invalid(quality), origin="lower", extent=extent, cmap=_shades(theme),
        norm=scale, aspect="equal", interpolation="nearest",
    )  # fmt: skip
    low, high = np.nanmin(cost), np.nanmax(cost)
    levels = [level for level in np.arange(0.05, 1.0, 0.05) if low < level < high]
    lines = axes.contour(
        share, share, np.ma.masked_invalid(cost), levels=levels, colors=theme.text, linewidths=0.8
    )
    axes.clabel(lines, fmt=lambda value: f"{100 * value:.0f} %", fontsize=8.5)
    if "best" in surface:
        axes.plot(
            *surface["best"]["share"], "*", markersize=14, color=theme.length,
            markeredgecolor=theme.background, clip_on=False,
        )  # fmt: skip
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.grid(visible=False)
    labels = _cut_labels(surface)
    axes.xaxis.set_major_formatter(FuncFormatter(labels))
    axes.yaxis.set_major_formatter(FuncFormatter(labels))
    axes.set_xlabel(f"requests below the cut to {middle} (difficulty there)", color=theme.text)
    axes.set_ylabel(f"requests below the cut to {top}", color=theme.text)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(9)
    axes.tick_params(labelsize=8.5)


def _cut_labels(surface: Mapping[str, Any]) -> Callable[[float, int], str]:
    """Ticks as the share of requests, and the difficulty where the cut then is."""
    share, cut = surface["share"], surface["cut"]

    def label(value: float, _: int) -> str:
        place = int(np.argmin(np.abs(np.array(share) - value)))
        found = cut[place]
        return f"{100 * value:.0f} %" + ("" if found is None else f"\n{found:.2f}")

    return label


def load_png(models: Sequence[Mapping[str, Any]], theme: Theme) -> bytes:
    """Two rows of panels, one per tier, a line per recipe (mean over its seeds): MaxVio of the rows
    between two lines of the log, and the last stage's load, busiest expert first.
    """
    names = list(dict.fromkeys(name for model in models for name in model["load"]))
    recipes = list(dict.fromkeys(model["recipe"] for model in models))
    figure = blank(4.6, theme)
    grid = figure.subplots(2, len(names), squeeze=False, sharey="row")
    highest = 1.0
    for column, name in enumerate(names):
        above, below = grid[:, column]
        style(above, theme, name)
        style(below, theme)
        below.axhline(1.0, color=theme.muted, linewidth=1.0)
        for place, recipe in enumerate(recipes):
            own = [m["load"][name] for m in models if m["recipe"] == recipe and name in m["load"]]
            if not own:
                continue
            colour, experts = colours(theme)[place % 4], len(own[0]["sorted"])
            lines = [np.array(load["sorted"]) for load in own]
            highest = max(highest, *(float(line.max()) for line in lines))
            band(below, np.arange(1.0, experts + 1), lines, colour, recipe)
            below.set_xticks([1, experts])
            steps = own[0]["steps"]
            lines = [np.array(load["violation"]) for load in own if load["steps"] == steps]
            if len(lines) == len(own) and steps:
                band(above, np.array(steps, dtype=float), lines, colour, recipe)
        above.set_ylim(bottom=0)
        above.set_xlabel("step", fontsize=9, color=theme.text)
        below.set_xlabel("experts, busiest first", fontsize=9, color=theme.text)
    grid[1, 0].set_ylim(0, 1.15 * highest)
    grid[0, 0].set_ylabel("MaxVio", fontsize=9, color=theme.text)
    grid[1, 0].set_ylabel("load / mean", fontsize=9, color=theme.text)
    grid[1, 0].legend(frameon=False, fontsize=8.5, labelcolor=theme.text, loc="lower left")
    return png(figure)


def _grid(count: int, height: float, theme: Theme) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, four in a row; they share their axes."""
    columns = max(1, min(count, _WIDE))
    rows = max(1, -(-count // columns))
    figure = blank(0.4 + height * rows, theme)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels


def _shades(theme: Theme) -> Colormap:
    """From the page's background to its accent."""
    return LinearSegmentedColormap.from_list("shades", [theme.grid, theme.adaptive]).with_extremes(
        bad=theme.background
    )
