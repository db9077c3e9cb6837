"""What an answer's record says: its price, every field, the tier that sessions and caps allow."""

import dataclasses
import json
from collections import Counter
from typing import Any

import pytest
from engine_oracle import NUM_NEW, greedy, make_engine, one, oracle, preempt_at_random

from dvpa.engine import Engine, SpeculateParams
from dvpa.engine.request import Part, Segment
from dvpa.engine.runner import StepResult
from dvpa.pricing import ModelPrice, price
from dvpa.tiers import TelemetryRecord


@pytest.fixture
def engine() -> Engine:
    """Over the oracle's model, which never ends an answer by itself."""
    return make_engine(oracle().model, page_size=4)


# -- telemetry ------------------------------------------------------------------------------------


class Ledger:
    """Every row that an engine runs, by part and tier."""

    def __init__(self, engine: Engine) -> None:
        self.rows: Counter[tuple[Part, int]] = Counter()
        self._run = engine.runner.run
        engine.runner.run = self.run  # type: ignore[method-assign]

    def run(self, segments: list[Segment]) -> StepResult:
        for segment in segments:
            self.rows.update((segment.part, tier) for tier in segment.tiers)
        return self._run(segments)


def prices() -> tuple[ModelPrice, list[int]]:
    cost = price(oracle().model.config)
    return cost, [tier.flops_per_token for tier in cost.tiers]


def test_flops_of_each_way_through_the_engine() -> None:
    known, (cost, per_token) = oracle(), prices()
    prompts = {known.tier_of(i): i for i in range(20) if len(known.prompts[i]) == 40 or i == 6}
    prompts |= {known.tier_of(i): i for i in range(20) if len(known.prompts[i]) > 8}
    assert set(prompts) == {0, 1, 2}
    probe, trunk = cost.probe_flops_per_token, cost.trunk_flops_per_token
    head, new = cost.head_flops_per_request, NUM_NEW - 1
    for tier, i in prompts.items():
        prompt, size = known.prompts[i], len(known.prompts[i])
        reused = (size - 1) // 4 * 4

        def flops(engine: Engine, tier: int | str, prompt: list[int] = prompt) -> float:
            return one(engine, prompt, greedy(tier=tier)).telemetry.flops

        engine = make_engine(known.model, page_size=4)
        assert flops(engine, tier) == per_token[tier] * (size + new)
        assert flops(engine, tier) == per_token[tier] * (size + new - reused)
        engine, saved = make_engine(known.model, page_size=4), trunk if tier else probe
        first = size * (probe + per_token[tier] - saved) + head + new * per_token[tier]
        assert flops(engine, "auto") == first
        # Known rows of its tier serve again; the probe's only where they stayed the base tier's.
        again = size - reused
        second = again * (per_token[tier] - saved) + head + new * per_token[tier]
        assert flops(engine, "auto") == second + probe * (size if tier else again)
        engine = make_engine(known.model, page_size=4, read_prompt="base")
        redone = 1 if tier else 0
        assert flops(engine, "auto") == size * per_token[0] + head + per_token[tier] * (
            new + redone
        )


def test_flops_count_what_is_computed_again() -> None:
    known, (_, per_token) = oracle(), prices()
    engine = make_engine(known.model, 56, page_size=1, prefix_caching=False)
    preempt_at_random(engine)
    ledger = Ledger(engine)
    draft = SpeculateParams(length=2)
    params = [greedy(tier=i % 3, speculate=draft if i % 2 else None) for i in range(20)]
    outputs = engine.generate(known.prompts, params)
    assert engine.scheduler.num_preemptions > 9
    assert sum(output.telemetry.flops for output in outputs) == sum(
        count * per_token[tier] for (_, tier), count in ledger.rows.items()
    )
    plain = sum(
        (len(prompt) + NUM_NEW - 1) * per_token[i % 3] for i, prompt in enumerate(known.prompts)
    )
    assert sum(ledger.rows.values()) * per_token[2] > plain


def test_the_record_has_every_field_and_never_the_prompt(engine: Engine) -> None:
    known, (cost, _) = oracle(), prices()
    for i, prompt in enumerate(known.prompts):
        output = one(engine, prompt, greedy(max_tokens=5, session_id=f"own {i}"))
        record, tier = output.telemetry, known.tier_of(i)
        content = record.to_dict()
        assert list(content) == [field.name for field in dataclasses.fields(TelemetryRecord)]
        json.dumps(content, allow_nan=False)
        assert record.request_id == output.request_id
        assert (record.tier, record.tier_name) == (tier, ("base", "middle", "top")[tier])
        assert record.activated_params == cost.tiers[tier].activated_params
        assert record.thresholds == known.model.tier_map.thresholds
        assert record.prompt_tokens == len(prompt) and record.completion_tokens == 5
        assert sum(record.tier_tokens) == 5 and record.tier_tokens[tier] == 5
        assert record.escalations == 0 and record.success_by_tier == ()
        assert record.queue_ms >= 0 and 0 < record.score_ms < record.ttft_ms < record.total_ms
        assert record.queue_ms + record.score_ms < record.ttft_ms
        flat = [value for value in content.values() if isinstance(value, list)]
        assert all(len(value) <= 3 for value in flat), "no room for a prompt"


def test_a_named_tier_is_not_scored(engine: Engine) -> None:
    record = one(engine, [5, 6, 7], greedy(tier="middle")).telemetry
    assert (record.tier, record.decided_by, record.difficulty) == (1, "override", None)
    assert record.score_ms == 0.0


# -- policy ---------------------------------------------------------------------------------------


def test_a_session_never_goes_down_again() -> None:
    known = oracle()
    by_tier = {known.tier_of(i): known.prompts[i] for i in range(20)}
    engine = make_engine(known.model)

    def tier(wanted: int, **params: Any) -> tuple[int, str]:
        record = one(engine, by_tier[wanted], greedy(max_tokens=1, **params)).telemetry
        return record.tier, record.decided_by

    assert tier(0, session_id="a") == (0, "tier_map")
    assert tier(1, session_id="a") == (1, "tier_map")
    assert tier(0, session_id="a") == (1, "cap")
    assert tier(0, session_id="a", max_tier=0) == (0, "tier_map"), "a promise comes first"
    assert tier(0, session_id="a", tier=0) == (0, "override")
    assert tier(0, session_id="b", tier=2) == (2, "override")
    assert tier(0, session_id="b") == (0, "tier_map"), "a tier asked for binds nothing"
    assert tier(2, session_id="a") == (2, "tier_map")
    assert tier(1, session_id="a") == (2, "cap")
    assert tier(0) == (0, "tier_map")
    without = make_engine(known.model, session_affinity=False)
    for wanted in (2, 0):
        output = one(without, by_tier[wanted], greedy(max_tokens=1, session_id="a"))
        assert output.telemetry.tier == wanted


def test_caps_bind_the_map(engine: Engine) -> None:
    known = oracle()
    by_tier = {known.tier_of(i): known.prompts[i] for i in range(20)}
    for wanted, caps, expected in [
        (2, {"max_tier": "middle"}, (1, "cap")),
        (0, {"min_tier": 1}, (1, "cap")),
        (1, {"min_tier": 1, "max_tier": 1}, (1, "tier_map")),
    ]:
        record = one(engine, by_tier[wanted], greedy(max_tokens=2, **caps)).telemetry
        assert (record.tier, record.decided_by) == expected
