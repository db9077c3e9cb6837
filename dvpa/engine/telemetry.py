"""From a finished request to its telemetry record (design.md, section 6)."""

from dvpa.engine.request import Request
from dvpa.pricing import ModelPrice
from dvpa.tiers.record import TelemetryRecord


def record(request: Request, price: ModelPrice) -> TelemetryRecord:
    """The record of a request that has ended, whatever way; times that never came are the end's."""
    assert request.finished is not None
    decision, tier = request.decision, request.tier
    end = request.finished
    admitted = end if request.admitted is None else request.admitted
    first_token = end if request.first_token is None else request.first_token
    decided_by = "fallback" if decision is None else decision.decided_by
    if request.num_escalations:
        decided_by = "escalation"
    if request.is_degraded:
        decided_by = "fallback"
    return TelemetryRecord(
        request_id=request.request_id,
        tier=tier,
        tier_name=price.tiers[tier].name,
        difficulty=None if decision is None else decision.difficulty,
        success_by_tier=() if decision is None else decision.success_by_tier,
        decided_by=decided_by,
        thresholds=() if decision is None else decision.thresholds,
        activated_params=price.tiers[tier].activated_params,
        flops=request.flops,
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=len(request.output_token_ids),
        tier_tokens=tuple(request.tier_tokens),
        escalations=request.num_escalations,
        queue_ms=1000 * (admitted - request.arrival),
        score_ms=0.0 if request.scored is None else 1000 * (request.scored - admitted),
        ttft_ms=1000 * (first_token - request.arrival),
        total_ms=1000 * (end - request.arrival),
    )
