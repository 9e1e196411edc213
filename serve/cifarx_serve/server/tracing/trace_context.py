"""The headers of W3C Trace Context, without OpenTelemetry: the access log also names traces of others."""

import re
from typing import Final

TRACEPARENT: Final = b"traceparent"

TRACERESPONSE: Final = b"traceresponse"
"""The header of a response with the trace and the span of its request, in the format of `traceparent`.

It is that of W3C Trace Context Level 2 and of OpenTelemetry's response propagator; `traceparent` is one of requests.
"""

_TRACEPARENT: Final = re.compile(rb"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def parse_trace_id(traceparent: bytes | None) -> str | None:
    """Return the trace ID in a `traceparent` header, 32 hexadecimal digits; None without a valid header."""
    match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    return match[1].decode() if match else None
