"""A line of JSON for every request, on standard output; written some at a time."""

import asyncio
from datetime import datetime
from typing import BinaryIO, Final

import msgspec

_PAUSE_S: Final = 0.1
"""What a line may wait for others: one write for many is cheaper."""


class AccessRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request; `cause` is what the metrics call its error. Its time is written as RFC 3339 has it."""

    time: datetime
    id: str
    client: str
    method: str
    path: str
    status: int
    ms: float
    bytes: int
    worker: int
    cause: str | None = None


class AccessLog:
    """Writes records to a file; in an event loop."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: list[bytes] = []

    def write(self, record: AccessRecord) -> None:
        """Soon."""
        if not self._lines:
            asyncio.get_running_loop().call_later(_PAUSE_S, self.flush)
        self._lines.append(msgspec.json.encode(record))

    def flush(self) -> None:
        """Now; a reader that left does not end the server."""
        lines, self._lines = self._lines, []
        try:
            self._file.write(b"".join(line + b"\n" for line in lines))
            self._file.flush()
        except OSError:
            return
