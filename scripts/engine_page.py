"""The engine benchmarks' part of docs/benchmarks.md: tables and the figure."""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dvpa.evaluate.figure import LIGHT

FIGURE = "engine.png"
Row = Mapping[str, Any]
Part = tuple[str, list[str], list[list[str]]]


def engine_parts(result: Row) -> list[Part]:
    """(text, head, rows) of every table of `scripts/bench_engine.py`."""
    return [_throughput(result), _mixed(result), _limits(result), _context(result)]


def soak_text(result: Row) -> str:
    """What `scripts/soak_engine.py` found, in a paragraph."""
    ends = ", ".join(f"{count:,} {name}" for name, count in result["finish_reasons"].items())
    problems = "; ".join(result["problems"]) or "none"
    return (
        f"`python scripts/soak_engine.py`: {result['minutes']:g} minutes of random arrivals at "
        f"{result['overload']:g} times the measured capacity, one thread, a small random model: "
        f"{result['requests']:,} requests ({result['completions']:,} completions: {ends}), "
        f"{result['refused']:,} refused by the bounded queue, {result['preemptions']} "
        f"preemptions, {result['escalations']} escalations, {result['lowered_by_load']} lowered by "
        f"load. Lost: {result['lost']}; pages still held: {result['held_pages']}; longest queue: "
        f"{result['longest_queue']} ({result['max_queue']} may wait, preempted requests come on "
        f"top); memory from the first quarter on: {result['growth_mib']:+.1f} MiB. Problems: "
        f"{problems}."
    )


def speculation_rows(result: Row) -> tuple[list[str], list[list[str]]]:
    """The table of `scripts/bench_speculation.py`."""
    head = ["batch", "drafted at a time", "accepted", "same tokens", "wall, of plain", "FLOPs"]
    rows = [
        [
            str(row["batch"]),
            str(row["length"]) if row["length"] else "plain",
            "" if row["acceptance"] is None else f"{row['acceptance']:.0%}",
            f"{row['same_outputs']} of {row['batch']}",
            f"{row['wall_ratio']:.2f}",
            f"{row['flops_ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    return head, rows


def _throughput(result: Row) -> Part:
    rows = result["throughput"]
    ours = {row["concurrency"]: row for row in rows if row["contender"] == "dvpa"}
    body = [
        [
            str(row["concurrency"]),
            f"**{row['contender']}**" if row["contender"] == "dvpa" else row["contender"],
            f"{row['tok_s']:.1f}" + (" (disturbed)" if row["is_disturbed"] else ""),
            f"{row['tok_cpu_s']:.1f}",
            str(len(row["each_tok_s"])),
            f"{ours[row['concurrency']]['tok_s'] / row['tok_s']:.2f}",
        ]
        for row in sorted(rows, key=lambda row: (row["concurrency"], row["contender"]))
        if row["concurrency"] in ours
    ]
    agreement = ", ".join(f"{name} {share:.0%}" for name, share in result["agreement"].items())
    left_out = "".join(f" Left out: {name} ({why})." for name, why in result["left_out"].items())
    model = result["model"]
    text = (
        f"`python scripts/bench_engine.py --vllm-python ...`: a random model of "
        f"{model['total_params'] / 1e6:.0f}M parameters ({model['config']}), everyone at its top "
        f"tier, bf16, {result['threads']} threads, {result['input']} tokens in, "
        f"{result['output']} out, greedy; output tokens over wall time, prompts included; medians "
        f"of interleaved rounds, the slowest contenders in the first one only.{left_out}"
    )
    if agreement:
        text += f" First tokens like Transformers' (rounding decides near-ties): {agreement}."
    if result.get("notes"):
        text += f" {result['notes']}"
    head = ["at a time", "engine", "tok/s", "tok/CPU-s", "rounds", "dvpa is faster by"]
    return text, head, body


def _mixed(result: Row) -> Part:
    rows = [
        [
            str(row["concurrency"]),
            f"{row['top_tok_s']:.1f}",
            f"{row['mixed_tok_s']:.1f}",
            f"{row['throughput_ratio']:.2f}",
            f"{1 / row['activated_ratio']:.2f}",
            f"{row['saving_realised']:.0%}",
        ]
        for row in result["mixed"]
    ]
    text = (
        "70 % of requests at the base tier, 20 % in the middle, 10 % at the top, against all at "
        "the top; four times as many requests as run at a time. Saving realised: time saved over "
        "activated parameters saved. It can exceed 100 %: a step reads the weights of the experts "
        "that are touched, and those become fewer faster than the parameters of a token."
    )
    head = ["at a time", "all top, tok/s", "mixed, tok/s", "ratio", "by parameters", "realised"]
    return text, head, rows


def _limits(result: Row) -> Part:
    rows = [
        [
            str(row["batch"]),
            f"{row['experts_touched']:.0f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['limit_ms']:.1f}",
            f"{row['step_ms']:.1f}",
            f"{row['fraction']:.2f}",
        ]
        for row in result["limits"]
    ]
    text = (
        f"A decode step beside the time that reading its weights and cache takes at "
        f"{result['measured']['bandwidth_gb_s']:.1f} GB/s, the best this machine read at."
    )
    head = ["batch", "experts touched", "MB read", "limit, ms", "step, ms", "fraction of limit"]
    return text, head, rows


def _context(result: Row) -> Part:
    rows = [
        [
            str(row["batch"]),
            f"{row['intercept_ms']:.1f}",
            f"{row['ms_per_1k']:.2f}",
            f"{row['cache_ms_per_1k']:.2f}",
            f"{row['r2']:.3f}",
            f"{row['last_slope_ratio']:.2f}",
        ]
        for row in result["context_lines"]
    ]
    text = (
        "Time of a decode step against context, up to 8k: the line through all points. Last "
        "column: slope of the longest stretch over the whole line's (above 1: faster than linear)."
    )
    head = ["batch", "ms at 0", "ms per 1k", "reading the cache alone", "R^2", "last slope"]
    return text, head, rows


def engine_png(result: Row) -> bytes:
    """Decode step against batch size and against context, side by side."""
    figure = Figure(figsize=(9.6, 3.9), facecolor=LIGHT.background, layout="constrained")
    left, right = figure.subplots(1, 2)
    points = [row for row in result["decode"] if row["case"] == "batch"]
    sizes = [row["concurrency"] for row in points]
    left.plot(sizes, [row["step_ms"] for row in points], "o-", color=LIGHT.adaptive, label="dvpa")
    limits = result["limits"]
    left.plot(
        [row["batch"] for row in limits],
        [row["limit_ms"] for row in limits],
        "D--",
        color=LIGHT.muted,
        label="reading weights and cache",
    )
    _dress(left, "requests in the step", "Decode step against batch size")
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [str(size) for size in sizes])
    colours = (LIGHT.adaptive, LIGHT.length)
    for line, colour in zip(result["context_lines"], colours, strict=False):
        batch = line["batch"]
        found = [
            row
            for row in result["decode"]
            if row["case"] == "context" and row["concurrency"] == batch
        ]
        contexts = [row["context"] for row in found]
        right.plot(contexts, [row["step_ms"] for row in found], "o", color=colour)
        ends = [0.0, max(contexts)]
        right.plot(
            ends,
            [line["intercept_ms"] + line["ms_per_1k"] * end / 1e3 for end in ends],
            "-",
            color=colour,
            label=f"batch {batch}, $R^2$ = {line['r2']:.3f}",
        )
    _dress(right, "positions in the cache", "Decode step against context")
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def _dress(axes: Axes, label: str, title: str) -> None:
    axes.set_title(title, color=LIGHT.text, fontsize=10)
    axes.set_xlabel(label, color=LIGHT.text, fontsize=10)
    axes.set_ylabel("ms", color=LIGHT.text, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(color=LIGHT.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT.text, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(LIGHT.muted)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=LIGHT.text)
