"""The training benchmark's part of docs/benchmarks.md."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "dvpa": "dvpa, top tier alone",
    "transformers eager": "Transformers' Trainer, the same tier, eager",
    "transformers grouped_mm": "Transformers' Trainer, the same tier, grouped_mm",
    "dvpa joint": "dvpa, joint step: top tier and a lower one",
}


def training_part(result: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """(text, head, rows) of `scripts/bench_training.py`."""
    unusable = "".join(
        f" `{name}` does not train: {reason}."
        for name, reason in result["experts_unusable"].items()
    )
    ours, theirs = result["first_losses"]
    text = (
        f"`python scripts/bench_training.py`: {result['model']} "
        f"({result['total_params'] / 1e6:.3g}M parameters), {result['examples']} x "
        f"{result['length']} tokens a step, {result['precision']}, {result['device']}, "
        f"{result['threads']} thread(s); medians of {result['rounds']} interleaved rounds of "
        f"{result['steps']} steps. Same weights, tokens, labels, fused AdamW and clipping in the "
        f"rows but the last; first losses {ours:.5f} and {theirs:.5f}.{unusable} Against the "
        f"faster of Transformers' implementations, `{result['experts_implementation']}`: "
        f"**{result['ratio']['tokens_per_second']:.2f}x** the tokens per second of wall time, "
        f"**{result['ratio']['tokens_per_cpu_second']:.2f}x** of CPU time. The joint step runs "
        "every example twice and distils; its tokens are cheaper, since lower tiers activate less."
    )
    head = ["training", "step, s", "CPU s", "tokens/s", "GFLOP a step", "GFLOP/s"]
    if result["peak_flops"] is not None:
        head.append("MFU")
    rows = []
    for name, row in result["rows"].items():
        flops = row["flops_per_step"] / 1e9
        cells = [
            NAMES[name],
            f"{row['step_seconds']:.3f}",
            f"{row['cpu_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{flops:.1f}",
            f"{flops / row['step_seconds']:.1f}",
        ]
        if result["peak_flops"] is not None:
            cells.append(f"{row['mfu']:.1%}")
        rows.append(cells)
    return text, head, rows
