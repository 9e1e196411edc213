"""Records the spans of requests with OpenTelemetry, and exports them over OTLP in a thread."""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, set_span_in_context

from cifarx_serve.server.tracing.request_span import Attributes, RequestSpan, epoch_ns
from cifarx_serve.system.versions import package_version

TRACES_PATH: Final = "/v1/traces"

_NAME: Final = "cifarx-serve"
"""The name of the service, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` states another one."""

_QUEUE_FULL: Final = "Queue full"
"""The start of what OpenTelemetry logs about spans for which its queue has no room."""

_FLUSH_TIMEOUT_S: Final = 2.0
"""How long a server that drains waits until the spans are exported; a collector may not respond."""

_FLUSH_POLL_S: Final = 0.01


class RequestTracer:
    """Starts the spans of requests.

    Args:
        exporter: exports the spans; it is called in a thread.
        share: the share of the traces that begin here to record; by default all, or what `OTEL_TRACES_SAMPLER` says.
        on_event: called with a line of text for each event.

    Raises:
        ValueError: a variable of OpenTelemetry has an invalid value.
    """

    def __init__(self, exporter: SpanExporter, share: float | None, on_event: Callable[[str], None]) -> None:
        sampler = None if share is None else ParentBased(TraceIdRatioBased(share))
        self._provider = TracerProvider(sampler, _resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False  # it would log every batch that fails, which `OtlpExporter` reports
        logger.handlers = [_LossHandler(on_event)]
        self._tracer = self._provider.get_tracer("cifarx_serve", package_version())

    def start(self, name: str, started_at: float, headers: Mapping[str, str], attributes: Attributes) -> RequestSpan:
        """Start the span of a request.

        Args:
            name: its name, as long as the route is not known.
            started_at: when the request arrived, on the clock of `time.perf_counter`.
            headers: its headers in lower case; the span continues the trace of `traceparent`.
            attributes: what is known of the request.
        """
        parent = extract(headers)
        start = epoch_ns(started_at)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, dict(attributes), start_time=start)
        return RequestSpan(self._tracer, span, set_span_in_context(span, parent))

    async def close(self) -> None:
        """Export the spans that have ended, within a time limit."""
        flushing = threading.Thread(target=self._provider.shutdown, name="flush-traces", daemon=True)
        flushing.start()
        end = asyncio.get_running_loop().time() + _FLUSH_TIMEOUT_S
        while flushing.is_alive() and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_FLUSH_POLL_S)


class OtlpExporter(SpanExporter):
    """Exports spans to a collector over OTLP/HTTP, and reports when it begins to fail and when it works again.

    Args:
        endpoint: the URL of the collector, such as `http://127.0.0.1:4318`, to which `TRACES_PATH` is added.
        on_event: called with a line of text, in the thread of the exporter.

    Raises:
        ValueError: a variable of OpenTelemetry has an invalid value.
    """

    def __init__(self, endpoint: str, on_event: Callable[[str], None]) -> None:
        base = endpoint.rstrip("/")
        self._url = base if base.endswith(TRACES_PATH) else base + TRACES_PATH
        self._exporter = OTLPSpanExporter(self._url)
        self._on_event = on_event
        self._failing = False
        self._lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export spans; those of a failed export are lost."""
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed:
            self._lost += len(spans)
            if not self._failing:
                self._on_event(f"cannot export traces to {self._url}: start a collector there that takes OTLP/HTTP")
        elif self._failing:
            self._on_event(f"exports traces to {self._url} again; {self._lost:,} spans were lost")
            self._lost = 0
        self._failing = failed
        return result

    def shutdown(self) -> None:
        """End the exporter, and the attempts to repeat an export."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


class _LossHandler(logging.Handler):
    """Reports once that spans are lost because they are recorded faster than they are exported."""

    def __init__(self, on_event: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._on_event = on_event
        self._reported = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._reported and str(record.msg).startswith(_QUEUE_FULL):
            self._reported = True
            self._on_event("loses spans, which are recorded faster than exported: lower --trace-share")


def _resource() -> Resource:
    resource = Resource.create({SERVICE_VERSION: package_version()})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: _NAME}))
    return resource
