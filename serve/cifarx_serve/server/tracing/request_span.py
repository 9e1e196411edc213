"""The span of one request, to which its stages are added."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

Attributes: TypeAlias = Mapping[str, str | int | float]


class RequestSpan:
    """The span of a request. Times are those of `time.perf_counter`.

    Args:
        tracer: creates the spans of the stages.
        span: the span, which has begun.
        context: a context in which it is the parent of new spans.

    Attributes:
        trace_id: the ID of its trace, 32 hexadecimal digits.
        traceresponse: its trace and its own ID as in the header `traceparent`, for the response.
    """

    def __init__(self, tracer: "Tracer", span: "Span", context: "Context") -> None:
        identity = span.get_span_context()
        self.trace_id = f"{identity.trace_id:032x}"
        self.traceresponse = f"00-{self.trace_id}-{identity.span_id:016x}-{identity.trace_flags:02x}".encode()
        self._tracer = tracer
        self._span = span
        self._context = context

    def add_stage(self, name: str, started_at: float, seconds: float, attributes: Attributes) -> None:
        """Record a stage of the request that has ended, such as "decode", as a span of its own.

        Args:
            name: its name.
            started_at: when it began.
            seconds: how long it took.
            attributes: more about it.
        """
        if self._span.is_recording():
            start = epoch_ns(started_at)
            span = self._tracer.start_span(name, self._context, attributes=dict(attributes), start_time=start)
            span.end(start + round(seconds * 1e9))

    def end(self, name: str, attributes: Attributes, error: str | None, ended_at: float) -> None:
        """End the span; it is then exported.

        Args:
            name: its name, now that the route is known.
            attributes: what the response has added to what is known of the request.
            error: what failed in the server; None if nothing did.
            ended_at: when the response was sent.
        """
        if self._span.is_recording():
            self._span.update_name(name)
            self._span.set_attributes(dict(attributes))
            if error is not None:
                from opentelemetry.trace import StatusCode

                self._span.set_attribute("error.type", error)
                self._span.set_status(StatusCode.ERROR)
        self._span.end(epoch_ns(ended_at))


def epoch_ns(at: float) -> int:
    """Return the time since the epoch, in nanoseconds, of a time on the clock of `time.perf_counter`."""
    return time.time_ns() - round((time.perf_counter() - at) * 1e9)
