"""Several single-seed reports -> one: means, intervals over seeds, the values of every seed.

Two intervals, because they answer different questions. `ci95` treats the training seed as the
random unit: a t interval over the seeds' means, which also holds the noise of each seed's test
requests. `ci95_requests` holds these very checkpoints fixed: the seeds' bootstrap standard errors
pooled, a stratified bootstrap over requests in normal form.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t

# Statistics of one seed that a mean over seeds would misrepresent; they are recomputed or dropped.
_INTERVALS = ("ci95", "standard_error")
# Taken from the first report as they are.
_VERBATIM = ("environment", "samples", "levels", "title", "notes", "budget", "num_requests")


def aggregate_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean report over seeds with the schema of a single one; `seeds` and per-seed `quality` are
    listed.

    `wall_seconds` is the sum. ValueError for no reports, or reports whose tiers or routers differ.
    """
    if not reports:
        raise ValueError("reports must hold at least one report")
    first = reports[0]
    for key in ("tiers", "routers"):
        shapes = [_names(report[key]) for report in reports]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"reports must have the same {key}, got {shapes}")
    verbatim = {key: first[key] for key in _VERBATIM if key in first}
    special = {*verbatim, "routers", "seeds", "wall_seconds"}
    shared = [key for key in first if key not in special and all(key in r for r in reports)]
    result: dict[str, Any] = {key: _mean([report[key] for report in reports]) for key in shared}
    result["routers"] = {
        name: _router([report["routers"][name] for report in reports]) for name in first["routers"]
    }
    result |= verbatim
    result["seeds"] = [seed for report in reports for seed in report["seeds"]]
    walls = [report["wall_seconds"] for report in reports if report.get("wall_seconds") is not None]
    result["wall_seconds"] = float(sum(walls)) if walls else None
    apgrs = [report.get("apgr") for report in reports]
    result["apgr_per_seed"] = apgrs
    return {key: result[key] for key in [*first, *result] if key in result}


def _router(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    plain = [
        {key: value for key, value in row.items() if key not in (*_INTERVALS, "adaptive_minus")}
        for row in rows
    ]
    result: dict[str, Any] = _mean(plain)
    result |= _intervals([row["quality"] for row in rows], rows)
    result["quality_per_seed"] = [row["quality"] for row in rows]
    if all("adaptive_minus" in row for row in rows):
        pairs = [row["adaptive_minus"] for row in rows]
        values = [pair["difference"] for pair in pairs]
        result["adaptive_minus"] = {
            "difference": float(np.mean(values)),
            **_intervals(values, pairs),
            "difference_per_seed": values,
        }
    return result


def _intervals(values: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`ci95` over seeds and `ci95_requests` with the seeds fixed; one seed keeps its own bootstrap
    interval.
    """
    if len(values) == 1:
        return {key: rows[0][key] for key in _INTERVALS if key in rows[0]}
    mean, count = float(np.mean(values)), len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(student_t.ppf(0.975, count - 1)) * error
    result: dict[str, Any] = {"ci95": [mean - half, mean + half], "standard_error": error}
    errors = [row.get("standard_error") for row in rows]
    if all(value is not None for value in errors):
        pooled = 1.959964 * math.sqrt(sum(float(value or 0.0) ** 2 for value in errors)) / count
        result["ci95_requests"] = [mean - pooled, mean + pooled]
    return result


def _mean(values: Sequence[Any]) -> Any:
    """Element-wise mean of equally shaped nested values; None where any seed's number is undefined,
    the common value of other leaves.
    """
    head = values[0]
    if all(isinstance(value, Mapping) for value in values):
        shared = [key for key in head if all(key in value for value in values)]
        return {key: _mean([value[key] for value in values]) for key in shared}
    if all(isinstance(value, list) and len(value) == len(head) for value in values):
        return [_mean(list(items)) for items in zip(*values, strict=True)]
    if all(value is None or _is_number(value) for value in values):
        if any(value is None or not math.isfinite(value) for value in values):
            return None  # a mean over the seeds where it happens to be defined would flatter
        same = all(isinstance(value, int) and value == head for value in values)
        return head if same else float(np.mean(values))
    return head if all(value == head for value in values) else list(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(section: Any) -> list[str]:
    return [tier["name"] for tier in section] if isinstance(section, list) else sorted(section)
