"""Telemetry: a bounded ring, sums that add up, one clean line of JSON for every request, spans."""

import importlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_events import NAMES, NOW, PARAMS, PRICE, TOP_FLOPS, finished, model_info, tier_map

from dvpa.server import tracing
from dvpa.server.telemetry import BUCKET_SECONDS, NUM_BUCKETS, Finished, Telemetry
from dvpa.server.tracing import Tracing
from dvpa.tiers.record import DECIDED_BY

LOGGED = {
    *("ts", "request_id", "endpoint", "status", "stream", "model", "finish_reason", "tier"),
    *("tier_name", "difficulty", "decided_by", "activated_params", "flops", "prompt_tokens"),
    *("completion_tokens", "escalations", "queue_ms", "score_ms", "ttft_ms", "total_ms"),
}


def telemetry(*events: Finished, **settings: Any) -> Telemetry:
    made = Telemetry(model_info([10] * 20), **{"clock": lambda: NOW, **settings})
    for event in events:
        made.finished(event)
    return made


# -- snapshot -----------------------------------------------------------------------------------


def test_an_idle_server_has_a_whole_snapshot() -> None:
    snapshot = telemetry().snapshot()
    json.dumps(snapshot, allow_nan=False)
    unknown = {"p50": None, "p95": None}
    assert snapshot["requests"] == []
    assert snapshot["tiers"][1] == {
        "name": "middle",
        "requests": 0,
        "share": 0.0,
        "completion_tokens": 0,
        "flops": 0.0,
        "ttft_ms": unknown,
        "total_ms": unknown,
        "tokens_per_s": None,
    }
    assert snapshot["savings"]["ratio"] is None
    assert snapshot["savings"]["activated_params_mean"] is None
    assert snapshot["decided_by"] == dict.fromkeys(DECIDED_BY, 0)


def test_schema() -> None:
    snapshot = telemetry(finished(), finished(2)).snapshot()
    assert json.loads(json.dumps(snapshot, allow_nan=False)) == snapshot
    assert list(snapshot) == [
        *("schema_version", "since", "requests_total", "size", "tiers", "decided_by", "rejected"),
        *("shadow", "difficulty", "savings", "throughput", "requests"),
    ]
    assert (snapshot["schema_version"], snapshot["since"], snapshot["size"]) == (1, NOW, 1000)
    assert [tier["name"] for tier in snapshot["tiers"]] == list(NAMES)
    difficulty = snapshot["difficulty"]
    assert list(difficulty) == [
        *("bins", "counts", "thresholds", "upper_cut", "calibration_counts"),
        *("drift", "drift_requests"),
    ]
    assert difficulty["bins"][:3] == [0.0, 0.05, 0.1] and len(difficulty["bins"]) == 20
    assert len(difficulty["counts"]) == 20 and difficulty["counts"][5] == 2
    assert difficulty["thresholds"] == [0.3, 0.7]
    assert difficulty["calibration_counts"] == [10] * 20
    assert (difficulty["drift"], difficulty["drift_requests"]) == (None, 2)
    assert set(snapshot["requests"][0]) == {
        *finished().record.to_dict(),
        *("finish_reason", "endpoint", "finished_at"),
    }


def test_the_ring_is_bounded_and_newest_come_first() -> None:
    made = telemetry(size=5)
    for i in range(12):
        made.finished(finished(tier=i % 3, tokens=i, request_id=f"r{i}"))
    snapshot = made.snapshot()
    assert snapshot["requests_total"] == 12
    assert [request["request_id"] for request in snapshot["requests"]] == [
        *("r11", "r10", "r9", "r8", "r7"),
    ]
    assert [tier["requests"] for tier in snapshot["tiers"]] == [1, 2, 2]  # of 7 .. 11
    assert [tier["completion_tokens"] for tier in snapshot["tiers"]] == [9, 17, 19]
    assert len(made.snapshot(2)["requests"]) == 2
    assert made.snapshot(0)["requests"] == made.snapshot(-1)["requests"] == []


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.floats(0, 1e6)), max_size=30),
    st.integers(1, 12),
)
def test_sums_are_those_of_the_ring(events: list[tuple[int, int, float]], size: int) -> None:
    made = telemetry(size=size, access_log=False)
    for tier, tokens, flops in events:
        made.finished(finished(tier, tokens, flops=flops))
    snapshot, last = made.snapshot(), events[-size:]
    assert len(snapshot["requests"]) == len(last)
    for tier, of_tier in enumerate(snapshot["tiers"]):
        mine = [event for event in last if event[0] == tier]
        assert of_tier["requests"] == len(mine)
        assert of_tier["share"] == pytest.approx(len(mine) / max(len(last), 1))
        assert of_tier["completion_tokens"] == sum(tokens for _, tokens, _ in mine)
        assert of_tier["flops"] == pytest.approx(sum(flops for _, _, flops in mine))
    assert sum(snapshot["decided_by"].values()) == len(last)
    assert snapshot["savings"]["flops"] == pytest.approx(sum(flops for _, _, flops in last))


def test_percentiles_and_speed() -> None:
    ttft = [float(i) for i in range(1, 101)]
    made = telemetry(*(finished(1, 11, ttft_ms=t, total_ms=t + 100.0) for t in ttft))
    tier = made.snapshot()["tiers"][1]
    assert tier["ttft_ms"] == {
        "p50": pytest.approx(np.percentile(ttft, 50)),
        "p95": pytest.approx(np.percentile(ttft, 95)),
    }
    assert tier["total_ms"]["p50"] == pytest.approx(np.percentile(ttft, 50) + 100.0)
    assert tier["tokens_per_s"] == pytest.approx(100.0)  # ten tokens after the first in 100 ms


def test_a_completion_without_a_token_has_no_time_to_the_first() -> None:
    made = telemetry(finished(0, 0, finish_reason="timeout", ttft_ms=9000.0, total_ms=9000.0))
    tier = made.snapshot()["tiers"][0]
    assert tier["ttft_ms"] == {"p50": None, "p95": None}
    assert tier["total_ms"]["p50"] == 9000.0
    assert tier["tokens_per_s"] is None


def test_savings() -> None:
    escalated = finished(2, 6, flops=700.0, tier_tokens=(2, 0, 4), decided_by="escalation")
    savings = telemetry(finished(0, 4, flops=300.0), escalated).snapshot()["savings"]
    assert savings["flops"] == 1000.0
    assert savings["flops_always_top"] == (10 + 4 + 10 + 6) * TOP_FLOPS
    assert savings["ratio"] == pytest.approx(1000.0 / savings["flops_always_top"])
    expected = (6 * PARAMS[0] + 4 * PARAMS[2]) / 10
    assert savings["activated_params_mean"] == pytest.approx(expected)
    assert savings["activated_params_top"] == PRICE.tiers[-1].activated_params


def test_what_was_never_run_saves_nothing() -> None:
    gone = finished(0, 0, flops=0.0, finish_reason="cancelled")
    assert telemetry(gone).snapshot()["savings"]["flops_always_top"] == 0.0
    part = finished(0, 3, finish_reason="cancelled")
    assert telemetry(part).snapshot()["savings"]["flops_always_top"] == 13 * TOP_FLOPS
    scored = finished(0, 0, finish_reason="length")  # a prompt that was read, and that is all
    assert telemetry(scored).snapshot()["savings"]["flops_always_top"] == 10 * TOP_FLOPS


def test_completions_of_one_prompt_share_its_reading() -> None:
    four = [finished(0, 5, n=4) for _ in range(4)]
    savings = telemetry(*four).snapshot()["savings"]
    assert savings["flops_always_top"] == (10 + 4 * 5) * TOP_FLOPS


def test_reasons_and_rejections_are_counted() -> None:
    made = telemetry(finished(decided_by="cap"), finished(decided_by="cap"), finished())
    made.rejected("/v1/completions", "queue_full", 429)
    made.rejected("/v1/completions", "queue_full", 429)
    made.rejected("other", "too_large", 413)
    snapshot = made.snapshot()
    assert snapshot["decided_by"]["cap"] == 2 and snapshot["decided_by"]["tier_map"] == 1
    assert snapshot["rejected"] == {"queue_full": 2, "too_large": 1}


def test_throughput_is_in_spans_of_two_seconds() -> None:
    now = [NOW]
    made = telemetry(clock=lambda: now[0])
    made.finished(finished(0, 5, finished_at=NOW - 10))
    made.finished(finished(2, 7, tier_tokens=(3, 0, 4), finished_at=NOW))
    made.finished(finished(0, 1, finished_at=NOW + 1))
    made.finished(finished(0, 2, finished_at=NOW + 3))
    now[0] = NOW + 3
    spans = made.snapshot()["throughput"]
    assert len(spans) == NUM_BUCKETS
    times = [span["t"] for span in spans]
    assert np.diff(times).tolist() == [BUCKET_SECONDS] * (NUM_BUCKETS - 1)
    assert times[-1] <= now[0] < times[-1] + BUCKET_SECONDS
    found = {span["t"] - NOW: span for span in spans if any(span["requests"].values())}
    assert {t: span["tokens"] for t, span in found.items()} == {
        -10.0: {"base": 5, "middle": 0, "top": 0},
        0.0: {"base": 4, "middle": 0, "top": 4},
        2.0: {"base": 2, "middle": 0, "top": 0},
    }
    assert found[0.0]["requests"] == {"base": 1, "middle": 0, "top": 1}
    now[0] = NOW + 2 * BUCKET_SECONDS * NUM_BUCKETS
    assert not any(sum(span["tokens"].values()) for span in made.snapshot()["throughput"])


def test_throughput_keeps_two_minutes_even_if_the_clock_is_set_back() -> None:
    made = telemetry()
    for i in range(500):
        made.finished(finished(finished_at=NOW + BUCKET_SECONDS * i))
    assert len(made._throughput._buckets) == NUM_BUCKETS
    for i in range(10):
        made.finished(finished(finished_at=NOW - 1e6 + BUCKET_SECONDS * i))
    assert len(made._throughput._buckets) == 10


def test_drift_and_a_new_tier_map() -> None:
    made = telemetry(*(finished(difficulty=0.9) for _ in range(200)), finished(difficulty=None))
    difficulty = made.snapshot()["difficulty"]
    assert difficulty["drift"] > 0.25
    assert difficulty["drift_requests"] == 200
    made.set_tier_map(tier_map(thresholds=(0.1, 0.2), upper_cut=0.9))
    difficulty = made.snapshot()["difficulty"]
    assert (difficulty["thresholds"], difficulty["upper_cut"]) == ([0.1, 0.2], 0.9)
    assert difficulty["calibration_counts"] is difficulty["drift"] is None
    assert difficulty["drift_requests"] == 200


def test_the_window_bounds_what_drift_is_measured_on() -> None:
    made = telemetry(*(finished() for _ in range(30)), window=20)
    assert made.snapshot()["difficulty"]["drift_requests"] == 20


# -- access log ---------------------------------------------------------------------------------


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="dvpa.access"):
        yield caplog


def lines(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "dvpa.access"]


def test_one_line_for_each_completion(log: pytest.LogCaptureFixture) -> None:
    telemetry(finished(1, is_stream=True), finished(difficulty=None))
    first, second = (json.loads(line) for line in lines(log))
    assert list(first) == [
        *("ts", "request_id", "endpoint", "status", "stream", "model", "finish_reason", "tier"),
        *("tier_name", "difficulty", "decided_by", "activated_params", "flops", "prompt_tokens"),
        *("completion_tokens", "escalations", "queue_ms", "score_ms", "ttft_ms", "total_ms"),
    ]
    assert (first["ts"], first["status"], first["stream"]) == (NOW, 200, True)
    assert (first["tier"], first["tier_name"], first["total_ms"]) == (1, "middle", 60.0)
    assert second["difficulty"] is None
    scalars = {k for k, v in finished().record.to_dict().items() if not isinstance(v, list)}
    assert scalars <= set(first)  # every scalar of the record is there


def test_one_line_for_each_rejection(log: pytest.LogCaptureFixture) -> None:
    telemetry().rejected("/v1/completions", "queue_full", 429)
    [line] = lines(log)
    assert json.loads(line) == {
        "ts": NOW,
        "endpoint": "/v1/completions",
        "status": 429,
        "reason": "queue_full",
    }


def test_the_log_can_be_off(log: pytest.LogCaptureFixture) -> None:
    telemetry(finished(), access_log=False).rejected("other", "too_large", 413)
    assert lines(log) == []


@pytest.mark.parametrize(
    "request_id",
    [
        'x"}\n{"ts": 0, "status": 200',
        "x\r\n127.0.0.1 - admin",
        "\x1b[2J\x1b[31m",
        "\u2028\u2029\x85\x0b\x0c\x00",
        "%s %d %(ts)s {ts}",
        "\ud800",
        "\u202egnp.exe",
    ],
)
def test_a_request_id_cannot_forge_a_line(log: pytest.LogCaptureFixture, request_id: str) -> None:
    telemetry(finished(request_id=request_id, model=request_id, endpoint=request_id))
    [line] = lines(log)
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["request_id"] == request_id
    assert set(json.loads(line)) == LOGGED


@given(st.text())
def test_any_request_id_stays_one_line_of_ascii(request_id: str) -> None:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dvpa.access")
    logger.addHandler(handler)
    level, logger.level = logger.level, logging.INFO
    try:
        telemetry(finished(request_id=request_id)).rejected(request_id, request_id, 400)
    finally:
        logger.removeHandler(handler)
        logger.level = level
    assert len(seen) == 2
    assert all(line.isascii() and line.isprintable() for line in seen)
    assert json.loads(seen[0])["request_id"] == json.loads(seen[1])["endpoint"] == request_id


# -- tracing ------------------------------------------------------------------------------------


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes the place of the collector."""
    pytest.importorskip("opentelemetry.sdk")
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    module = pytest.importorskip(name)
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    memory = InMemorySpanExporter()

    def make(endpoint: str | None) -> InMemorySpanExporter:
        assert endpoint == "http://collector:4318/v1/traces"
        return memory

    monkeypatch.setattr(module, "OTLPSpanExporter", make)
    return memory


def spans(exporter: Any, *events: Finished) -> list[Any]:
    made = Tracing(True, "http://collector:4318/v1/traces")
    for event in events:
        made.finished(event)
    made.close()
    return list(exporter.get_finished_spans())


def test_a_span_for_each_completion(exporter: Any) -> None:
    chat = finished(1, endpoint="/v1/chat/completions", is_stream=True)
    whole = finished(0, 0, difficulty=None, max_tokens=0, finish_reason="length")
    first, second = spans(exporter, chat, whole)
    assert first.name == "chat tiny"
    assert first.parent is None
    assert first.end_time == int(NOW * 1e9)
    assert first.end_time - first.start_time == 60_000_000
    assert first.attributes["gen_ai.operation.name"] == "chat"
    assert first.attributes["gen_ai.usage.input_tokens"] == 10
    assert first.attributes["gen_ai.usage.output_tokens"] == 5
    assert first.attributes["gen_ai.request.max_tokens"] == 16
    assert first.attributes["gen_ai.request.stream"] is True
    assert first.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert first.attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.02)
    assert first.attributes["dvpa.tier_name"] == "middle"
    assert first.attributes["dvpa.difficulty"] == 0.25
    assert first.attributes["dvpa.tier_tokens"] == (0, 5, 0)
    assert first.resource.attributes["service.name"] == "dvpa"
    assert first.status.is_unset
    assert second.name == "text_completion tiny"
    absent = {"dvpa.difficulty", "gen_ai.response.time_to_first_chunk", "gen_ai.request.max_tokens"}
    assert not absent & set(second.attributes)


def test_span_attributes_are_known_and_hold_no_text(exporter: Any) -> None:
    [span] = spans(exporter, finished())
    of_record = {f"dvpa.{name}" for name in finished().record.to_dict()}
    for name in span.attributes:
        assert name in of_record or name.startswith(("gen_ai.", "http."))
        assert "prompt" not in name and "message" not in name and "completion" not in name


@pytest.mark.parametrize("reason", ["error", "timeout", "cancelled"])
def test_a_failure_marks_the_span(exporter: Any, reason: str) -> None:
    [span] = spans(exporter, finished(finish_reason=reason))
    assert span.status.is_ok is (reason == "cancelled")
    assert span.attributes.get("error.type") == (None if reason == "cancelled" else reason)


def test_tracing_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match=r"otel_endpoint: .*dvpa\[otel\]"):
        Tracing(True, None)


def test_without_tracing_its_packages_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["opentelemetry", *(n for n in sys.modules if n.startswith("opentelemetry."))]:
        monkeypatch.setitem(sys.modules, name, None)
    fresh = importlib.reload(tracing)
    off = fresh.Tracing(False, None)
    off.finished(finished())
    off.close()
