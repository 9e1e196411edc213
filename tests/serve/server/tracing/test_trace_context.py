"""Trace IDs in `traceparent` headers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.server.tracing.trace_context import parse_trace_id

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize("header", [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"cc-{TRACE}-{SPAN}-01-what"])
def test_a_valid_header(header: str) -> None:
    assert parse_trace_id(header.encode()) == TRACE


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f" 00-{TRACE}-{SPAN}-01",
    ],
)
def test_an_invalid_header(header: str | None) -> None:
    assert parse_trace_id(header if header is None else header.encode()) is None


@given(st.binary())
def test_any_header(header: bytes) -> None:
    parsed = parse_trace_id(header)
    assert parsed is None or parsed.encode() in header
