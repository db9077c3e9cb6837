"""What the engine counts itself, as Prometheus metrics: read at every scrape, nothing is kept."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dvpa.server.backend import EngineStats

# Name, field of EngineStats, help.
_GAUGES = (
    ("dvpa_num_requests_running", "running", "Requests that the engine is running."),
    ("dvpa_num_requests_waiting", "waiting", "Requests that wait for a place in the engine."),
    ("dvpa_max_queue", "max_queue", "Requests that may wait; one more is refused."),
)
_COUNTERS = (
    ("dvpa_num_preemptions_total", "preemptions", "Running requests that had to give up pages."),
    ("dvpa_prefix_cache_queries_total", "prefix_queries", "Prompt tokens looked up in the cache."),
    ("dvpa_prefix_cache_hits_total", "prefix_hits", "Prompt tokens found in the cache."),
    ("dvpa_engine_steps_total", "steps", "Passes of the engine."),
    ("dvpa_requests_failed_total", "failed", "Requests that the model or engine failed on."),
    ("dvpa_requests_degraded_total", "degraded", "Requests whose tier lacked an expert group."),
    ("dvpa_escalations_total", "escalations", "Moves of a running request to a higher tier."),
    ("dvpa_spec_decode_num_draft_tokens_total", "drafted", "Tokens guessed by a lower tier."),
    ("dvpa_spec_decode_num_accepted_tokens_total", "accepted", "Guessed tokens that were right."),
)


class EngineCollector:
    """The engine's last known numbers; no metrics before the first ones are known."""

    def __init__(self) -> None:
        self.stats: EngineStats | None = None

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client calls at every scrape."""
        stats = self.stats
        if stats is None:
            return
        for name, field, text in _GAUGES:
            yield GaugeMetricFamily(name, text, getattr(stats, field))
        usage = stats.kv_pages_used / stats.kv_pages if stats.kv_pages else 0.0
        yield GaugeMetricFamily("dvpa_kv_cache_usage_perc", "Share of the cache in use.", usage)
        if stats.resident_bytes is not None:
            yield GaugeMetricFamily(
                "dvpa_resident_weight_bytes", "Weights held in memory.", stats.resident_bytes
            )
        for name, field, text in _COUNTERS:
            yield CounterMetricFamily(name, text, getattr(stats, field))
        decisions = CounterMetricFamily(
            "dvpa_decisions_total",
            "Decisions of the policy; fallback: also those that load or a cap then changed.",
            labels=["decided_by"],
        )
        for decided_by, count in stats.decisions.items():
            decisions.add_metric([decided_by], count)
        yield decisions
