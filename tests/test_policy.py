"""Policy: every reason a request gets its tier, and the telemetry record."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpa.tiers import Policy, TelemetryRecord, TierMap

NAMES = ("7b", "13b", "20b", "32b")
MAP = TierMap("threshold", NAMES, (7.0, 13.0, 20.0, 32.0), 3, (0.25, 0.5, 0.75))


@pytest.fixture
def policy() -> Policy:
    return Policy(MAP)


@pytest.mark.parametrize(("difficulty", "tier"), [(0.0, 0), (0.3, 1), (0.6, 2), (1.0, 3)])
def test_tier_map_decides(policy, difficulty, tier):
    for request in (None, "auto"):
        decision = policy.decide(difficulty, tier=request)
        assert (decision.tier, decision.tier_name) == (tier, NAMES[tier])
        assert decision.decided_by == "tier_map"
        assert decision.difficulty == difficulty
        assert decision.thresholds == MAP.thresholds
    assert policy.counters["tier_map"] == 2


def test_success_by_tier_is_reported():
    curves = tuple(((0.0, 1.0), (1.0, low)) for low in (0.0, 0.2, 0.4, 0.6))
    decision = Policy(replace(MAP, calibration=curves)).decide(0.5)
    assert decision.success_by_tier == pytest.approx((0.5, 0.6, 0.7, 0.8))


@pytest.mark.parametrize(
    "difficulty", [None, float("nan"), float("inf"), -0.1, 1.1, np.float32("nan")]
)
def test_unusable_difficulty_falls_back_and_is_counted(policy, difficulty):
    decision = policy.decide(difficulty)
    assert (decision.tier, decision.decided_by) == (3, "fallback")
    assert decision.difficulty is None
    assert decision.success_by_tier == ()
    assert policy.counters["fallback"] == 1
    assert policy.counters["tier_map"] == 0


def test_fallback_uses_the_default_tier_of_the_map():
    assert Policy(replace(MAP, default_tier=1)).decide(None).tier == 1


def test_untrained_map_is_a_fallback_but_keeps_the_difficulty():
    policy = Policy(TierMap.untrained(NAMES, MAP.costs))
    decision = policy.decide(0.1)
    assert (decision.tier, decision.decided_by, decision.difficulty) == (3, "fallback", 0.1)
    assert policy.counters["fallback"] == 1


@pytest.mark.parametrize("tier", [2, "20b", "2"])
def test_override(policy, tier):
    decision = policy.decide(0.0, tier=tier, load=1.0)
    assert (decision.tier, decision.decided_by) == (2, "override")
    # A missing score does not matter where the client decides.
    assert policy.decide(None, tier=tier).decided_by == "override"
    assert policy.counters == {"tier_map": 0, "override": 2, "cap": 0, "load": 0, "fallback": 0}


@pytest.mark.parametrize("field", ["tier", "max_tier", "min_tier"])
@pytest.mark.parametrize("unknown", ["70b", "", 4, -1, True, "9" * 5000, 1.0])
def test_unknown_tier_names_the_known_ones(policy, field, unknown):
    with pytest.raises(ValueError, match=rf"{field}: .*7b \(0\), 13b \(1\), 20b \(2\), 32b \(3\)"):
        policy.decide(0.5, **{field: unknown})
    assert sum(policy.counters.values()) == 0


def test_caps(policy):
    assert policy.decide(1.0, max_tier="13b").decided_by == "cap"
    assert policy.decide(1.0, max_tier=1).tier == 1
    assert policy.decide(0.0, min_tier=2).tier == 2
    assert policy.decide(0.0, max_tier=1).decided_by == "tier_map"  # the cap changed nothing
    assert policy.decide(0.0, tier=3, max_tier=2).tier == 2  # also caps an override
    assert policy.decide(None, max_tier=0).decided_by == "cap"
    assert policy.counters["fallback"] == 1  # counted although the cap decided
    with pytest.raises(ValueError, match=r"min_tier: 2 is above max_tier '7b'"):
        policy.decide(0.5, min_tier=2, max_tier="7b")


def test_load_lowers_the_highest_tiers_first(policy):
    ceilings = [policy.decide(1.0, load=load).tier for load in (0.0, 0.8, 0.81, 0.9, 0.99, 1, 7)]
    assert ceilings == [3, 3, 2, 1, 0, 0, 0]
    assert policy.decide(1.0, load=0.9).decided_by == "load"
    assert policy.decide(0.3, load=0.9).decided_by == "tier_map"  # already cheap: not touched
    assert policy.decide(1.0, load=1.0, min_tier=2).tier == 2  # a promise to the client holds
    assert policy.decide(None, load=1.0).decided_by == "load"
    assert policy.counters["fallback"] == 1


def test_degradation_can_be_forbidden_or_moved():
    assert Policy(MAP, allow_degradation=False).decide(1.0, load=1.0).tier == 3
    assert Policy(MAP, degrade_from=0.0).decide(1.0, load=0.01).tier == 2
    with pytest.raises(ValueError, match="degrade_from"):
        Policy(MAP, degrade_from=1.0)


@pytest.mark.parametrize("load", [float("nan"), float("inf"), -0.1])
def test_bad_load_is_refused(policy, load):
    with pytest.raises(ValueError, match="load"):
        policy.decide(0.5, load=load)


@given(
    st.none() | st.floats(),
    st.none() | st.sampled_from(["auto", *NAMES]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.floats(0.0, 2.0),
)
def test_caps_always_hold_and_every_decision_is_counted(difficulty, tier, a, b, load):
    policy = Policy(MAP)
    lowest, highest = min(a, b), max(a, b)
    decision = policy.decide(difficulty, tier=tier, min_tier=lowest, max_tier=highest, load=load)
    assert lowest <= decision.tier <= highest
    assert policy.counters[decision.decided_by] == 1
    assert decision.tier_name == NAMES[decision.tier]


RECORD = TelemetryRecord(
    request_id="r1",
    tier=1,
    tier_name="13b",
    difficulty=0.4,
    success_by_tier=(0.5, 0.9),
    decided_by="escalation",
    thresholds=(0.3,),
    activated_params=13,
    flops=26.0,
    prompt_tokens=5,
    completion_tokens=3,
    tier_tokens=(1, 2),
    escalations=1,
    queue_ms=0.1,
    score_ms=0.2,
    ttft_ms=0.3,
    total_ms=0.4,
)


def test_telemetry_record_has_the_contract_fields_in_order():
    expected = [
        "request_id",
        "tier",
        "tier_name",
        "difficulty",
        "success_by_tier",
        "decided_by",
        "thresholds",
        "activated_params",
        "flops",
        "prompt_tokens",
        "completion_tokens",
        "tier_tokens",
        "escalations",
        "queue_ms",
        "score_ms",
        "ttft_ms",
        "total_ms",
    ]
    assert [f.name for f in fields(TelemetryRecord)] == expected
    assert list(RECORD.to_dict()) == expected
    assert json.loads(json.dumps(RECORD.to_dict(), allow_nan=False)) == RECORD.to_dict()
    assert RECORD.to_dict()["tier_tokens"] == [1, 2]


def test_telemetry_record_refuses_what_json_or_readers_cannot_take():
    assert replace(RECORD, difficulty=None).to_dict()["difficulty"] is None
    with pytest.raises(ValueError, match="difficulty"):
        replace(RECORD, difficulty=float("nan"))
    with pytest.raises(ValueError, match="decided_by: 'luck'"):
        replace(RECORD, decided_by="luck")


CURVES = tuple(((0.0, 1.0), (1.0, low)) for low in (0.0, 0.2, 0.4, 0.6))


@given(st.floats(0, 1), st.floats(0, 1))
def test_quality_gives_the_cheapest_tier_that_keeps_it(difficulty: float, quality: float) -> None:
    decision = Policy(replace(MAP, calibration=CURVES)).decide(difficulty, quality=quality)
    success = decision.success_by_tier
    good = [tier for tier, p in enumerate(success) if p >= quality * success[-1]]
    assert decision.tier == min(good)
    assert decision.decided_by == "tier_map"


def test_quality_gives_way_to_override_load_and_caps() -> None:
    policy = Policy(replace(MAP, calibration=CURVES))
    assert policy.decide(0.9, quality=0.0).tier == 0
    assert policy.decide(0.9, quality=1.0).tier == 3
    assert policy.decide(0.9, quality=1.0, tier=1).decided_by == "override"
    assert policy.decide(0.9, quality=1.0, max_tier=2).decided_by == "cap"
    assert policy.decide(0.9, quality=1.0, load=1.0).decided_by == "load"
    assert policy.decide(None, quality=0.0).decided_by == "fallback"


def test_quality_needs_a_calibration_and_a_share() -> None:
    with pytest.raises(ValueError, match=r"quality: 0\.5 cannot be had"):
        Policy(MAP).decide(0.5, quality=0.5)
    with pytest.raises(ValueError, match=r"quality: 1\.5 must be in"):
        Policy(replace(MAP, calibration=CURVES)).decide(0.5, quality=1.5)
