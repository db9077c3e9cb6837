"""The assembling benchmark's part of docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from typing import Any

Part = tuple[str, list[str], list[list[str]]]


def assemble_parts(result: Mapping[str, Any]) -> list[Part]:
    """(text, head, rows) for each part of `scripts/bench_assemble.py` that was run."""
    parts = []
    if "merge" in result:
        parts.append(_merge_part(result["merge"], "in the page cache"))
    if "cold" in result:
        parts.append(_merge_part(result["cold"], "put out of the page cache before each command"))
    if result.get("sizes"):
        parts.append(_sizes_part(result["sizes"]))
    if "fp8" in result:
        parts.append(_fp8_part(result["fp8"], result.get("rounding")))
    return parts


def _merge_part(merge: Mapping[str, Any], where: str) -> Part:
    parents, exact, peer = merge["parents"], merge["exactness"], merge["mergekit"]
    text = (
        "`python scripts/bench_assemble.py --mergekit PROGRAM`: 0.6 A + 0.4 B of two bf16 parents "
        f"of {parents['gb']:.3g} GB ({parents['tensors']:,} tensors, {parents['shards']} shards, "
        f"{where}), medians of {merge['rounds']} interleaved rounds; whole commands, "
        "start-up included. The bound is dd's, run right before each command: read both parents, "
        f"write and sync one. dvpa beyond its start-up ({merge['start_up_s']:.2f} s) takes "
        f"**{merge['over_bound']:.2f}x** that bound, hashing included. Of {exact['elements']:,} "
        f"elements {exact['differing']:,} differ from the fp32 formula rounded to bf16 (largest: "
        f"{exact['largest_ulp']} units in the last place)."
    )
    if peer is None:
        text += " mergekit was not there to be measured."
    else:
        text += (
            f" **{peer['times_faster']:.1f}x** faster than mergekit {peer['version']} as it was "
            f"fastest ({peer['fastest']}; its imports alone take {peer['import_s']['wall_s']:.1f} "
            f"s); {peer['differing'] / peer['elements']:.1e} of its elements differ from ours."
        )
    head = ["command", "wall s", "CPU s", "peak anonymous MB", "dd's bound s", "wall s, each round"]
    rows = [
        [
            name,
            f"{row['wall_s']:.2f}",
            f"{row['cpu_s']:.2f}",
            f"{row['anon_mb']:,.0f}",
            f"{row['bound_s']:.2f}",
            ", ".join(f"{each['wall_s']:.1f}" for each in merge["rows"][name]),
        ]
        for name, row in merge["medians"].items()
    ]
    return text, head, rows


def _sizes_part(sizes: list[Mapping[str, Any]]) -> Part:
    peaks = [row["anon_mb"] for row in sizes]
    spread = max(peaks) / min(peaks) - 1
    text = (
        "Memory by size of the parents. Data is read by the megabyte, headers lie in a database on "
        f"the disk, so neither bytes nor tensors matter: the peaks are within {spread:.1%} of each "
        "other."
    )
    head = ["parents", "GB each", "tensors", "peak anonymous MB"]
    rows = [
        [row["parents"], f"{row['gb']:.2f}", f"{row['tensors']:,}", f"{row['anon_mb']:.1f}"]
        for row in sizes
    ]
    return text, head, rows


def _fp8_part(fp8: Sequence[Mapping[str, Any]], rounding: Mapping[str, Any] | None) -> Part:
    text = (
        "0.5 A + 0.5 B of two FP8 parents in DeepSeek-V3's format, whose experts are 10 % apart; "
        "the result against the exact interpolation of the dequantised parents (relative "
        "Frobenius). Every code is the nearest one, under the scale of each block that leaves the "
        "least error; the error is E4M3's three bits of mantissa."
    )
    if rounding is not None:
        errors = ", ".join(
            f"{error['least']:.1%} ({error['largest']:.1%}) at {float(distance):.1%}"
            for distance, error in rounding["by_distance"].items()
        )
        normal = rounding["normal_values"]
        text += (
            f" They cost normal values {normal['least']:.1%} ({normal['largest']:.1%} where every "
            "block's largest value becomes 448). The middle of two FP8 matrices loses less when "
            "they are close, since most codes agree under the same scale, and would lose more "
            f"where it often falls halfway between two codes: {errors} of distance."
        )
    head = ["parents", "GB each", "tensors", "wall s", "peak anonymous MB"]
    head += ["mean error", "merged alone", "largest"]
    rows = [
        [
            row["parents"],
            f"{row['gb']:.2f}",
            f"{row['tensors']:,}",
            f"{row['wall_s']:.1f}",
            f"{row['anon_mb']:.0f}",
            f"{row['mean_error']:.2%}",
            f"{row['mean_error_of_merged']:.2%}",
            f"{row['largest_error']:.2%}",
        ]
        for row in fp8
    ]
    return text, head, rows
