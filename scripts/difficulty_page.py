"""docs/benchmarks/difficulty.json as a table and a figure."""

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dvpa.evaluate.figure import LIGHT

FIGURE = "difficulty.png"
Row = dict[str, Any]
Part = tuple[str, list[str], list[list[str]]]


def difficulty_parts(result: Row) -> list[Part]:
    """(text, head, rows) of the table."""
    seeds = len(result["seeds"])
    sizes = "; ".join(
        f"{kind['name']}: {np.mean([row[name] for row in result['head_problems']]):,.0f} problems "
        f"for the head, {np.mean(kind['requests']):,.0f} in the test"
        for name, kind in result["kinds"].items()
    )
    text = (
        f"`{result['command']}`: the recipe problems from {seeds} seeds, each with problems of its "
        f"own held out ({sizes}, means over seeds). Partial Spearman correlation, log prompt "
        "length held fixed, of difficulty with the nll gap of a lower tier to the top tier on "
        "unseen problems: mean over seeds, 95 % t interval, every seed. *One head*: trained on "
        "both files' outcomes; *words*: ridge regression on TF-IDF in the head's place; *length*: "
        "Spearman of log length alone."
    )
    head = ["problems", "gap of", "nats", "difficulty", "95 %", "each seed"]
    head += ["one head", "words", "length"]
    rows = []
    for kind in result["kinds"].values():
        for i, tier in enumerate(result["tiers"][:-1]):
            low, high = kind["partial"]["ci95"][i]
            each = ", ".join(f"{row[i]:+.3f}" for row in kind["partial"]["per_seed"])
            means = [f"{kind[key]['mean'][i]:+.3f}" for key in ("partial_one_head", "words")]
            rows.append(
                [
                    kind["name"],
                    tier,
                    f"{kind['gap']['mean'][i]:+.3f}",
                    f"**{kind['partial']['mean'][i]:+.3f}**",
                    f"{low:+.3f} .. {high:+.3f}",
                    each,
                    *means,
                    f"{kind['length']['mean'][i]:+.3f}",
                ]
            )
    return [(text, head, rows)]


def difficulty_png(result: Row) -> bytes:
    """The base tier's gap by fifths of difficulty, what length explains taken out."""
    kinds = list(result["kinds"].values())
    figure = Figure(figsize=(5.2 * len(kinds), 4.2), dpi=150, facecolor=LIGHT.background)
    FigureCanvasAgg(figure)
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1, facecolor=LIGHT.background)
        axes.grid(color=LIGHT.grid, linewidth=0.8)
        curve = kind["base_gap_by_fifth"]
        fifths = np.arange(1, len(curve["mean"]) + 1)
        for each in curve["per_seed"]:
            axes.plot(fifths, each, color=LIGHT.length, linewidth=0.9, alpha=0.6)
        axes.plot(
            fifths, curve["mean"], "o-", color=LIGHT.adaptive, linewidth=2.2, label="mean of seeds"
        )
        axes.plot([], [], color=LIGHT.length, linewidth=0.9, label="each seed")
        low, high = kind["partial"]["ci95"][0]
        axes.set_title(
            f"{kind['name']}: partial Spearman {kind['partial']['mean'][0]:.2f} "
            f"({low:.2f} .. {high:.2f})",
            color=LIGHT.text,
            fontsize=11,
        )
        axes.set_xlabel("fifth of difficulty, given length (5: hardest)", color=LIGHT.text)
        axes.set_xticks(fifths)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if place == 0:
            axes.set_ylabel("nll of the base tier minus the top tier's, nats", color=LIGHT.text)
            axes.legend(frameon=False, fontsize=9.5)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=LIGHT.background, metadata={"Software": None})
    return buffer.getvalue()
