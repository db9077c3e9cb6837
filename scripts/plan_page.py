"""The planner benchmark's part of docs/benchmarks.md."""

from collections.abc import Mapping
from typing import Any


def plan_part(result: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """(text, head, rows) of `scripts/bench_plan.py`."""
    machine = result["machine"]
    text = (
        f"`python scripts/bench_plan.py`: `dvpa plan --train`'s predictions beside measured steps, "
        f"fp32, {result['threads']} thread(s), median of {result['steps']} steps. The machine was "
        f"measured in the same run: {machine['peak_flops'] / 1e9:.0f} GFLOP/s in a large product, "
        f"{result['experts_share_of_peak']:.0%} of it in the experts' products, "
        f"{machine['memory_bandwidth'] / 1e9:.1f} GB/s into fresh memory, "
        f"{1e3 * machine['layer_seconds']:.2f} ms a layer and pass before anything is computed. "
        "Kept: what autograd holds of the layers. Cells: predicted / measured = ratio. Memory "
        "is too high where gradients and activations never live together (one micro-batch a "
        "step), time where the optimizer updates in place what was taken to be fresh. This says "
        "nothing about all-to-all, gathered weights or GPUs: none has been measured."
    )
    head = ["run", "tokens a step", "step, s", "peak memory, MB", "kept, MB"]
    keys = (("step_seconds", 1.0), ("memory_bytes", 1e-6), ("saved_bytes", 1e-6))
    rows = []
    for row in result["rows"]:
        cells = []
        for key, unit in keys:
            said, found = unit * row["predicted"][key], unit * row["measured"][key]
            cells.append(f"{said:.3g} / {found:.3g} = **{said / found:.2f}**")
        rows.append([row["row"], f"{row['tokens']:,}", *cells])
    return text, head, rows
