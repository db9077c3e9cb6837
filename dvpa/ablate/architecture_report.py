"""results.json, report.html and the figure of a study of architectures."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dvpa.ablate.figures import blank, colours, png, style
from dvpa.evaluate.figure import DARK, LIGHT, Theme, format_params
from dvpa.evaluate.markup import document, interval, picture, shown, table
from dvpa.evaluate.replacing import write_atomically

_MARKERS = "os^Dv<>PX*"


def write_architectures(results: Mapping[str, Any], out: Path) -> dict[str, Path]:
    """Write everything atomically; returns the paths by file name."""
    light, dark = flops_png(results, LIGHT), flops_png(results, DARK)
    contents: dict[str, str | bytes] = {
        "results.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "report.html": architecture_page(results, light, dark),
        "flops.png": light,
    }
    for name, content in contents.items():
        write_atomically(out / name, content)
    return {name: out / name for name in contents}


def architecture_page(results: Mapping[str, Any], light: bytes, dark: bytes) -> str:
    """The report as one self-contained page."""
    head = ["architecture", "total", "activated", "MFLOPs a token", "training TFLOPs"]
    head += ["nll", "minus reference"]
    body = [_line(row) for row in results["architectures"]]
    notes = {row["name"]: row["note"] for row in results["architectures"] if row["note"]}
    legend = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(note)}</dd></div>" for name, note in notes.items()
    )
    fields = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(shown(value))}</dd></div>"
        for key, value in results["environment"].items()
    )
    seeds = ", ".join(map(str, results["seeds"]))
    sections = [
        f"<header><h1>{escape(results['title'])}</h1><p class=note>Seeds {seeds}; nats per token "
        f"of {results['scored_tokens']:,} tokens in {results['passages']:,} held-out passages, the "
        "same for all; equal steps and examples.</p></header>",
        f"<section class=dense><h2>Loss, parameters, FLOPs</h2>{table(head, body)}"
        "<p class=note>nll with its 95 % t interval over seeds; difference to the top tier of "
        f"{escape(results['reference'])}, paired by passage and seed, with its bootstrap interval "
        "over both; lower is better. A nested model has a row per tier, but was trained once: its "
        "training FLOPs are those of all its tiers.</p></section>",
        "<section><h2>Loss against FLOPs</h2><figure>"
        + picture(light, dark, "Held-out nll against FLOPs per token and of the training.")
        + "<figcaption>Bars: 95 % t intervals over seeds. Lines join the tiers of one model."
        "</figcaption></figure></section>",
        f"<section><h2>Architectures</h2><dl class=legend>{legend}</dl></section>",
        f"<section><h2>Environment</h2><dl class='legend fields'>{fields}</dl></section>",
    ]  # fmt: skip
    return document(str(results["title"]), sections)


def _line(row: Mapping[str, Any]) -> str:
    minus, compared = row.get("minus_reference"), ""
    if minus:
        low, high = minus["ci95"]
        tone = "" if low <= 0 <= high else (" class=better" if high < 0 else " class=worse")
        compared = (
            f"<span{tone}>{minus['difference']:+.3f}</span> "
            f"<span class=quiet>{low:+.3f}&nbsp;to&nbsp;{high:+.3f}</span>"
        )
    return (
        f"<tr><th scope=row>{escape(row['label'])}</th>"
        f"<td>{format_params(row['total_params'])}</td>"
        f"<td>{format_params(row['activated_params'])}</td>"
        f"<td>{row['flops_per_token'] / 1e6:.2f}</td><td>{row['training_flops'] / 1e12:.2f}</td>"
        f"<td>{row['nll']['mean']:.4f} "
        f"<span class=quiet>{interval(row['nll']['ci95'])}</span></td><td>{compared}</td></tr>"
    )


def flops_png(results: Mapping[str, Any], theme: Theme) -> bytes:
    """Held-out nll against FLOPs per token and against training FLOPs."""
    figure = blank(4.6, theme)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = results["architectures"]
    for axes, key in ((left, "flops_per_token"), (right, "training_flops")):
        style(axes, theme)
        axes.set_xscale("log")
        for place, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            own = [row for row in rows if row["name"] == name]
            _points(axes, own, key, colours(theme)[place % 5], _MARKERS[place % len(_MARKERS)])
    left.set_xlabel("FLOPs per token, forward", color=theme.text)
    right.set_xlabel("training FLOPs", color=theme.text)
    left.set_ylabel("nll per token of held-out text, nats", color=theme.text)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9,
        labelcolor=theme.text,
    )  # fmt: skip
    return png(figure)


def _points(axes: Axes, rows: list[Mapping[str, Any]], key: str, colour: str, marker: str) -> None:
    """One model: a point per tier, joined."""
    mean = [row["nll"]["mean"] for row in rows]
    ends = [row["nll"]["ci95"] or [m, m] for row, m in zip(rows, mean, strict=True)]
    spread = [
        [m - low for m, (low, _) in zip(mean, ends, strict=True)],
        [high - m for m, (_, high) in zip(mean, ends, strict=True)],
    ]
    axes.errorbar(
        [row[key] for row in rows], mean, yerr=spread, fmt=f"{marker}-", color=colour,
        markersize=6, capsize=3, linewidth=1.3, label=rows[0]["name"],
    )  # fmt: skip
