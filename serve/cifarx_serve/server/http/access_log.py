"""The access log: one line of JSON per request."""

import asyncio
from datetime import datetime
from typing import BinaryIO, Final

import msgspec

_FLUSH_INTERVAL_S: Final = 0.1
"""How long a line is buffered: one write of many lines is cheaper than many writes."""


class AccessRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request.

    Attributes:
        time: when the response was sent; written as RFC 3339.
        id: the request ID.
        client: the address of the client, which a trusted proxy may have stated; empty on a Unix socket.
        method: the HTTP method, or gRPC.
        path: the path of the URL, or the full name of the gRPC method.
        status: the HTTP status, or the name of the gRPC status code.
        ms: the duration of the request, in milliseconds.
        bytes: the size of the response body.
        worker: the process ID of the worker.
        cause: the cause of an error, as in the metrics; None for a request without error.
        trace: the ID of the trace of the request; None if it has none.
    """

    time: datetime
    id: str
    client: str
    method: str
    path: str
    status: int | str
    ms: float
    bytes: int
    worker: int
    cause: str | None = None
    trace: str | None = None


class AccessLog:
    """Writes records to a file, buffered. Use it in one event loop."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: list[bytes] = []

    def write(self, record: AccessRecord) -> None:
        """Buffer a record; it is written within a tenth of a second."""
        if not self._lines:
            asyncio.get_running_loop().call_later(_FLUSH_INTERVAL_S, self.flush)
        self._lines.append(msgspec.json.encode(record))

    def flush(self) -> None:
        """Write the buffered records. A closed pipe is ignored, so that it does not stop the server."""
        lines, self._lines = self._lines, []
        try:
            self._file.write(b"".join(line + b"\n" for line in lines))
            self._file.flush()
        except OSError:
            return
