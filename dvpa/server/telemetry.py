"""What finished requests tell: the last ones as a list and as sums, metrics, drift, an access log.

A record holds no prompt and no output, so nothing here can give one away; JSON escapes whatever a
client may have put into its request id. Called from the event loop's thread only.

The sums of a snapshot are over the ring: one NumPy row for each completion in it, so that a poll
stays cheap with any size.
"""

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry

from dvpa.pricing import ModelPrice
from dvpa.server.backend import EngineStats, ModelInfo
from dvpa.server.metrics import ANSWERED, SHADOWS, Metrics, activated_params
from dvpa.tiers.drift import NUM_BINS, Drift
from dvpa.tiers.record import DECIDED_BY, ShadowRecord, TelemetryRecord
from dvpa.tiers.tier_map import TierMap

SCHEMA_VERSION = 1
BUCKET_SECONDS = 2
NUM_BUCKETS = 60

access_logger = logging.getLogger("dvpa.access")
_LOGGED = (
    "tier",
    "tier_name",
    "difficulty",
    "decided_by",
    "activated_params",
    "flops",
    "prompt_tokens",
    "completion_tokens",
    "escalations",
    "queue_ms",
    "score_ms",
    "ttft_ms",
    "total_ms",
)
_ROW = np.dtype(
    [
        ("tier", np.int64),
        ("decided_by", np.int64),  # index into DECIDED_BY
        ("tokens", np.int64),
        ("flops", np.float64),
        ("flops_always_top", np.float64),
        ("activated", np.float64),  # summed over the tokens
        ("ttft_ms", np.float64),  # NaN: there was no token
        ("total_ms", np.float64),
    ]
)
Rows = npt.NDArray[np.void]


@dataclass(frozen=True)
class Finished:
    """One completion that has ended, whatever way; a request with n = 3 has three of them.

    `finished_at` is seconds of `time.time`; `endpoint` the route's path, not what the client sent;
    `max_tokens` 0 where the context alone sets an end.
    """

    record: TelemetryRecord
    finish_reason: str
    endpoint: str
    is_stream: bool
    model: str
    status: int
    finished_at: float
    max_tokens: int
    n: int


def flops_always_top(event: Finished, price: ModelPrice) -> float:
    """FLOPs the completion would have taken at the top tier, nothing cached.

    The n completions of a prompt share its reading. One that was given up before its first token
    has not had its prompt read, so it would have cost nothing there either.
    """
    record = event.record
    if record.completion_tokens == 0 and event.finish_reason not in ANSWERED:
        return 0.0
    tokens = record.prompt_tokens / event.n + record.completion_tokens
    return tokens * price.tiers[-1].flops_per_token


class Telemetry:
    """Takes in what happens to requests, and shows it.

    Args:
        size: completions to remember. access_log: write one line of JSON for every request.
        window: completions with a difficulty that drift is measured on.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        info: ModelInfo,
        *,
        size: int = 1000,
        access_log: bool = True,
        window: int = 500,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._price, self._tier_map = info.price, info.tier_map
        self._tier_names = info.config.tier_names
        self._activated_by_tier = [tier.activated_params for tier in info.price.tiers]
        self._size, self._access_log, self._clock = size, access_log, clock
        self._drift = Drift(info.tier_map, window)
        self._metrics = Metrics(info, lambda: self._drift.index)
        self._ring: deque[Finished] = deque(maxlen=size)
        self._rows: Rows = np.zeros(size, _ROW)
        self._num_finished = 0
        self._rejected: Counter[str] = Counter()
        self._shadows = dict.fromkeys(SHADOWS, 0)
        self._throughput = _Throughput(self._tier_names)
        self._since = clock()

    @property
    def registry(self) -> CollectorRegistry:
        """The Prometheus registry."""
        return self._metrics.registry

    def finished(self, event: Finished) -> None:
        """Take in a completion that has ended."""
        record = event.record
        always_top = flops_always_top(event, self._price)
        self._rows[self._num_finished % self._size] = (
            record.tier,
            DECIDED_BY.index(record.decided_by),
            record.completion_tokens,
            record.flops,
            always_top,
            activated_params(record, self._activated_by_tier),
            record.ttft_ms if record.completion_tokens else np.nan,
            record.total_ms,
        )
        self._num_finished += 1
        self._ring.append(event)
        self._throughput.add(event)
        if record.difficulty is not None:
            self._drift.add(record.difficulty)
        self._metrics.finished(
            record,
            event.finish_reason,
            n=event.n,
            max_tokens=event.max_tokens,
            flops_always_top=always_top,
        )
        if self._access_log and access_logger.isEnabledFor(logging.INFO):
            line = {
                "ts": event.finished_at,
                "request_id": record.request_id,
                "endpoint": event.endpoint,
                "status": event.status,
                "stream": event.is_stream,
                "model": event.model,
                "finish_reason": event.finish_reason,
                **{name: getattr(record, name) for name in _LOGGED},
            }
            access_logger.info("%s", json.dumps(line))

    def rejected(self, endpoint: str, reason: str, status: int) -> None:
        """Take in a request that was answered with an error; `reason` is one word of ours."""
        self._rejected[reason] += 1
        self._metrics.rejected(reason)
        if self._access_log and access_logger.isEnabledFor(logging.INFO):
            line = {"ts": self._clock(), "endpoint": endpoint, "status": status, "reason": reason}
            access_logger.info("%s", json.dumps(line))

    def shadowed(self, outcome: str, record: ShadowRecord | None = None) -> None:
        """Take in what came of a shadowed request: one of `SHADOWS`, with its record if it is done.

        Not a completion of a client's: it is in no sum.
        """
        self._shadows[outcome] += 1
        self._metrics.shadowed(outcome)
        if record is not None and self._access_log and access_logger.isEnabledFor(logging.INFO):
            access_logger.info("%s", json.dumps({"ts": self._clock(), **record.to_dict()}))

    def inter_token(self, tier_name: str, seconds: float) -> None:
        """Take in the time between two tokens."""
        self._metrics.inter_token(tier_name, seconds)

    def set_tier_map(self, tier_map: TierMap) -> None:
        """Show this map, and measure drift against its calibration, from now on."""
        self._tier_map = tier_map
        self._drift.set_tier_map(tier_map)
        self._metrics.set_tier_map(tier_map)

    def render(self, stats: EngineStats) -> bytes:
        """All metrics in Prometheus' text format."""
        return self._metrics.render(stats)

    def snapshot(self, limit: int = 100) -> dict[str, Any]:
        """Body of GET /v1/dvpa/telemetry, with the newest `limit` completions."""
        rows = self._rows[: min(self._num_finished, self._size)]
        decided_by = np.bincount(rows["decided_by"], minlength=len(DECIDED_BY)).tolist()
        newest = islice(reversed(self._ring), max(limit, 0))
        return {
            "schema_version": SCHEMA_VERSION,
            "since": self._since,
            "requests_total": self._num_finished,
            "size": self._size,
            "tiers": [self._tier(rows, tier) for tier in range(len(self._tier_names))],
            "decided_by": dict(zip(DECIDED_BY, decided_by, strict=True)),
            "rejected": dict(self._rejected),
            "shadow": dict(self._shadows),
            "difficulty": {
                "bins": [i / NUM_BINS for i in range(NUM_BINS)],  # lower ends
                "counts": list(self._drift.counts),
                "thresholds": list(self._tier_map.thresholds),
                "upper_cut": self._tier_map.upper_cut,
                "calibration_counts": self._drift.calibration_counts,
                "drift": self._drift.index,
                "drift_requests": self._drift.num_requests,
            },
            "savings": self._savings(rows),
            "throughput": self._throughput.series(self._clock()),
            "requests": [
                {
                    **event.record.to_dict(),
                    "finish_reason": event.finish_reason,
                    "endpoint": event.endpoint,
                    "finished_at": event.finished_at,
                }
                for event in newest
            ],
        }

    def _tier(self, rows: Rows, tier: int) -> dict[str, Any]:
        """Sums over the completions that ended at a tier."""
        ended = rows[rows["tier"] == tier]
        decoding = ended[ended["tokens"] > 1]
        seconds = float((decoding["total_ms"] - decoding["ttft_ms"]).sum()) / 1000
        tokens = int((decoding["tokens"] - 1).sum())
        return {
            "name": self._tier_names[tier],
            "requests": len(ended),
            "share": len(ended) / len(rows) if len(rows) else 0.0,
            "completion_tokens": int(ended["tokens"].sum()),
            "flops": float(ended["flops"].sum()),
            "ttft_ms": _percentiles(ended["ttft_ms"]),
            "total_ms": _percentiles(ended["total_ms"]),
            "tokens_per_s": tokens / seconds if seconds > 0 else None,  # of one completion
        }

    def _savings(self, rows: Rows) -> dict[str, Any]:
        flops, always_top = float(rows["flops"].sum()), float(rows["flops_always_top"].sum())
        tokens = int(rows["tokens"].sum())
        return {
            "flops": flops,
            "flops_always_top": always_top,
            "ratio": flops / always_top if always_top else None,
            "activated_params_mean": float(rows["activated"].sum()) / tokens if tokens else None,
            "activated_params_top": self._activated_by_tier[-1],
        }


class _Throughput:
    """Tokens and completions by tier, in short spans of time, by when the completions ended."""

    def __init__(self, tier_names: list[str]) -> None:
        self._tier_names = tier_names
        self._buckets: dict[int, tuple[list[int], list[int]]] = {}

    def add(self, event: Finished) -> None:
        now = int(event.finished_at // BUCKET_SECONDS)
        if now not in self._buckets:
            # What is too old goes; what is yet to come, too: the clock has been set back.
            for index in [i for i in self._buckets if not now - NUM_BUCKETS < i <= now]:
                del self._buckets[index]
            self._buckets[now] = ([0] * len(self._tier_names), [0] * len(self._tier_names))
        tokens, requests = self._buckets[now]
        for tier, count in enumerate(event.record.tier_tokens):
            tokens[tier] += count
        requests[event.record.tier] += 1

    def series(self, now: float) -> list[dict[str, Any]]:
        """One entry for each span, the last one being the present, empty ones included."""
        last = int(now // BUCKET_SECONDS)
        none = [0] * len(self._tier_names)
        spans = []
        for index in range(last - NUM_BUCKETS + 1, last + 1):
            tokens, requests = self._buckets.get(index, (none, none))
            spans.append(
                {
                    "t": float(index * BUCKET_SECONDS),
                    "tokens": dict(zip(self._tier_names, tokens, strict=True)),
                    "requests": dict(zip(self._tier_names, requests, strict=True)),
                }
            )
        return spans


def _percentiles(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    known = values[~np.isnan(values)]
    if not len(known):
        return {"p50": None, "p95": None}
    p50, p95 = np.percentile(known, [50, 95]).tolist()
    return {"p50": p50, "p95": p95}
