"""Metrics: every name, label and value, and nothing of a client's making."""

import re
from dataclasses import fields

import pytest
from prometheus_client import REGISTRY
from server_events import (
    NAMES,
    PARAMS,
    STATS,
    TOP_FLOPS,
    finished,
    rendered,
    telemetry,
    tier_map,
    value,
)

from dvpa import __version__
from dvpa.engine.request import FINISH_REASONS
from dvpa.server.backend import EngineStats
from dvpa.server.metrics import ANSWERED, REJECTIONS
from dvpa.server.telemetry import Finished
from dvpa.tiers import TelemetryRecord
from dvpa.tiers.record import DECIDED_BY

# Type and labels of every metric (a histogram's `le` is left out).
GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"
EXPECTED: dict[str, tuple[str, set[str]]] = {
    "dvpa_num_requests_running": (GAUGE, set()),
    "dvpa_num_requests_waiting": (GAUGE, set()),
    "dvpa_max_queue": (GAUGE, set()),
    "dvpa_kv_cache_usage_perc": (GAUGE, set()),
    "dvpa_resident_weight_bytes": (GAUGE, set()),
    "dvpa_difficulty_drift_psi": (GAUGE, set()),
    "dvpa_tier_map_info": (GAUGE, {"kind", "is_fitted", "default_tier", "thresholds"}),
    "dvpa_model_info": (GAUGE, {"model", "dvpa_version"}),
    "dvpa_prefix_cache_queries_total": (COUNTER, set()),
    "dvpa_prefix_cache_hits_total": (COUNTER, set()),
    "dvpa_num_preemptions_total": (COUNTER, set()),
    "dvpa_engine_steps_total": (COUNTER, set()),
    "dvpa_requests_failed_total": (COUNTER, set()),
    "dvpa_requests_degraded_total": (COUNTER, set()),
    "dvpa_escalations_total": (COUNTER, set()),
    "dvpa_spec_decode_num_draft_tokens_total": (COUNTER, set()),
    "dvpa_spec_decode_num_accepted_tokens_total": (COUNTER, set()),
    "dvpa_decisions_total": (COUNTER, {"decided_by"}),
    "dvpa_prompt_tokens_total": (COUNTER, {"tier"}),
    "dvpa_generation_tokens_total": (COUNTER, {"tier"}),
    "dvpa_request_success_total": (COUNTER, {"tier", "finished_reason"}),
    "dvpa_requests_total": (COUNTER, {"tier", "finish_reason", "decided_by"}),
    "dvpa_requests_rejected_total": (COUNTER, {"reason"}),
    "dvpa_shadow_requests_total": (COUNTER, {"outcome"}),
    "dvpa_flops_total": (COUNTER, {"tier"}),
    "dvpa_flops_always_top_total": (COUNTER, set()),
    "dvpa_activated_params_token_total": (COUNTER, set()),
    "dvpa_activated_params_token_top_total": (COUNTER, set()),
    "dvpa_tier_overrides_total": (COUNTER, {"tier"}),
    "dvpa_time_to_first_token_seconds": (HISTOGRAM, {"tier"}),
    "dvpa_inter_token_latency_seconds": (HISTOGRAM, {"tier"}),
    "dvpa_request_time_per_output_token_seconds": (HISTOGRAM, {"tier"}),
    "dvpa_e2e_request_latency_seconds": (HISTOGRAM, {"tier"}),
    "dvpa_request_queue_time_seconds": (HISTOGRAM, {"tier"}),
    "dvpa_request_score_time_seconds": (HISTOGRAM, set()),
    "dvpa_request_prompt_tokens": (HISTOGRAM, {"tier"}),
    "dvpa_request_generation_tokens": (HISTOGRAM, {"tier"}),
    "dvpa_request_params_n": (HISTOGRAM, set()),
    "dvpa_request_params_max_tokens": (HISTOGRAM, set()),
    "dvpa_difficulty_score": (HISTOGRAM, set()),
    "dvpa_activated_params": (HISTOGRAM, set()),
}


# -- names and labels ---------------------------------------------------------------------------


@pytest.mark.parametrize("events", [[], [finished(tier) for tier in range(3)]], ids=["idle", "run"])
def test_names_types_and_labels(events: list[Finished]) -> None:
    made = telemetry(*events)
    text = made.render(STATS).decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert types == {name: kind for name, (kind, _) in EXPECTED.items()}
    series = rendered(made)
    for name, (kind, labels) in EXPECTED.items():
        found = series.pop(f"{name}_bucket" if kind == HISTOGRAM else name)
        wanted = labels | {"le"} if kind == HISTOGRAM else labels
        assert all({key for key, _ in of_one} == wanted for of_one in found), name
        if kind == HISTOGRAM:
            assert len(series.pop(f"{name}_sum")) == len(series.pop(f"{name}_count")) > 0
    assert series == {}  # nothing else, `_created` above all
    assert all(re.search(rf"^# HELP {name} \S", text, re.MULTILINE) for name in EXPECTED)


def test_every_tier_and_known_reason_has_a_series_from_the_start() -> None:
    series = rendered(telemetry())
    for name, (kind, labels) in EXPECTED.items():
        if labels == {"tier"}:
            full = f"{name}_count" if kind == HISTOGRAM else name
            assert series[full] == {(("tier", tier),): 0.0 for tier in NAMES}
    assert series["dvpa_requests_rejected_total"] == {(("reason", r),): 0.0 for r in REJECTIONS}
    assert len(series["dvpa_requests_total"]) == len(NAMES) * len(ANSWERED) * len(DECIDED_BY)
    assert set(ANSWERED) < set(FINISH_REASONS)


def test_the_registry_is_its_own() -> None:
    first, second = telemetry(finished()), telemetry()
    assert first.registry is not second.registry
    assert first.registry is not REGISTRY
    assert not any(metric.name.startswith("dvpa") for metric in REGISTRY.collect())


def test_memory_is_absent_where_all_weights_stay() -> None:
    assert "dvpa_resident_weight_bytes" not in rendered(telemetry(), EngineStats())
    assert value(rendered(telemetry(), EngineStats()), "dvpa_kv_cache_usage_perc") == 0.0


# -- values -------------------------------------------------------------------------------------


def test_values_of_the_engine() -> None:
    made = telemetry()
    series = rendered(made)
    expected = {
        "num_requests_running": 3,
        "num_requests_waiting": 5,
        "max_queue": 64,
        "kv_cache_usage_perc": 0.25,
        "resident_weight_bytes": 12345,
        "num_preemptions_total": 2,
        "prefix_cache_queries_total": 1000,
        "prefix_cache_hits_total": 250,
        "engine_steps_total": 77,
        "requests_failed_total": 1,
        "escalations_total": 4,
        "requests_degraded_total": 6,
        "spec_decode_num_draft_tokens_total": 40,
        "spec_decode_num_accepted_tokens_total": 30,
    }
    assert {name: value(series, f"dvpa_{name}") for name in expected} == expected
    for decided_by, count in STATS.decisions.items():
        assert value(series, "dvpa_decisions_total", decided_by=decided_by) == count
    assert value(rendered(made, EngineStats(steps=99)), "dvpa_engine_steps_total") == 99


def test_values_of_completions() -> None:
    escalated = finished(
        tier=2,
        tokens=6,
        tier_tokens=(2, 0, 4),
        decided_by="escalation",
        finish_reason="length",
        flops=500.0,
        ttft_ms=100.0,
        total_ms=600.0,
        score_ms=0.0,
        max_tokens=0,
    )
    named = finished(1, 1, decided_by="override", difficulty=None, n=2)
    queued = finished(0, 0, finish_reason="timeout", flops=0.0, total_ms=30000.0, ttft_ms=30000.0)
    series = rendered(telemetry(finished(0, 5), escalated, named, queued))

    def of_tier(name: str) -> list[float]:
        return [value(series, f"dvpa_{name}", tier=tier) for tier in NAMES]

    assert of_tier("prompt_tokens_total") == [20, 10, 10]
    assert of_tier("generation_tokens_total") == [5 + 2, 1, 4]
    assert of_tier("flops_total") == [1000.0, 1000.0, 500.0]
    assert of_tier("tier_overrides_total") == [0, 1, 0]
    assert value(series, "dvpa_flops_always_top_total") == (15 + 16 + 5 + 1) * TOP_FLOPS
    activated = 7 * PARAMS[0] + 1 * PARAMS[1] + 4 * PARAMS[2]
    assert value(series, "dvpa_activated_params_token_total") == activated
    assert value(series, "dvpa_activated_params_token_top_total") == 12 * PARAMS[2]

    labels = {"tier": "top", "finish_reason": "length", "decided_by": "escalation"}
    assert value(series, "dvpa_requests_total", **labels) == 1
    labels = {"tier": "base", "finish_reason": "timeout", "decided_by": "tier_map"}
    assert value(series, "dvpa_requests_total", **labels) == 1
    assert sum(series["dvpa_requests_total"].values()) == 4
    assert value(series, "dvpa_request_success_total", tier="top", finished_reason="length") == 1
    assert sum(series["dvpa_request_success_total"].values()) == 3  # a timeout is none

    # The one that never had a token has no time to its first one, but an end and a queue.
    assert of_tier("time_to_first_token_seconds_count") == [1, 1, 1]
    assert of_tier("time_to_first_token_seconds_sum") == pytest.approx([0.02, 0.02, 0.1])
    assert of_tier("request_time_per_output_token_seconds_count") == [1, 0, 1]
    assert of_tier("request_time_per_output_token_seconds_sum") == pytest.approx(
        [0.04 / 4, 0.0, 0.5 / 5]
    )
    assert of_tier("e2e_request_latency_seconds_sum") == pytest.approx([30.06, 0.06, 0.6])
    assert of_tier("request_queue_time_seconds_count") == [2, 1, 1]
    assert of_tier("request_prompt_tokens_sum") == [20, 10, 10]
    assert of_tier("request_generation_tokens_sum") == [5, 1, 6]
    assert value(series, "dvpa_request_score_time_seconds_count") == 3
    assert value(series, "dvpa_request_params_n_sum") == 5
    assert value(series, "dvpa_request_params_max_tokens_count") == 3
    assert value(series, "dvpa_difficulty_score_count") == 3


def test_inter_token_and_rejections() -> None:
    made = telemetry()
    made.inter_token("middle", 0.03)
    made.inter_token("middle", 0.05)
    made.rejected("/v1/completions", "queue_full", 429)
    made.rejected("other", "a_new_reason", 400)
    series = rendered(made)
    assert value(series, "dvpa_inter_token_latency_seconds_count", tier="middle") == 2
    assert value(series, "dvpa_inter_token_latency_seconds_sum", tier="middle") == pytest.approx(
        0.08
    )
    assert value(series, "dvpa_requests_rejected_total", reason="queue_full") == 1
    assert value(series, "dvpa_requests_rejected_total", reason="a_new_reason") == 1


def test_buckets_of_difficulty_and_activated_parameters() -> None:
    series = rendered(telemetry(*(finished(t, difficulty=d) for t, d in enumerate((0.0, 0.5, 1)))))
    edges = [dict(labels)["le"] for labels in series["dvpa_difficulty_score_bucket"]]
    assert [float(edge) for edge in edges[:-1]] == [i / 20 for i in range(1, 21)]
    assert value(series, "dvpa_difficulty_score_bucket", le="0.5") == 2
    counts = series["dvpa_activated_params_bucket"]
    assert [float(dict(labels)["le"]) for labels in counts] == [*PARAMS, float("inf")]
    assert list(counts.values()) == [1, 2, 3, 3]


def test_drift_is_nan_until_it_is_known() -> None:
    unknown = value(rendered(telemetry()), "dvpa_difficulty_drift_psi")
    assert unknown != unknown
    same = telemetry(*(finished(difficulty=0.5) for _ in range(200)), histogram=[10] * 20)
    assert value(rendered(same), "dvpa_difficulty_drift_psi") > 0.25


def test_a_new_tier_map_takes_the_place_of_the_old_one() -> None:
    made = telemetry()
    made.set_tier_map(tier_map(thresholds=(0.125, 2.0), default_tier=1))
    [labels] = rendered(made)["dvpa_tier_map_info"]
    assert dict(labels) == {
        "kind": "threshold",
        "is_fitted": "true",
        "default_tier": "middle",
        "thresholds": "0.125,2",
    }


def test_the_model_is_named() -> None:
    [labels] = rendered(telemetry())["dvpa_model_info"]
    assert dict(labels) == {"model": "tiny", "dvpa_version": __version__}


# -- no text of a request -----------------------------------------------------------------------


def test_nothing_that_telemetry_is_told_can_hold_a_prompt() -> None:
    """The fields that are text are names and reasons; a new one has to be thought about here."""
    texts = {f.name for f in fields(TelemetryRecord) if f.type is str or "str" in str(f.type)}
    assert texts == {"request_id", "tier_name", "decided_by"}
    texts = {f.name for f in fields(Finished) if f.type is str or "str" in str(f.type)}
    assert texts == {"finish_reason", "endpoint", "model"}


def test_nothing_of_a_clients_making_is_a_label() -> None:
    secret = "S3CRET"
    made = telemetry(finished(request_id=secret, model=secret, endpoint=secret))
    made.rejected(secret, "bad_request", 400)
    assert secret.encode() not in made.render(STATS)
