"""What `dvpa serve` writes to stderr, read back: routed requests and shadow outcomes.

Lines that are no JSON object, and objects that are neither, are passed over and counted: a log also
holds warnings and refused requests.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.tiers.record import SHADOW_EVENT

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_REQUEST = ("tier", "difficulty", "prompt_tokens", "completion_tokens", "queue_ms", "total_ms")
_SHADOW = ("difficulty", "prompt_tokens", "completion_tokens", "agreement", "nll")
Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ServerLog:
    """N routed requests, in the order they ended, and M shadow outcomes; T tiers."""

    difficulty: FloatArray  # [N]
    tier: IntArray  # [N] where each ended
    prompt_tokens: IntArray  # [N]
    completion_tokens: IntArray  # [N]
    ms: FloatArray  # [N] without the queue
    shadow_difficulty: FloatArray  # [M]
    agreement: FloatArray  # [M, T] with the top tier's greedy answer
    nll: FloatArray  # [M, T] of that answer
    num_unscored: int  # requests without a difficulty: a tier was named, or there is no head
    num_other: int  # lines that are neither

    def __len__(self) -> int:
        return len(self.difficulty)

    @property
    def tokens(self) -> IntArray:
        """[N] tokens that passed through the model: the last one is produced, not read."""
        return self.prompt_tokens + np.maximum(self.completion_tokens - 1, 0)

    def shadow_quality(self, by_nll: bool) -> FloatArray:
        """[M, T]: agreement with the top tier's answer, or exp(-(nll_t - nll_top)+)."""
        if not by_nll:
            return self.agreement
        return np.exp(-np.maximum(self.nll - self.nll[:, -1:], 0.0))


def read_server_logs(
    paths: Sequence[str | Path], num_tiers: int, last: int | None = None
) -> ServerLog:
    """Read logs in the order given; `last`: only so many of the newest routed requests.

    Shadow outcomes older than those are left out with them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: `last` is below 1, a line of ours whose values are not as they should be (file
            and line), or not one routed request.
    """
    if last is not None and last < 1:
        raise ValueError(f"last: {last} must be 1 or more")
    requests: list[Row] = []
    shadows: list[tuple[int, Row]] = []  # with the number of requests before it
    num_unscored = num_other = 0
    for where, row in _objects(paths):
        if row is None:
            num_other += 1
        elif row.get("event") == SHADOW_EVENT:
            shadows.append((len(requests), _checked(where, row, _SHADOW, num_tiers)))
        elif not set(_REQUEST) <= set(row):
            num_other += 1
        elif row["difficulty"] is None:
            num_unscored += 1
        else:
            requests.append(_checked(where, row, _REQUEST, num_tiers))
    if not requests:
        names = ", ".join(str(path) for path in paths)
        raise ValueError(f"{names}: no request that the policy routed ({num_other} other lines)")
    first = 0 if last is None else max(len(requests) - last, 0)
    requests, kept = requests[first:], [row for at, row in shadows if at >= first]
    wide = (len(kept), num_tiers)
    return ServerLog(
        difficulty=_floats(requests, "difficulty"),
        tier=_integers(requests, "tier"),
        prompt_tokens=_integers(requests, "prompt_tokens"),
        completion_tokens=_integers(requests, "completion_tokens"),
        ms=_floats(requests, "total_ms") - _floats(requests, "queue_ms"),
        shadow_difficulty=_floats(kept, "difficulty"),
        agreement=_floats(kept, "agreement").reshape(wide),
        nll=_floats(kept, "nll").reshape(wide),
        num_unscored=num_unscored,
        num_other=num_other,
    )


def _objects(paths: Iterable[str | Path]) -> Iterable[tuple[str, Row | None]]:
    """Each line's place, and the object on it; None for anything else."""
    for path in paths:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line) if line.lstrip().startswith("{") else None
                except (ValueError, RecursionError):
                    row = None
                yield f"{path}:{number}", row if isinstance(row, dict) else None


def _checked(where: str, row: Row, names: Sequence[str], num_tiers: int) -> Row:
    for name in names:
        value = row.get(name)
        lowest, highest = 0.0, float("inf")
        if name in ("difficulty", "agreement"):
            highest = 1.0
        elif name == "tier":
            highest = num_tiers - 1.0
        values = [value]
        if name in ("agreement", "nll"):
            values = value if isinstance(value, list) and len(value) == num_tiers else [None]
        if not all(_is_within(v, lowest, highest) for v in values):
            raise ValueError(
                f"{where}: {name}: {str(value)[:60]} is not from this checkpoint, of {num_tiers} "
                "tiers"
            )
    return row


def _is_within(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and low <= value <= high


def _floats(rows: Sequence[Row], name: str) -> FloatArray:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _integers(rows: Sequence[Row], name: str) -> IntArray:
    return np.array([row[name] for row in rows], dtype=np.int64)
