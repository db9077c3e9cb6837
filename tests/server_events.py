"""A served model without its weights, and ends of completions, for the tests of the telemetry."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from helpers import tiny_config
from prometheus_client.parser import text_string_to_metric_families

from dvpa.pricing import price
from dvpa.server.backend import EngineStats, ModelInfo
from dvpa.server.telemetry import Finished, Telemetry
from dvpa.tiers import TelemetryRecord, TierMap

NAMES = ("base", "middle", "top")
PRICE = price(tiny_config())
PARAMS = tuple(tier.activated_params for tier in PRICE.tiers)
TOP_FLOPS = PRICE.tiers[-1].flops_per_token
NOW = 1_800_000_000.0
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
Series = dict[str, dict[tuple[tuple[str, str], ...], float]]


def tier_map(histogram: Sequence[Any] | None = None, **changes: Any) -> TierMap:
    """A threshold map, with a calibration histogram or without."""
    statistics = None if histogram is None else {"difficulty_histogram": list(histogram)}
    values: dict[str, Any] = {
        "default_tier": 2,
        "thresholds": (0.3, 0.7),
        "statistics": statistics,
        **changes,
    }
    costs = tuple(float(params) for params in PARAMS)
    return TierMap("threshold", NAMES, costs, **values)


def model_info(histogram: Sequence[Any] | None = None) -> ModelInfo:
    """The tiny model of `helpers`."""
    return ModelInfo("tiny", tiny_config(), PRICE, tier_map(histogram))


def finished(tier: int = 0, tokens: int = 5, **changes: Any) -> Finished:
    """A completion that ended; any field of Finished or of its record can be changed."""
    record: dict[str, Any] = {
        "request_id": "cmpl-1",
        "tier": tier,
        "tier_name": NAMES[tier],
        "difficulty": 0.25,
        "success_by_tier": (),
        "decided_by": "tier_map",
        "thresholds": (0.3, 0.7),
        "activated_params": PARAMS[tier],
        "flops": 1000.0,
        "prompt_tokens": 10,
        "completion_tokens": tokens,
        "tier_tokens": tuple(tokens if t == tier else 0 for t in range(3)),
        "escalations": 0,
        "queue_ms": 2.0,
        "score_ms": 4.0,
        "ttft_ms": 20.0,
        "total_ms": 60.0,
    }
    event: dict[str, Any] = {
        "finish_reason": "stop",
        "endpoint": "/v1/completions",
        "is_stream": False,
        "model": "tiny",
        "status": 200,
        "finished_at": NOW,
        "max_tokens": 16,
        "n": 1,
    }
    for name, value in changes.items():
        (event if name in {f.name for f in fields(Finished)} else record)[name] = value
    return Finished(TelemetryRecord(**record), **event)


def telemetry(*events: Finished, histogram: list[int] | None = None) -> Telemetry:
    """Telemetry that has been told of these ends."""
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
    """One sample."""
    return series[name][tuple(sorted(labels.items()))]
