"""The histogram of differences as an SVG that follows the reader's light or dark setting."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from dvpa.checkpoint.step_table import COPIED, KEPT, MERGED

WIDTH, LEFT, RIGHT = 760, 150, 110
ROW, BAR, TOP = 52, 40, 34
_LABELS = {
    MERGED: "merged",
    COPIED: "copied from another parent",
    KEPT: "kept: below the threshold",
}
_STYLE = """
.dh text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:#1c1e21}
.dh .q{fill:#62676e;font-size:12px}.dh .g{stroke:#e4e6e9}.dh .l{stroke:#b45f06;stroke-dasharray:4 3}
.dh .merged{fill:#0b62c4}.dh .copied{fill:#2b8a4b}.dh .kept{fill:#9aa0a8}
@media(prefers-color-scheme:dark){.dh text{fill:#e8eaed}.dh .q{fill:#9aa0a8}.dh .g{stroke:#2f3338}
.dh .l{stroke:#f0a95b}.dh .merged{fill:#6cb2ff}.dh .copied{fill:#6fce8f}.dh .kept{fill:#62676e}}
"""


def histogram_svg(report: Mapping[str, Any]) -> str:
    """Differences of every class on one logarithmic axis; empty where nothing was compared."""
    edges, classes = report["histogram"]["edges"], report["histogram"]["classes"]
    if not classes:
        return ""
    height = TOP + ROW * len(classes) + 44
    low, high = edges[0], edges[-1]
    span = WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        return LEFT + span * (value - low) / (high - low)

    bottom = TOP + ROW * len(classes)
    parts = [_legend(classes)]
    for value, label in _ticks(low, high):
        parts.append(_line("g", x(value), TOP, x(value), bottom))
        parts.append(_text(x(value), bottom + 18, label, "middle", "q"))
    limits = {limit for rule in report["recipe"]["rules"] for limit in (rule["delta"],) if limit}
    for limit in sorted(limits):
        if low <= math.log10(limit) <= high:
            place = x(math.log10(limit))
            parts.append(_line("l", place, TOP, place, bottom))
            parts.append(_text(place + 4, TOP + 10, f"delta {limit:g}", "start", "q"))
    rows = {row["name"]: row for row in report["classes"]}
    for place, (name, actions) in enumerate(classes.items()):
        floor = TOP + ROW * (place + 1)
        parts.append(_line("g", LEFT, floor, WIDTH - RIGHT, floor))
        parts += _bars(edges, actions, floor, x)
        parts.append(_text(LEFT - 10, floor - 8, name.replace("_", " "), "end"))
        median = rows[name]["difference"]["median"]
        parts.append(_text(WIDTH - RIGHT + 10, floor - 8, f"median {median:.2g}", "start", "q"))
    axis = "root mean square difference from the base"
    parts.append(_text(LEFT + span / 2, height - 6, axis, "middle", "q"))
    described = "Histogram of differences by class of tensor"
    return (
        f'<svg class="dh" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{described}"><style>{_STYLE}</style>' + "".join(parts) + "</svg>"
    )


def _bars(
    edges: Sequence[float],
    actions: Mapping[str, Sequence[int]],
    floor: int,
    x: Callable[[float], float],
) -> list[str]:
    """One class's bars, its actions stacked; the tallest bin fills the row."""
    totals = [sum(counts) for counts in zip(*actions.values(), strict=True)]
    tallest = max(totals)
    bars = []
    for bin_, total in enumerate(totals):
        y = float(floor)
        for action in _LABELS:
            count = actions.get(action, [0] * len(totals))[bin_]
            if not count or not total:
                continue
            tall = max(1.0, BAR * count / tallest)
            y -= tall
            left, right = x(edges[bin_]), x(edges[bin_ + 1])
            wide = right - left - 0.6
            bars.append(
                f'<rect class="{action}" x="{left:.1f}" y="{y:.1f}" width="{wide:.1f}" '
                f'height="{tall:.1f}"><title>{count}</title></rect>'
            )
    return bars


def _legend(classes: Mapping[str, Mapping[str, Any]]) -> str:
    used = [action for action in _LABELS if any(action in each for each in classes.values())]
    parts, place = [], float(LEFT)
    for action in used:
        parts.append(f'<rect class="{action}" x="{place:.0f}" y="6" width="11" height="11"/>')
        parts.append(_text(place + 16, 16, _LABELS[action], "start", "q"))
        place += 40 + 6.6 * len(_LABELS[action])
    return "".join(parts)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten, and as many numbers between them as it takes for three ticks."""
    ticks: list[tuple[float, str]] = []
    halves, tenths = ([i / n for i in range(n, 10 * n)] for n in (2, 10))
    for factors in ([1], [1, 2, 5], range(1, 10), halves, tenths):
        ticks = [
            (math.log10(factor) + power, f"{factor:g}e{power}")
            for power in range(math.floor(low), math.ceil(high) + 1)
            for factor in factors
            if low <= math.log10(factor) + power <= high
        ]
        if len(ticks) >= 3:
            break
    return ticks


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{mark}>{escape(text)}</text>'
