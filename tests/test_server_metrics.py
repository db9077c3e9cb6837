"""Metrics: every name, label and value, and that dashboard and alerts ask for what there is."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from server_events import NAMES, PARAMS, TOP_FLOPS, finished, model_info, tier_map

from dvpa import __version__
from dvpa.config import load_yaml
from dvpa.engine.request import FINISH_REASONS
from dvpa.server.backend import EngineStats
from dvpa.server.metrics import ANSWERED, REJECTIONS
from dvpa.server.telemetry import Finished, Telemetry
from dvpa.tiers import TelemetryRecord
from dvpa.tiers.record import DECIDED_BY

SERVE = Path(__file__).resolve().parent.parent / "configs" / "serve"
Series = dict[str, dict[tuple[tuple[str, str], ...], float]]

STATS = EngineStats(
    running=3,
    waiting=5,
    max_queue=64,
    kv_pages_used=30,
    kv_pages=120,
    preemptions=2,
    prefix_queries=1000,
    prefix_hits=250,
    steps=77,
    failed=1,
    escalations=4,
    degraded=6,
    drafted=40,
    accepted=30,
    decisions={"tier_map": 9, "override": 2, "cap": 0, "load": 1, "fallback": 3},
    resident_bytes=12345,
)
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


def telemetry(*events: Finished, histogram: list[int] | None = None) -> Telemetry:
    made = Telemetry(model_info(histogram), access_log=False)
    for event in events:
        made.finished(event)
    return made


def rendered(made: Telemetry, stats: EngineStats = STATS) -> Series:
    """Sample name -> labels -> value, of the text a Prometheus server would read."""
    series: Series = defaultdict(dict)
    for family in text_string_to_metric_families(made.render(stats).decode()):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in series[sample.name], "a series twice"
            series[sample.name][labels] = sample.value
    return dict(series)


def value(series: Series, name: str, **labels: str) -> float:
    return series[name][tuple(sorted(labels.items()))]


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


# -- dashboard and alerts -----------------------------------------------------------------------


def found_under(node: Any, key: str) -> Iterator[Any]:
    """Values of `key` anywhere in a JSON-like tree."""
    if isinstance(node, dict):
        for name, child in node.items():
            if name == key:
                yield child
            yield from found_under(child, key)
    elif isinstance(node, list):
        for child in node:
            yield from found_under(child, key)


DASHBOARD = json.loads((SERVE / "grafana-dashboard.json").read_text(encoding="utf-8"))
ALERTS = load_yaml(SERVE / "alerts.yaml")
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [*found_under(DASHBOARD["panels"], "expr"), *found_under(ALERTS, "expr")]
METRIC = re.compile(r"\b(dvpa_\w+)(?:\{([^}]*)\})?")
OF_PROMETHEUS = {"instance", "job"}  # labels that every scraped series gets


@pytest.fixture(scope="module")
def live() -> Series:
    return rendered(telemetry(finished()))


def problems(query: str, live: Series) -> list[str]:
    """What a query asks for that is not there, or in a way that gives nonsense."""
    found = []
    known: set[str] = set(OF_PROMETHEUS)
    for name, matchers in METRIC.findall(query):
        if name not in live:
            found.append(f"{name}: no such metric")
            continue
        labels = {key for of_one in live[name] for key, _ in of_one} | OF_PROMETHEUS
        known |= labels
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        found += [f"{name}: no label {label}" for label in sorted(asked - labels)]
    for name in re.findall(r"(?<!rate\()(?<!increase\()\b(dvpa_\w+_(?:total|bucket))\b", query):
        found.append(f"{name}: a counter outside rate and increase")
    for group in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", query):
        asked = {label.strip() for label in group.split(",") if label.strip()}
        found += [f"by {label}: no such label" for label in sorted(asked - known)]
    if "histogram_quantile(" in query and not ("_bucket" in query and "by (le" in query):
        found.append("a quantile needs buckets by le")
    if query.count("(") != query.count(")") or query.count("{") != query.count("}"):
        found.append("brackets do not match")
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_what_there_is(query: str, live: Series) -> None:
    assert METRIC.search(query), "asks for nothing of ours"
    assert problems(query, live) == []


@pytest.mark.parametrize(
    "query",
    [
        "sum(rate(dvpa_requests[5m]))",
        "sum(rate(dvpa_requests_totals[5m]))",
        "dvpa_time_to_first_token_seconds > 1",
        "sum by (level) (rate(dvpa_requests_total[5m]))",
        "sum(rate(dvpa_requests_rejected_total{tier='top'}[5m]))",
        "sum(dvpa_requests_total)",
        "sum(rate(dvpa_requests_total[5m])",
        "histogram_quantile(0.5, rate(dvpa_time_to_first_token_seconds_sum[5m]))",
    ],
)
def test_a_wrong_query_is_caught(query: str, live: Series) -> None:
    assert problems(query, live) != []


def test_label_values_in_alerts_are_ones_there_can_be() -> None:
    allowed = {
        "reason": set(REJECTIONS),
        "finish_reason": set(FINISH_REASONS),
        "decided_by": set(DECIDED_BY),
        "is_fitted": {"true", "false"},
    }
    for query in found_under(ALERTS, "expr"):
        for label, values in re.findall(r"(\w+)=~?'([^']*)'", query):
            assert set(values.split("|")) <= allowed[label], query


def test_alerts_are_whole() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names)) >= 12
    for rule in RULES:
        assert set(rule) - {"for"} == {"alert", "labels", "annotations", "expr"}, rule["alert"]
        assert re.fullmatch(r"Dvpa[A-Z]\w+", rule["alert"])
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))
        assert re.search(r" [><] ", rule["expr"]), "nothing is compared"


def test_dashboard_panels_fit_and_are_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} overlaps"
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        ids = [target["refId"] for target in panel["targets"]]
        assert len(ids) == len(set(ids)) >= 1
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {
        "datasource",
        "instance",
    }


def test_the_dashboard_shows_what_it_must() -> None:
    shown = " ".join(found_under(DASHBOARD["panels"], "expr"))
    for name in (
        *("requests_total", "decisions", "difficulty_score_bucket", "time_to_first_token_seconds"),
        *("inter_token_latency_seconds", "e2e_request_latency_seconds", "num_requests_waiting"),
        *("kv_cache_usage_perc", "flops_always_top_total", "difficulty_drift_psi"),
        *("requests_rejected_total", "escalations_total"),
    ):
        if name == "decisions":  # why: by what decided the tier a completion ended at
            assert "by (decided_by)" in shown
        else:
            assert f"dvpa_{name}" in shown, name
    for panel in DASHBOARD["panels"]:
        quantiles = re.findall(r"histogram_quantile\(([\d.]+)", json.dumps(panel))
        if "by tier" in panel["title"] and quantiles:
            assert quantiles == ["0.5", "0.95", "0.99"]
