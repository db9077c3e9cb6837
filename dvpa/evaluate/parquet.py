"""Outcome tables as Parquet: one row per request and tier, for DuckDB, pandas and the like.

Needs pyarrow (`pip install 'dvpa[parquet]'`). JSON Lines holds the same numbers, a request a line.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dvpa.evaluate.replacing import replacing
from dvpa.evaluate.table import COSTS, OutcomeTable

PER_TIER = ("quality", "nll", "completion_tokens", *COSTS)
PER_REQUEST = ("level", "kind", "prompt_tokens", "difficulty", "uncertainty")


def has_pyarrow() -> bool:
    """Whether Parquet can be written here."""
    return find_spec("pyarrow") is not None


def save_parquet(table: OutcomeTable, path: str | Path, tier_names: Sequence[str]) -> None:
    """Write atomically. ImportError without pyarrow; ValueError for other tiers than the table's.

    Columns: request, tier (index), tier_name, then the table's own. NaN stays NaN.
    """
    import pyarrow
    import pyarrow.parquet

    if len(tier_names) != table.num_tiers:
        raise ValueError(f"tier_names: {len(tier_names)} names, the table has {table.num_tiers}")
    size, num_tiers = len(table), table.num_tiers
    columns: dict[str, Any] = {
        "request": np.repeat(table.ids, num_tiers),
        "tier": np.tile(np.arange(num_tiers), size),
        "tier_name": np.tile(np.asarray(tier_names), size),
    }
    columns |= {name: np.repeat(getattr(table, name), num_tiers) for name in PER_REQUEST}
    columns |= {name: getattr(table, name).ravel() for name in PER_TIER}
    with replacing(path) as partial:
        pyarrow.parquet.write_table(pyarrow.table(columns), partial)


def load_parquet(path: str | Path) -> OutcomeTable:
    """Read what `save_parquet` wrote.

    Raises:
        ImportError: pyarrow is missing.
        ValueError: not such a file; a request without one of the tiers, or with one twice.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"{path}: reading Parquet needs pyarrow: pip install 'dvpa[parquet]'"
        ) from None
    try:
        read = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: {error}") from None
    missing = {"request", "tier", *PER_REQUEST, *PER_TIER} - set(read.column_names)
    if missing:
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}")
    data = {name: read.column(name).to_pylist() for name in read.column_names}
    num_tiers = max(data["tier"], default=-1) + 1
    rows: dict[str, dict[int, int]] = {}
    for at, (request, tier) in enumerate(zip(data["request"], data["tier"], strict=True)):
        if rows.setdefault(request, {}).setdefault(tier, at) != at:
            raise ValueError(f"{path}: request {request!r} has tier {tier} twice")
    if not rows:
        raise ValueError(f"{path}: no rows")
    for request, by_tier in rows.items():
        lacking = sorted(set(range(num_tiers)) - set(by_tier))
        if lacking:
            raise ValueError(f"{path}: request {request!r}: tier {lacking[0]} is missing")
    first = [by_tier[0] for by_tier in rows.values()]
    columns: dict[str, Any] = {"id": list(rows)}
    columns |= {name: [data[name][at] for at in first] for name in PER_REQUEST}
    for name in PER_TIER:
        columns[name] = [[data[name][by[t]] for t in range(num_tiers)] for by in rows.values()]
    return OutcomeTable.from_columns(columns, str(path))
