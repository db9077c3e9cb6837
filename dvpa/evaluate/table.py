"""OutcomeTable: what every tier did on every request; the one input of all routing analysis.

Columns are NumPy arrays over `N` requests and `T` tiers (base first). The table never holds a
prompt: text enters the TF-IDF baseline separately, by request id. On disk: JSON lines, one request
per line, NaN written as null; or Parquet, one row per request and tier (parquet.py).
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.evaluate.replacing import replacing

COSTS = ("activated_params", "flops", "ms")  # columns [N, T]
OPTIONAL = ("uncertainty", *COSTS)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class OutcomeTable:
    """Per-request, per-tier outcomes. Shapes are checked at construction (ValueError)."""

    ids: list[str]  # stable task ids
    level: IntArray  # [N] graded level of the task, 0 easiest
    kind: list[str]  # task kind
    prompt_tokens: IntArray  # [N] including bos
    quality: FloatArray  # [N, T] in [0, 1]
    nll: FloatArray  # [N, T] mean nats per reference token
    difficulty: FloatArray  # [N] raw head output; NaN where the model has no head
    completion_tokens: IntArray  # [N, T] tokens the quality was measured on, eos included
    # From here on all NaN where not collected.
    # [N] mean nll of the base tier's own greedy answer (a cascade's signal)
    uncertainty: FloatArray = field(default_factory=lambda: np.empty(0))
    # [N, T] what answering at each tier took: mean activated parameters of the request's tokens,
    # scoring left out; FLOPs and milliseconds of the whole request, scoring included
    activated_params: FloatArray = field(default_factory=lambda: np.empty(0))
    flops: FloatArray = field(default_factory=lambda: np.empty(0))
    ms: FloatArray = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        num_requests = len(self.ids)
        if self.quality.ndim != 2 or self.quality.shape[1] < 1:
            raise ValueError(f"quality must have shape [N, tiers], got {self.quality.shape}")
        expected: dict[str, tuple[int, ...]] = {
            name: (num_requests,)
            for name in ("level", "prompt_tokens", "difficulty", "uncertainty")
        }
        wide = (num_requests, self.num_tiers)
        expected |= dict.fromkeys(("quality", "nll", "completion_tokens", *COSTS), wide)
        for name in OPTIONAL:
            if getattr(self, name).size == 0:
                object.__setattr__(self, name, np.full(expected[name], np.nan))
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")
        if len(self.kind) != num_requests:
            raise ValueError(f"kind must have {num_requests} entries, got {len(self.kind)}")
        if not bool(np.all((self.quality >= 0) & (self.quality <= 1))):
            raise ValueError("quality must lie in [0, 1] and hold no NaN")

    @property
    def num_tiers(self) -> int:
        """Number of tiers, T."""
        return int(self.quality.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> IntArray:
        """[N, T] tokens that pass through the model: the last one is produced, not read."""
        return np.asarray(self.prompt_tokens[:, None] + self.completion_tokens - 1)

    def select(self, index: Sequence[int] | IntArray | npt.NDArray[np.bool_]) -> "OutcomeTable":
        """The given rows, in the given order (positions or a boolean mask)."""
        chosen = np.asarray(index)
        positions = np.arange(len(self))[chosen if chosen.size else chosen.astype(np.intp)]
        columns: dict[str, Any] = {}
        for column in fields(self):
            value = getattr(self, column.name)
            columns[column.name] = (
                [value[i] for i in positions] if isinstance(value, list) else value[positions]
            )
        return OutcomeTable(**columns)

    def split(self, seed: int, fractions: Sequence[float]) -> tuple["OutcomeTable", ...]:
        """Disjoint random parts of the given sizes (positive fractions, sum at most 1), the same
        for the same seed.
        """
        if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
            raise ValueError(f"fractions must be positive with a sum <= 1, got {list(fractions)}")
        order = np.random.default_rng(seed).permutation(len(self))
        cuts = np.round(np.cumsum([0.0, *fractions]) * len(self)).astype(int)
        return tuple(self.select(order[start:stop]) for start, stop in itertools.pairwise(cuts))

    def save_jsonl(self, path: str | Path) -> None:
        """Write atomically: a reader sees the old file or the whole new one."""
        with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
            for row in range(len(self)):
                file.write(json.dumps(self.record(row), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "OutcomeTable":
        """Read JSON Lines or, by its ending, Parquet; errors as in `load_jsonl`, `load_parquet`."""
        if Path(path).suffix != ".parquet":
            return cls.load_jsonl(path)
        from dvpa.evaluate.parquet import load_parquet

        return load_parquet(path)

    @classmethod
    def load_jsonl(cls, path: str | Path) -> "OutcomeTable":
        """Read what `save_jsonl` wrote. ValueError naming file and line for a row that does not
        fit, a request that comes twice, or one that lacks a tier.
        """
        known = {"id", *(column.name for column in fields(cls)[1:])}
        columns: dict[str, list[Any]] = {name: [] for name in known}
        lines: dict[str, int] = {}
        num_tiers = 0
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not valid JSON ({error.msg})") from None
                names = set(record) if isinstance(record, dict) else set()
                if not known - set(OPTIONAL) <= names <= known:
                    raise ValueError(f"{where}: a row must have exactly the fields {sorted(known)}")
                key = str(record["id"])
                if key in lines:
                    raise ValueError(f"{where}: request {key!r} stands in line {lines[key]} too")
                lines[key] = number
                num_tiers = num_tiers or _length(record["quality"])
                _check_tiers(where, record, num_tiers)
                for name in known:
                    missing = [None] * num_tiers if name in COSTS else None
                    columns[name].append(record.get(name, missing))
        if not columns["id"]:
            raise ValueError(f"{path}: no rows")
        return cls.from_columns(columns, str(path))

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any]], where: str) -> "OutcomeTable":
        """A table of lists, None standing for NaN; "id" holds the ids.

        ValueError naming `where` if they do not form one.
        """
        whole = ("level", "prompt_tokens", "completion_tokens")
        texts = {"id", "kind"}
        try:
            arrays: dict[str, Any] = {
                name: np.array(values, dtype=np.int64 if name in whole else np.float64)
                for name, values in columns.items()
                if name not in texts
            }
            ids, kind = ([str(value) for value in columns[name]] for name in ("id", "kind"))
            return cls(ids=ids, kind=kind, **arrays)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: rows do not form a table: {error}") from None

    def record(self, row: int) -> dict[str, Any]:
        """One request as a line of the file holds it."""
        record: dict[str, Any] = {"id": self.ids[row]}
        for column in fields(self)[1:]:
            value = getattr(self, column.name)[row]
            record[column.name] = _plain(value.tolist() if hasattr(value, "tolist") else value)
        return record


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _check_tiers(where: str, record: Mapping[str, Any], num_tiers: int) -> None:
    for name in ("quality", "nll", "completion_tokens", *COSTS):
        found = _length(record.get(name, [None] * num_tiers))
        if found != num_tiers or not num_tiers:
            raise ValueError(
                f"{where}: {name} has {found} tiers, not {num_tiers}: a tier is missing"
            )


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
