"""OutcomeTable: what every tier did on every request; the one input of all routing analysis.

Columns are NumPy arrays over `N` requests and `T` tiers (base first). The table never holds a
prompt: text enters the TF-IDF baseline separately, by request id. On disk: JSON lines, one request
per line, NaN written as null.
"""

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
    # [N] mean nll of the base tier's own greedy answer (a cascade's signal); all NaN if not
    # collected
    uncertainty: FloatArray = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        num_requests = len(self.ids)
        if self.uncertainty.size == 0:
            object.__setattr__(self, "uncertainty", np.full(num_requests, np.nan))
        if self.quality.ndim != 2 or self.quality.shape[1] < 1:
            raise ValueError(f"quality must have shape [N, tiers], got {self.quality.shape}")
        expected: dict[str, tuple[int, ...]] = {
            name: (num_requests,)
            for name in ("level", "prompt_tokens", "difficulty", "uncertainty")
        }
        wide = (num_requests, self.num_tiers)
        expected |= {name: wide for name in ("quality", "nll", "completion_tokens")}
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

    def select(self, index: Sequence[int] | IntArray | npt.NDArray[np.bool_]) -> "OutcomeTable":
        """The given rows, in the given order (positions or a boolean mask)."""
        positions = np.arange(len(self))[np.asarray(index)]
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
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8") as file:
            for row in range(len(self)):
                file.write(json.dumps(self._record(row), allow_nan=False) + "\n")
        partial.replace(target)

    @classmethod
    def load_jsonl(cls, path: str | Path) -> "OutcomeTable":
        """Read what `save_jsonl` wrote. ValueError naming file and line for a row that does not
        fit.
        """
        names = [column.name if column.name != "ids" else "id" for column in fields(cls)]
        columns: dict[str, list[Any]] = {name: [] for name in names}
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not valid JSON ({error.msg})") from None
                if not isinstance(record, dict) or set(record) != set(names):
                    raise ValueError(f"{path}:{number}: a row must have exactly the fields {names}")
                for name in names:
                    columns[name].append(record[name])
        if not columns["id"]:
            raise ValueError(f"{path}: no rows")
        try:
            return cls(
                ids=[str(value) for value in columns["id"]],
                level=np.array(columns["level"], dtype=np.int64),
                kind=[str(value) for value in columns["kind"]],
                prompt_tokens=np.array(columns["prompt_tokens"], dtype=np.int64),
                quality=np.array(columns["quality"], dtype=np.float64),
                nll=np.array(columns["nll"], dtype=np.float64),  # None becomes NaN
                difficulty=np.array(columns["difficulty"], dtype=np.float64),
                completion_tokens=np.array(columns["completion_tokens"], dtype=np.int64),
                uncertainty=np.array(columns["uncertainty"], dtype=np.float64),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: rows do not form a table: {error}") from None

    def _record(self, row: int) -> dict[str, Any]:
        record: dict[str, Any] = {"id": self.ids[row]}
        for column in fields(self)[1:]:
            value = getattr(self, column.name)[row]
            record[column.name] = _plain(value.tolist() if hasattr(value, "tolist") else value)
        return record


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
