"""Reliability curves: what a tier map promises of each tier, against what the tier then did.

Requests are put into bins of about equal size by predicted success; equal predictions are never
parted, so a bin may hold more, and there may be fewer bins than asked for.
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import beta

from dvpa.evaluate.figure import LIGHT, Theme
from dvpa.evaluate.table import OutcomeTable
from dvpa.tiers.tier_map import TierMap

FloatArray = npt.NDArray[np.float64]
COLUMNS = ("tier", "predicted", "observed", "low", "high", "requests")
_WIDTH = 4  # panels in a row


def reliability(tier_map: TierMap, test: OutcomeTable, bins: int = 10) -> dict[str, list[Any]]:
    """The curves of all tiers as columns `COLUMNS`, a line per tier and bin, base tier first.

    `predicted`: mean calibrated success; `observed`: mean quality; `low`, `high`: its 95 % interval
    (Clopper, Pearson 1934; wide for qualities between 0 and 1). Requests without a difficulty are
    left out, and a map without calibration has no lines.

    Raises:
        ValueError: the map and the table have different numbers of tiers, or `bins` is below 1.
    """
    if tier_map.num_tiers != test.num_tiers:
        raise ValueError(f"test: {test.num_tiers} tiers, the tier map has {tier_map.num_tiers}")
    if bins < 1:
        raise ValueError(f"bins: {bins} is below 1")
    known = np.isfinite(test.difficulty)
    success, quality = tier_map.success(test.difficulty[known]), test.quality[known]
    table: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    if not success.size:
        return table
    for tier, name in enumerate(tier_map.tier_names):
        predicted, observed, counts = _curve(success[:, tier], quality[:, tier], bins)
        low, high = _interval(observed, counts)
        table["tier"] += [name] * len(counts)
        for column, values in zip(
            COLUMNS[1:], (predicted, observed, low, high, counts), strict=True
        ):
            table[column] += values.tolist()
    return table


def _curve(
    predicted: FloatArray, observed: FloatArray, bins: int
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
    """Means of both per bin, and how many requests are in it."""
    inner = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1], method="higher"))
    place = np.searchsorted(inner, predicted, side="right")
    _, place, counts = np.unique(place, return_inverse=True, return_counts=True)
    sums = np.bincount(place, weights=predicted), np.bincount(place, weights=observed)
    return sums[0] / counts, sums[1] / counts, counts


def _interval(
    mean: FloatArray, counts: npt.NDArray[np.int64], level: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    successes, tail = mean * counts, (1 - level) / 2
    failures = counts - successes
    with np.errstate(invalid="ignore"):
        low = np.where(successes > 0, beta.ppf(tail, successes, failures + 1), 0.0)
        high = np.where(failures > 0, beta.ppf(1 - tail, successes + 1, failures), 1.0)
    return low, high


def reliability_png(
    table: dict[str, list[Any]], ece: dict[str, float], theme: Theme = LIGHT
) -> bytes:
    """PNG of what `reliability` gave, a panel per tier; `ece`: its error, by tier name."""
    names = list(dict.fromkeys(table["tier"]))
    columns = max(1, min(len(names), _WIDTH))
    rows = max(1, -(-len(names) // columns))
    size = (2.5 * columns + 0.5, 2.7 * rows + 0.5)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.set_facecolor(theme.background)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place < len(names):
            name = names[place]
            lines = [i for i, tier in enumerate(table["tier"]) if tier == name]
            own = {column: np.array([table[column][i] for i in lines]) for column in COLUMNS[1:]}
            _panel(axes, own, f"{name} (ECE {ece[name]:.3f})", theme)
        else:
            axes.set_visible(False)
    figure.supxlabel("predicted success", fontsize=9.5, color=theme.text)
    figure.supylabel("observed quality", fontsize=9.5, color=theme.text)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.background, metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, own: dict[str, FloatArray], title: str, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.plot([0, 1], [0, 1], "-", color=theme.muted, linewidth=1.0)
    spread = np.maximum([own["observed"] - own["low"], own["high"] - own["observed"]], 0)
    axes.errorbar(
        own["predicted"], own["observed"], yerr=spread, fmt="o-", markersize=4.5,
        color=theme.adaptive, ecolor=theme.adaptive, elinewidth=1.0, linewidth=1.4,
    )  # fmt: skip
    axes.set_title(title, fontsize=9.5, color=theme.text)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(theme.muted)
