"""OpenTelemetry: one span for every completion, as the generative-AI conventions name things.

Needs the extra `otel`; without it, or with tracing off, nothing is imported and nothing done. Spans
are made when a completion ends, from its record, and sent in batches by a thread of the SDK's own:
a collector that cannot be reached loses spans, never requests. No prompt and no output.

Left out: joining a client's trace, since a record knows nothing of headers.
"""

import os
from typing import TYPE_CHECKING

from dvpa import __version__
from dvpa.server.telemetry import Finished

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ERRORS = ("error", "timeout")  # finish reasons that mark a span as failed
_KNOWN = ("request_id", "prompt_tokens", "completion_tokens")  # have names in the conventions


class Tracing:
    """Sends spans to a collector.

    Args:
        endpoint: where spans go over HTTP, as a whole URL (http://collector:4318/v1/traces). None:
            as OTEL_EXPORTER_OTLP_ENDPOINT says, else the collector's port on this machine.

    Raises:
        ValueError: enabled without the packages it needs.
    """

    def __init__(self, enabled: bool, endpoint: str | None) -> None:
        self._provider: TracerProvider | None = None
        if not enabled:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk import trace as sdk
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError(
                f"otel_endpoint: tracing needs the extra otel, pip install 'dvpa[otel]' ({error})"
            ) from error
        name = os.environ.get("OTEL_SERVICE_NAME", "dvpa")
        service = {"service.name": name, "service.version": __version__}
        self._provider = sdk.TracerProvider(resource=Resource.create(service))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("dvpa", __version__)

    def finished(self, event: Finished) -> None:
        """Make a span of a completion that has ended."""
        if self._provider is None:
            return
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode

        record, reason = event.record, event.finish_reason
        is_chat = event.endpoint.endswith("/chat/completions")
        operation = "chat" if is_chat else "text_completion"
        end = int(event.finished_at * 1e9)
        span = self._tracer.start_span(
            f"{operation} {event.model}",
            context=Context(),
            kind=SpanKind.SERVER,
            start_time=end - int(record.total_ms * 1e6),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "dvpa",
                "gen_ai.request.model": event.model,
                "gen_ai.request.choice.count": event.n,
                "gen_ai.request.stream": event.is_stream,
                "gen_ai.response.id": record.request_id,
                "gen_ai.response.finish_reasons": [reason],
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "http.route": event.endpoint,
                "http.response.status_code": event.status,
            },
        )
        if event.max_tokens:
            span.set_attribute("gen_ai.request.max_tokens", event.max_tokens)
        if record.completion_tokens:
            span.set_attribute("gen_ai.response.time_to_first_chunk", record.ttft_ms / 1000)
        for name, value in record.to_dict().items():
            if value is not None and name not in _KNOWN:
                span.set_attribute(f"dvpa.{name}", value)
        if reason in ERRORS:
            span.set_attribute("error.type", reason)
            span.set_status(StatusCode.ERROR, reason)
        span.end(end_time=end)

    def close(self) -> None:
        """Send what has not been sent yet; later spans are dropped."""
        if self._provider is not None:
            self._provider.shutdown()
