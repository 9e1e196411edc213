"""Compressed bodies: gzip and deflate, of requests within the limit of a body, and of responses where it pays off.

Source: RFC 9110, sections 8.4.1 and 12.5.3. `deflate` is a zlib stream (RFC 1950).
"""

import asyncio
import re
import zlib
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Final

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.response import Response

_WINDOW_BITS: Final = {b"gzip": 31, b"deflate": 15}
"""The argument `wbits` of zlib by coding; the first coding is preferred."""

ACCEPTED: Final = ((b"accept-encoding", b"gzip, deflate, identity"),)
"""The header of a response to a request with another coding."""

_PIECE_BYTES: Final = 1 << 18
"""So much is decompressed at a time, in about a millisecond; other requests are served before the next piece."""

_LEVEL: Final = 1
_MIN_RESPONSE_BYTES: Final = 1024
"""A shorter response fits into one packet, so compressing it saves no time."""

_MAX_INLINE_BYTES: Final = 1 << 16
"""A longer response is compressed in a thread."""

_CODING: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9a-z-]+)(?:\s*;\s*q=([01](?:\.[0-9]{0,3})?))?")


class Decompressor:
    """Decompresses one body.

    Args:
        coding: the value of the header Content-Encoding.
        max_bytes: the maximum size of the body once decompressed.

    Raises:
        RequestError: the coding is not supported (415).
    """

    def __init__(self, coding: bytes, max_bytes: int) -> None:
        self._coding = coding.strip().lower()
        window_bits = _WINDOW_BITS.get(self._coding)
        if window_bits is None:
            problem = f"the body has the encoding {coding[:20].decode('latin-1')!r}"
            remedy = "send it with Content-Encoding gzip or deflate, or without"
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, problem, remedy, ACCEPTED)
        self._zlib = zlib.decompressobj(window_bits)
        self._bytes_left = max_bytes
        self._max_bytes = max_bytes

    async def decompress(self, chunk: bytes) -> AsyncIterator[bytes]:
        """Yield the next part of the body, in pieces.

        Raises:
            RequestError: the data is damaged (400), or the body is too large (413).
        """
        piece = b""
        while chunk or len(piece) == _PIECE_BYTES:  # zlib can hold more output without any input left
            if piece:
                await asyncio.sleep(0)
            try:
                piece = self._zlib.decompress(chunk, _PIECE_BYTES)
            except zlib.error as error:
                raise self._invalid(f"({error})") from error
            if self._zlib.unused_data:
                raise self._invalid(f"({len(self._zlib.unused_data)} bytes follow its end)")
            self._bytes_left -= len(piece)
            if self._bytes_left < 0:
                problem = f"the decompressed body is over the limit of {self._max_bytes:,} bytes"
                raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, "send smaller or fewer images")
            yield piece
            chunk = self._zlib.unconsumed_tail

    def require_end(self) -> None:
        """Check that the body is complete.

        Raises:
            RequestError: it is not (400).
        """
        if not self._zlib.eof:
            raise self._invalid("(its end is missing)")

    def _invalid(self, reason: str) -> RequestError:
        problem = f"the body is not valid {self._coding.decode()} {reason}"
        return RequestError(HTTPStatus.BAD_REQUEST, problem, "compress all of it, and nothing else")


async def compress_response(response: Response, accept_encoding: bytes) -> Response:
    """Return a response as the client accepts it: compressed if it asks for that and the body is long enough.

    Args:
        response: the response.
        accept_encoding: the value of the request's header Accept-Encoding.
    """
    if len(response.body) < _MIN_RESPONSE_BYTES or (coding := _accepted_coding(accept_encoding)) is None:
        return response
    if len(response.body) <= _MAX_INLINE_BYTES:
        body = _compress(response.body, coding)
    else:
        body = await asyncio.to_thread(_compress, response.body, coding)
    headers = (*response.headers, (b"content-encoding", coding), (b"vary", b"accept-encoding"))
    return response._replace(body=body, headers=headers)


def _accepted_coding(header: bytes) -> bytes | None:
    """Return the preferred one of the codings that a client accepts; None if it accepts none of them."""
    qualities: dict[bytes, float] = {}
    for part in header.lower().split(b","):
        if match := _CODING.fullmatch(part.strip()):
            qualities[match[1]] = float(match[2] or 1)
    best = max(_WINDOW_BITS, key=lambda coding: qualities.get(coding, 0.0))
    return best if qualities.get(best, 0.0) > 0 else None


def _compress(body: bytes, coding: bytes) -> bytes:
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[coding])
    return compressor.compress(body) + compressor.flush()
