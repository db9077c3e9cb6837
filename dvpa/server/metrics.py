"""Prometheus metrics: vLLM's names behind the prefix `dvpa_`, with a `tier` label. No HTTP.

What completions tell is counted as they end; what the engine counts itself is read at every scrape.
Label values are tiers and reasons of ours, never anything that a client can make up, so that there
is no text of a request in the output and no end to the number of series.

Left out: metrics of the process (memory, CPU), which its host exports better.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import nan

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import Metric

from dvpa import __version__
from dvpa.server.backend import EngineStats, ModelInfo
from dvpa.server.engine_metrics import EngineCollector
from dvpa.tiers.drift import NUM_BINS
from dvpa.tiers.record import DECIDED_BY, TelemetryRecord
from dvpa.tiers.tier_map import TierMap

SHADOWS = ("done", "skipped", "failed")
ANSWERED = ("stop", "length")  # finish reasons of completions that came to their own end
REJECTIONS = (
    "queue_full",
    "too_large",
    "unauthorized",
    "draining",
    "loading",
    "bad_request",
    "not_found",
    "timeout",
    "error",
    "internal_error",
)


def _steps(digits: Sequence[float], first: int, last: int) -> list[float]:
    """Bounds of buckets: each digit in the decades 10**first .. 10**last."""
    return [float(f"{d}e{power}") for power in range(first, last + 1) for d in digits]


_SECONDS = _steps((1, 1.6, 2.5, 4, 6.3), -3, 2)
_SHORT_SECONDS = _steps((1, 1.6, 2.5, 4, 6.3), -4, 0)
_LENGTHS = _steps((1, 2, 5), 0, 9)
_COMPLETIONS = _steps((1, 2, 5), 0, 3)


class _Maker:
    """Makes metrics. Every series of a tier exists from the start: a rate sees its first event."""

    def __init__(self, tier_names: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self._tier_names = tier_names

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def tier_counters(self, name: str, text: str) -> dict[str, Counter]:
        metric = self.counter(name, text, "tier")
        return {tier: metric.labels(tier) for tier in self._tier_names}

    def tier_histograms(
        self, name: str, text: str, buckets: Sequence[float]
    ) -> dict[str, Histogram]:
        metric = self.histogram(name, text, buckets, "tier")
        return {tier: metric.labels(tier) for tier in self._tier_names}


class Metrics:
    """All metrics of one server, in a registry of their own.

    Args:
        drift: the difficulty's drift at present, None while it is unknown.
    """

    def __init__(self, info: ModelInfo, drift: Callable[[], float | None]) -> None:
        make = _Maker(info.config.tier_names)
        self.registry = make.registry
        self._activated_by_tier = [tier.activated_params for tier in info.price.tiers]
        context = info.config.max_position_embeddings
        lengths = [*(step for step in _LENGTHS if step < context), float(context)]
        bins = [step / NUM_BINS for step in range(1, NUM_BINS + 1)]

        self._engine = EngineCollector()
        self.registry.register(self._engine)
        self._requests = make.counter(
            "dvpa_requests_total",
            "Completions by the tier they ended at, how they ended and what decided the tier.",
            *("tier", "finish_reason", "decided_by"),
        )
        self._success = make.counter(
            "dvpa_request_success_total",
            "Completions that came to their own end.",
            *("tier", "finished_reason"),
        )
        self._rejected = make.counter(
            "dvpa_requests_rejected_total", "Requests answered with an error instead.", "reason"
        )
        self._shadows = make.counter(
            "dvpa_shadow_requests_total",
            "Requests that every tier was to answer again, and what came of it.",
            "outcome",
        )
        for outcome in SHADOWS:
            self._shadows.labels(outcome)
        self._prompt_tokens = make.tier_counters(
            "dvpa_prompt_tokens_total", "Tokens of the prompts."
        )
        self._generation_tokens = make.tier_counters(
            "dvpa_generation_tokens_total", "Tokens decoded at the tier."
        )
        self._overrides = make.tier_counters(
            "dvpa_tier_overrides_total", "Completions whose client named the tier."
        )
        self._flops = make.tier_counters(
            "dvpa_flops_total", "FLOPs of the completions, prompts included."
        )
        self._flops_always_top = make.counter(
            "dvpa_flops_always_top_total",
            "FLOPs the completions would have taken at the top tier, nothing cached.",
        )
        self._activated_total = make.counter(
            "dvpa_activated_params_token_total",
            "Sum over the decoded tokens of the parameters that each activated.",
        )
        self._activated_top = make.counter(
            "dvpa_activated_params_token_top_total", "The same sum, had all been of the top tier."
        )
        self._first_token = make.tier_histograms(
            "dvpa_time_to_first_token_seconds", "From arrival to first token.", _SECONDS
        )
        self._inter_token = make.tier_histograms(
            "dvpa_inter_token_latency_seconds", "Between two tokens.", _SHORT_SECONDS
        )
        self._per_token = make.tier_histograms(
            "dvpa_request_time_per_output_token_seconds",
            "Mean of a completion's times between tokens.",
            _SHORT_SECONDS,
        )
        self._whole = make.tier_histograms(
            "dvpa_e2e_request_latency_seconds", "From arrival to the end.", _SECONDS
        )
        self._queue = make.tier_histograms(
            "dvpa_request_queue_time_seconds", "From arrival to the engine.", _SECONDS
        )
        self._prompt_length = make.tier_histograms(
            "dvpa_request_prompt_tokens", "Tokens of a prompt.", lengths
        )
        self._output_length = make.tier_histograms(
            "dvpa_request_generation_tokens", "Tokens of a completion.", lengths
        )
        self._score = make.histogram(
            "dvpa_request_score_time_seconds", "From engine to difficulty.", _SHORT_SECONDS
        )
        self._n = make.histogram("dvpa_request_params_n", "Completions asked for.", _COMPLETIONS)
        self._max_tokens = make.histogram(
            "dvpa_request_params_max_tokens", "Tokens a completion may have.", lengths
        )
        self._difficulty = make.histogram(
            "dvpa_difficulty_score", "Difficulty of the requests that were scored.", bins
        )
        self._activated = make.histogram(
            "dvpa_activated_params",
            "Parameters that a token activates at the tier a completion ended at.",
            self._activated_by_tier,
        )
        Gauge(
            "dvpa_difficulty_drift_psi",
            "Drift of the difficulty against the calibration set; NaN while unknown.",
            registry=self.registry,
        ).set_function(lambda: nan if (index := drift()) is None else index)
        self._tier_map = Info("dvpa_tier_map", "The tier map in force.", registry=self.registry)
        self.set_tier_map(info.tier_map)
        model = Info("dvpa_model", "What is served.", registry=self.registry)
        model.info({"model": info.name, "dvpa_version": __version__})
        for tier, reason in product(info.config.tier_names, ANSWERED):
            self._success.labels(tier, reason)
            for decided_by in DECIDED_BY:
                self._requests.labels(tier, reason, decided_by)
        for reason in REJECTIONS:
            self._rejected.labels(reason)

    def finished(
        self,
        record: TelemetryRecord,
        finish_reason: str,
        *,
        n: int,
        max_tokens: int,
        flops_always_top: float,
    ) -> None:
        """Count one completion that has ended, whatever way."""
        tier, tokens = record.tier_name, record.completion_tokens
        self._requests.labels(tier, finish_reason, record.decided_by).inc()
        if finish_reason in ANSWERED:
            self._success.labels(tier, finish_reason).inc()
        if record.decided_by == "override":
            self._overrides[tier].inc()
        self._prompt_tokens[tier].inc(record.prompt_tokens)
        decoded = zip(self._generation_tokens.values(), record.tier_tokens, strict=True)
        for generation_tokens, count in decoded:
            generation_tokens.inc(count)
        self._flops[tier].inc(record.flops)
        self._flops_always_top.inc(flops_always_top)
        self._activated_total.inc(activated_params(record, self._activated_by_tier))
        self._activated_top.inc(tokens * self._activated_by_tier[-1])
        if tokens > 0:  # else its time to first token is that of its end
            self._first_token[tier].observe(record.ttft_ms / 1000)
        if tokens > 1:
            decoding_ms = record.total_ms - record.ttft_ms
            self._per_token[tier].observe(decoding_ms / 1000 / (tokens - 1))
        self._whole[tier].observe(record.total_ms / 1000)
        self._queue[tier].observe(record.queue_ms / 1000)
        if record.score_ms > 0:
            self._score.observe(record.score_ms / 1000)
        self._prompt_length[tier].observe(record.prompt_tokens)
        self._output_length[tier].observe(tokens)
        self._n.observe(n)
        if max_tokens > 0:
            self._max_tokens.observe(max_tokens)
        if record.difficulty is not None:
            self._difficulty.observe(record.difficulty)
        self._activated.observe(record.activated_params)

    def shadowed(self, outcome: str) -> None:
        """Count one of `SHADOWS`."""
        self._shadows.labels(outcome).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that was answered with an error; `reason` is one word of the server's."""
        self._rejected.labels(reason).inc()

    def inter_token(self, tier_name: str, seconds: float) -> None:
        """Observe the time between two tokens."""
        self._inter_token[tier_name].observe(seconds)

    def set_tier_map(self, tier_map: TierMap) -> None:
        """Show this map from now on."""
        self._tier_map.info(
            {
                "kind": tier_map.kind,
                "is_fitted": str(tier_map.is_fitted).lower(),
                "default_tier": tier_map.tier_names[tier_map.default_tier],
                "thresholds": ",".join(f"{cut:g}" for cut in tier_map.thresholds),
            }
        )

    def render(self, stats: EngineStats) -> bytes:
        """Everything in Prometheus' text format."""
        self._engine.stats = stats
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """The registry's metrics without `_created`, which would double the number of series."""
        for metric in self.registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


def activated_params(record: TelemetryRecord, by_tier: Sequence[int]) -> int:
    """Sum over the completion's decoded tokens of the parameters that each activated."""
    return sum(n * params for n, params in zip(record.tier_tokens, by_tier, strict=True))
