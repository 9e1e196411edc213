"""Which responses are compressed, and how; `test_request` has compressed requests."""

import asyncio
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.server.http.compression import compress_response
from cifarx_serve.server.http.response import Response

LONG = b"0123456789" * 103


def compress(body: bytes, accepted: bytes) -> Response:
    return asyncio.run(compress_response(Response(body, headers=((b"x", b"y"),)), accepted))


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (b"gzip", b"gzip"),
        (b"deflate", b"deflate"),
        (b"gzip, deflate, br", b"gzip"),
        (b"deflate, gzip", b"gzip"),
        (b"gzip;q=0.5, deflate", b"deflate"),
        (b"GZIP ; q=1.000", b"gzip"),
        (b"gzip;q=0", None),
        (b"identity", None),
        (b"br", None),
        (b"*", None),
        (b"", None),
        (b"gzip;q=high", None),
    ],
)
def test_a_response_is_compressed_as_the_client_accepts_it(accepted: bytes, coding: bytes | None) -> None:
    response = compress(LONG, accepted)
    headers = dict(response.headers)
    assert headers.get(b"content-encoding") == coding
    assert headers[b"x"] == b"y"
    if coding is None:
        assert response.body == LONG
        return
    assert headers[b"vary"] == b"accept-encoding"
    assert len(response.body) < len(LONG) / 5
    assert (gzip.decompress if coding == b"gzip" else zlib.decompress)(response.body) == LONG


def test_short_responses_are_not_compressed() -> None:
    assert compress(LONG[:1023], b"gzip") == Response(LONG[:1023], headers=((b"x", b"y"),))


def test_long_responses_are_compressed() -> None:
    assert gzip.decompress(compress(LONG * 1000, b"gzip").body) == LONG * 1000


@given(st.binary())
def test_any_header_is_understood_or_ignored(accepted: bytes) -> None:
    response = compress(LONG, accepted)
    assert response.body == LONG or dict(response.headers)[b"content-encoding"] in (b"gzip", b"deflate")
