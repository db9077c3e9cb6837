"""The experts' load as a picture: for each MoE layer an image of tiers by experts."""

import io

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm, to_rgba
from matplotlib.figure import Figure

from dvpa.config import DvpaConfig
from dvpa.evaluate.figure import LIGHT

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

FULL = 3.0  # times the mean: the end of the colours
NARROW = 64  # experts up to which two layers stand side by side


def load_table(load: IntArray, config: DvpaConfig) -> dict[str, list[object]]:
    """Columns layer, tier, group, expert, rows of `load` [MoE layers, tiers, experts].

    Experts outside a tier's pool are left out.
    """
    layers, columns = moe_layers(config, len(load)), ("layer", "tier", "group", "expert", "rows")
    lines = [
        (layers[place], name, expert // config.unit_size, expert, int(rows))
        for place, of_layer in enumerate(load)
        for tier, name in enumerate(config.tier_names)
        for expert, rows in enumerate(of_layer[tier, : config.pool_size(tier)])
    ]
    return {name: [line[i] for line in lines] for i, name in enumerate(columns)}


def moe_layers(config: DvpaConfig, count: int) -> list[int]:
    """Numbers of the layers with experts; the multi-token prediction module's comes last."""
    first = config.first_k_dense_replace
    return list(range(first, first + count))


def relative_load(load: IntArray, config: DvpaConfig) -> FloatArray:
    """Load over the mean of its layer's and tier's pool; NaN outside it, and for a tier unused."""
    relative = np.full(load.shape, np.nan)
    for tier in range(config.num_tiers):
        own = load[:, tier, : config.pool_size(tier)]
        mean = own.mean(-1, keepdims=True)
        mean[mean == 0] = np.nan
        relative[:, tier, : own.shape[-1]] = own / mean
    return relative


def load_png(load: IntArray, config: DvpaConfig, title: str) -> bytes:
    """PNG of `load` [MoE layers, tiers, experts], in multiples of the mean load of a tier's pool.

    Lines part the groups, a cross is an expert without a row, grey is outside the pool. At the
    right: MaxVio of the rows shown.
    """
    relative, layers = relative_load(load, config), moe_layers(config, len(load))
    columns = 2 if config.n_routed_experts <= NARROW and len(load) > 1 else 1
    of_column = -(-len(load) // columns)
    height = 0.9 + 0.2 * of_column * (config.num_tiers + 1)
    figure = Figure(figsize=(9.0, height), dpi=110, layout="constrained")
    figure.set_facecolor(LIGHT.background)
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, columns, squeeze=False)
    scale = ScalarMappable(
        TwoSlopeNorm(1.0, 0.0, FULL), colormaps["RdBu_r"].with_extremes(bad=LIGHT.grid)
    )
    for column, axes in enumerate(grid.flat):
        part = slice(column * of_column, (column + 1) * of_column)
        axes.set_ylim(of_column * (config.num_tiers + 1) - 0.5, -0.5)
        _draw(axes, relative[part], layers[part], config, scale)
    figure.suptitle(f"experts' load, {title}", fontsize=10.5, color=LIGHT.text)
    bar = figure.colorbar(
        scale, ax=grid, extend="max", ticks=[0, 0.5, 1, 2, FULL],
        fraction=0.04, aspect=10, shrink=min(1.0, 1.6 / height), anchor=(0.0, 0.9),
    )  # fmt: skip
    bar.set_label("load / mean of pool", fontsize=8, color=LIGHT.text)
    bar.ax.tick_params(labelsize=8, colors=LIGHT.text)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=LIGHT.background, metadata={"Software": None})
    return buffer.getvalue()


def _draw(
    axes: Axes, values: FloatArray, layers: list[int], config: DvpaConfig, scale: ScalarMappable
) -> None:
    """One layer below the other, `values` [layers, tiers, experts]; a line of text above each."""
    tiers, size, experts = config.num_tiers, config.unit_size, config.n_routed_experts
    lines = np.full((len(layers), tiers + 1, experts), np.nan)
    lines[:, 1:] = values
    lines = lines.reshape(-1, experts)
    colours = scale.to_rgba(np.ma.masked_invalid(lines))
    colours[:: tiers + 1] = to_rgba(LIGHT.background)
    whole = axes.get_ylim()  # of the longer column
    axes.imshow(colours, aspect="auto", interpolation="nearest")
    axes.set_ylim(whole)
    dead_line, dead_expert = np.nonzero(lines == 0)
    axes.plot(dead_expert, dead_line, "x", color=LIGHT.background, markersize=4)
    tops = np.arange(len(layers)) * (tiers + 1) + 0.5
    borders = np.arange(size, experts, size) - 0.5
    for border in borders:
        axes.vlines([border] * len(tops), tops, tops + tiers, color=LIGHT.text, linewidth=0.8)
    for layer, top in zip(layers, tops, strict=True):
        axes.text(-0.5, top - 0.15, f"layer {layer}", fontsize=8, color=LIGHT.text)
        axes.text(experts - 0.5, top - 0.15, "MaxVio", fontsize=7.5, ha="right", color=LIGHT.muted)
    places = [place for place in range(len(lines)) if place % (tiers + 1)]
    axes.set_yticks(places, config.tier_names * len(layers), fontsize=8)
    middles = [group * size + (size - 1) / 2 for group in range(config.n_group)]
    axes.set_xticks(middles, range(config.n_group), fontsize=8)
    axes.set_xlabel("group", fontsize=8, color=LIGHT.muted, labelpad=1)
    right = axes.twinx()
    right.set_yticks(places, [_max_violation(lines[place]) for place in places], fontsize=8)
    right.set_ylim(whole)
    for each in (axes, right):
        each.tick_params(length=0, colors=LIGHT.text)
        each.spines[:].set_visible(False)


def _max_violation(of_tier: FloatArray) -> str:
    pool = of_tier[~np.isnan(of_tier)]
    return f"{pool.max() - 1:.2f}" if len(pool) else "unused"
