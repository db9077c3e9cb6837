"""The kernel benchmark's part of docs/benchmarks.md: tables and the figure of time against k."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dvpa.evaluate.figure import LIGHT

Row = Mapping[str, Any]
FIGURE = "kernels_linear.png"
BASELINE = "grouped_mm"


def kernel_parts(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(text, head, rows) of every table: one per shape and pass, in the order of measuring."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault((row["shape"], row["pass"]), []).append(row)
    return [_part(shape, kind, rows) for (shape, kind), rows in groups.items()]


def introduction(result: Mapping[str, Any]) -> str:
    """How it was measured, against which limits."""
    gpu = result["machine"].get("gpu")
    limits = "; ".join(
        f"{name}{best['bandwidth_gb_s']:,.0f} GB/s and {best['gemm_gflop_s']:,.0f} GFLOP/s"
        for name, best in _by_threads(result)
    )
    script = f"`python scripts/bench_kernels.py --device {result['machine']['device']}`"
    return (
        f"{script}{' on ' + gpu if gpu else ''}: routing table in, y out; every contender in "
        "every round on the same inputs, results compared first. Cells: median ms (fraction of "
        "the limit, which is the larger of bytes / bandwidth and FLOPs / matrix rate, over the "
        "25th percentile). Against pipeline: the time of `F.grouped_mm` (within a model: of "
        "Transformers' grouped_mm) over ours. GB/s counts touched weights once. Best seen in this "
        f"run: {limits}."
    )


def _by_threads(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    measured = result["measured"]["by_threads"]
    if result["machine"]["device"] == "cuda":
        return [("", best) for best in measured.values()]
    return [(f"{threads} thread(s) ", best) for threads, best in measured.items()]


def _part(shape: str, kind: str, rows: list[Row]) -> tuple[str, list[str], list[list[str]]]:
    """One table and the reasons of its gaps."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    has_threads = len({row["threads"] for row in rows}) > 1
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        case = (row["threads"], row["k"], row["tokens"])
        cases.setdefault(case, {})[row["implementation"]] = row
    # A contender that never ran needs no column; its reason stands below.
    shown = [
        name
        for name in names
        if any("median_ms" in found.get(name, {}) for found in cases.values())
    ]
    ours = [name for name in shown if name.startswith("dvpa")]
    has_limit = any(row.get("limit_ms") for row in rows)
    has_memory = any(row.get("peak_mib") for row in rows)
    head = [
        "k",
        "T",
        *(["threads"] if has_threads else []),
        *(["limit"] if has_limit else []),
        *shown,
    ]
    for name in ours:
        head += [f"{name} against pipeline"] + ([f"{name} GB/s, TFLOP/s"] if has_limit else [])
    if has_memory:
        head.append("peak MiB, ours / pipeline")
    lines = []
    for (threads, k, tokens), found in cases.items():
        line = [k, f"{tokens:,}", *([str(threads)] if has_threads else [])]
        if has_limit:
            line.append(_number(next(iter(found.values())).get("limit_ms")))
        line += [_cell(found.get(name, {})) for name in shown]
        for name in ours:
            row = found.get(name, {})
            line.append(_number(row.get("ratio_to_grouped_mm"), "{:.2f}"))
            if has_limit:
                line.append(f"{_number(row.get('gb_s'))}, {_number(row.get('tflop_s'))}")
        if has_memory:
            peaks = [
                found.get(name, {}).get("peak_mib") for name in (ours[:1] or [""]) + [BASELINE]
            ]
            line.append(" / ".join(_number(peak, "{:,.0f}") for peak in peaks))
        lines.append(line)
    text = f"**{shape}, {kind}** ({rows[0]['dtype']})."
    return text + _reasons(rows), head, lines


def _reasons(rows: list[Row]) -> str:
    """Why contenders have no time, each reason once."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.get("error"):
            key = (row["implementation"], row["error"])
            counts[key] = counts.get(key, 0) + 1
    told = [f"{name}: {why} ({count} case(s))" for (name, why), count in counts.items()]
    return " Not measured: " + "; ".join(told) + "." if told else ""


def _cell(row: Row) -> str:
    if row.get("median_ms") is None:
        return ""
    fraction = row.get("fraction_of_limit")
    share = f" ({fraction:.2f})" if fraction is not None else ""
    return _number(row["median_ms"]) + share


def _number(value: float | None, pattern: str = "") -> str:
    """Three digits, or nothing."""
    if value is None:
        return ""
    if pattern:
        return pattern.format(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def linear_png(results: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Time against mean k, one panel per machine, shape and T; None where nothing was measured."""
    panels: dict[tuple[int, str, int], list[Row]] = {}
    for number, result in enumerate(results):
        for experiment in result.get("linear_cost", {}).get("experiments", []):
            key = (number, experiment["shape"], experiment["tokens"])
            panels.setdefault(key, []).append(experiment)
    if not panels:
        return None
    figure = Figure(figsize=(4.4 * len(panels), 4.0), dpi=200, facecolor=LIGHT.background)
    FigureCanvasAgg(figure)
    for place, ((number, shape, tokens), experiments) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1, facecolor=LIGHT.background)
        machine = results[number]["machine"]
        where = machine.get("gpu") or f"CPU, {experiments[0]['threads']} thread(s)"
        _panel(axes, f"{shape}, T = {tokens:,}\n{where}", experiments)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=LIGHT.background, metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, title: str, experiments: list[Row]) -> None:
    """Points of uniform (filled) and mixed (hollow) batches over the line through all of them."""
    handles = []
    for experiment in experiments:
        name, fit = experiment["implementation"], experiment["fit"]
        colour = LIGHT.adaptive if name.startswith("dvpa") else LIGHT.length
        points = [point for point in experiment["points"] if "median_ms" in point]
        for is_uniform in (True, False):
            chosen = [point for point in points if point["is_uniform"] == is_uniform]
            axes.plot(
                [point["mean_k"] for point in chosen],
                [point["median_ms"] for point in chosen],
                "o" if is_uniform else "D",
                color=colour,
                markerfacecolor=colour if is_uniform else LIGHT.background,
                markersize=5.5,
            )
        label = name
        if fit is not None and points:
            ends = [0.0, max(point["mean_k"] for point in points)]
            line = [fit["intercept_ms"] + fit["slope_ms_per_k"] * k for k in ends]
            axes.plot(ends, line, "-", color=colour, linewidth=1.4, zorder=1.5)
            label += f", $R^2$ = {fit['r2']:.3f}"
        handles.append(Line2D([], [], color=colour, marker="o", label=label))
    handles += [
        Line2D([], [], color=LIGHT.muted, marker="o", linestyle="", label="all tokens the same k"),
        Line2D(
            [],
            [],
            color=LIGHT.muted,
            marker="D",
            markerfacecolor=LIGHT.background,
            linestyle="",
            label="two k mixed in the batch",
        ),
    ]
    axes.legend(
        handles=handles, loc="upper left", frameon=False, fontsize=8.5, labelcolor=LIGHT.text
    )
    axes.set_title(title, color=LIGHT.text, fontsize=10)
    axes.grid(color=LIGHT.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(LIGHT.muted)
    axes.tick_params(colors=LIGHT.text, labelsize=9)
    axes.set_xlabel("mean experts per token (k)", color=LIGHT.text, fontsize=10)
    axes.set_ylabel("forward, ms", color=LIGHT.text, fontsize=10)


def fit_lines(result: Mapping[str, Any]) -> list[list[str]]:
    """The fitted lines as table rows."""
    return [
        [
            experiment["shape"],
            f"{experiment['tokens']:,}",
            experiment["implementation"],
            f"{fit['slope_ms_per_k']:.3g}",
            f"{fit['intercept_ms']:.3g}",
            f"{fit['r2']:.4f}",
            f"{fit['mixed_off_uniform_line']:.1%}",
        ]
        for experiment in result.get("linear_cost", {}).get("experiments", [])
        if (fit := experiment["fit"]) is not None
    ]
