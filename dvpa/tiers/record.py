"""Telemetry and shadow records: the same fields everywhere, never the prompt."""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

SHADOW_EVENT = "shadow"  # what marks a line of the access log as a ShadowRecord
DECIDED_BY = ("tier_map", "override", "cap", "load", "escalation", "fallback")


@dataclass(frozen=True)
class TelemetryRecord:
    """What one request was given, why, and what it cost (design.md section 6).

    Raises ValueError for an unknown `decided_by` and for a difficulty that is not finite: a missing
    or NaN score is recorded as None, so that the record is always valid JSON.
    """

    request_id: str
    tier: int  # the tier the request ended at
    tier_name: str
    difficulty: float | None  # raw score in [0, 1]; None: the head gave none
    success_by_tier: tuple[
        float, ...
    ]  # calibrated P(success), nondecreasing; empty without calibration
    decided_by: str  # one of DECIDED_BY
    thresholds: tuple[float, ...]  # of the tier map in force; empty for a gain map
    activated_params: int  # per token at `tier`
    flops: float  # of the whole request
    prompt_tokens: int
    completion_tokens: int
    tier_tokens: tuple[int, ...]  # tokens decoded at each tier, base first
    escalations: int
    queue_ms: float
    score_ms: float
    ttft_ms: float  # time to first token
    total_ms: float

    def __post_init__(self) -> None:
        if self.decided_by not in DECIDED_BY:
            allowed = ", ".join(DECIDED_BY)
            raise ValueError(f"decided_by: {self.decided_by!r} is not one of {allowed}")
        if self.difficulty is not None and not isfinite(self.difficulty):
            raise ValueError(
                f"difficulty: {self.difficulty} is not finite; record a missing score as None"
            )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values, in the order of the fields."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class ShadowRecord:
    """How every tier would have done on a request that the policy routed; never the prompt.

    The top tier's greedy answer is the reference. agreement: 1.0 where the tier's own greedy answer
    is the same, else 0.0. nll: mean nats per token of that answer at each tier.
    """

    request_id: str
    difficulty: float
    prompt_tokens: int
    completion_tokens: int  # of the top tier's answer
    agreement: tuple[float, ...]  # per tier, base first; 1.0 at the top
    nll: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values, marked as what it is."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"event": SHADOW_EVENT, **values}
