"""The assembly benchmark's part of docs/benchmarks.md."""

from collections.abc import Mapping
from typing import Any

Part = tuple[str, list[str], list[list[str]]]


def assemble_parts(result: Mapping[str, Any]) -> list[Part]:
    """(text, head, rows) of `scripts/bench_assemble.py`: time, then memory by size."""
    parts = [(_time_text(result), *_time_table(result))]
    if result["sizes"]:
        parts.append((_memory_text(result), *_memory_table(result)))
    return parts


def _time_text(result: Mapping[str, Any]) -> str:
    parents, disk, fp8 = result["parents"], result["disk_medians"], result["fp8"]
    exact, peer = result["exactness"], result["mergekit"]
    ours = result["medians"]["dvpa"]
    loop = ours["wall_s"] - result["start_up_s"]
    text = (
        f"`python scripts/bench_assemble.py`: 0.6 A + 0.4 B of two parents of {parents['gb']:.2f} GB "
        f"(bf16, {parents['tensors']:,} tensors, {parents['shards']} shards; {parents['made_by']}), "
        f"page cache warm, whole commands, median of {result['rounds']} interleaved rounds; load "
        f"{result['load']:.1f} at the end. The disk's bound is dd of the same minute: both parents "
        f"read in {disk['read_s']:.2f} s, a result written and synced in {disk['write_s']:.2f} s. "
        f"dvpa's start-up (a merge of next to nothing) takes {result['start_up_s']:.2f} s; what is "
        f"left is **{loop / disk['bound_s']:.2f} times** the bound. Of {exact['elements']:,} elements "
        f"{exact['differing']:,} differ from the fp32 formula rounded to bf16 (by "
        f"{exact['largest_ulp']} units in the last place at most)"
    )
    if peer is None:
        return f"{text}. mergekit was not installed."
    return (
        f"{text}, and {peer['differing']:,} from mergekit {peer['version']}'s result, whose experts "
        "are packed. FP8 parents in DeepSeek-V3's format "
        f"({fp8['gb']:.2f} GB, {fp8['tensors']:,} tensors), 0.5 A + 0.5 B: {fp8['wall_s']:.1f} s, "
        f"PyTorch's import included; mean relative error against the exact interpolation "
        f"{fp8['mean_error']:.2%} over all FP8 tensors ({fp8['mean_error_of_merged']:.2%} over those "
        f"that differ, {fp8['largest_error']:.2%} at most), E4M3's own rounding. mergekit reads no "
        "FP8 scales."
    )


def _time_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    ours = result["medians"]["dvpa"]
    head = ["", "wall s", "CPU s", "peak anonymous MB", "wall / dvpa", "wall of each round"]
    rows = []
    for name, row in result["medians"].items():
        rounds = ", ".join(f"{each['wall_s']:.1f}" for each in result["rows"][name])
        rows.append(
            [
                f"**{name}**" if name == "dvpa" else name,
                f"{row['wall_s']:.2f}",
                f"{row['cpu_s']:.2f}",
                f"{row['anon_mb']:.0f}",
                f"**{row['wall_s'] / ours['wall_s']:.1f}**",
                rounds,
            ]
        )
    return head, rows


def _memory_text(result: Mapping[str, Any]) -> str:
    first = result["sizes"][0]["anon_mb"]
    largest = max(row["anon_mb"] for row in result["sizes"])
    return (
        "Memory by size (made by `scripts/assemble_parents.py`): the largest peak is "
        f"{largest / first - 1:+.0%} of the first row's. What grows is the list of tensors, "
        "not the data."
    )


def _memory_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["parents", "GB each", "tensors", "peak anonymous MB", "wall s", "MB/s written"]
    rows = [
        [
            row["parents"],
            f"{row['gb']:.2f}",
            f"{row['tensors']:,}",
            f"{row['anon_mb']:.0f}",
            f"{row['wall_s']:.1f}",
            f"{1e3 * row['gb'] / row['wall_s']:.0f}",
        ]
        for row in result["sizes"]
    ]
    return head, rows
