"""A load generator of HTTP requests that are all the same. A program of its own, so that nothing slows it but its work.

usage: python http_client.py URL BODY_FILE HEADERS --connections N --seconds S [--rate R]

HEADERS is a JSON object. Without a rate each connection sends its next request once it has its answer. With a rate the
requests leave at fixed times, whatever became of those before: the load of many clients who know nothing of each other.
A request that finds no connection free is counted as unsent. Prints one JSON object, latencies by status, in
microseconds: from the time at which the request was to leave, so that a generator or a server that stalls is seen.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
PACE_S = 0.001
DRAIN_S = 15.0
"""How long to wait at the end for what is still to be answered."""


class Connection(asyncio.Protocol):
    """A kept connection with at most one request under way."""

    def __init__(self, answered: Callable[["Connection", int, float], None], lost: Callable[["Connection"], None]):
        self._answered, self._lost = answered, lost
        self.scheduled: float | None = None
        self._data = b""
        self._whole = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is one, and no subclass

    def send(self, request: bytes, scheduled: float) -> None:
        """Write one request that was to leave at that time, by `time.perf_counter`: uvloop's own clock ticks in ms."""
        self.scheduled = scheduled
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._whole:
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return
            length = LENGTH.search(self._data, 0, end + 2)
            assert length is not None, self._data
            self._whole = end + 4 + int(length[1])
        if len(self._data) >= self._whole:
            status, scheduled = int(self._data[9:12]), self.scheduled
            self._data, self._whole, self.scheduled = b"", 0, None
            assert scheduled is not None, "an answer that nobody asked for"
            self._answered(self, status, scheduled)

    def connection_lost(self, _error: Exception | None) -> None:
        self._lost(self)


class Load:
    """The connections, and what came of the requests."""

    def __init__(self, url: str, body: bytes, headers: dict[str, str], connections: int) -> None:
        address = urlsplit(url)
        assert address.hostname and address.port
        self._place = (address.hostname, address.port)
        path = f"{address.path}?{address.query}" if address.query else address.path
        lines = [f"POST {path} HTTP/1.1", f"Host: {address.netloc}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._request = "\r\n".join([*lines, "", ""]).encode() + body
        self._connections = connections
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._closed_until: float | None = None
        self._ends = False
        self.under_way = self.sent = self.unsent = self.broken = 0
        self.latencies: dict[int, list[float]] = defaultdict(list)

    async def open(self) -> None:
        """All connections; later ones take the place of those that are lost."""
        for _ in range(self._connections):
            await self._open_one()

    async def _open_one(self) -> None:
        _, connection = await self._loop.create_connection(lambda: Connection(self._answered, self._lost), *self._place)
        self._idle.append(connection)

    def _send(self, scheduled: float) -> None:
        self._idle.pop().send(self._request, scheduled)
        self.sent += 1
        self.under_way += 1

    def _answered(self, connection: Connection, status: int, scheduled: float) -> None:
        now = time.perf_counter()
        self.latencies[status].append(now - scheduled)
        self.under_way -= 1
        self._idle.append(connection)
        if self._closed_until is not None and now < self._closed_until:
            self._send(now)

    def _lost(self, connection: Connection) -> None:
        if connection.scheduled is not None:
            self.broken += 1
            self.under_way -= 1
        elif connection in self._idle:
            self._idle.remove(connection)
        if not self._ends:
            task = self._loop.create_task(self._open_one())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if task.exception() is not None:  # refused: of a fixed rate the requests then go unsent
            self.broken += 1

    async def answer_by_answer(self, seconds: float) -> None:
        """Every connection always has a request under way."""
        self._closed_until = time.perf_counter() + seconds
        for _ in range(len(self._idle)):
            self._send(time.perf_counter())
        await asyncio.sleep(seconds)

    async def at_rate(self, rate: float, seconds: float) -> None:
        """Requests leave `rate` times a second, on time."""
        started, due = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < seconds:
            for number in range(due, int(passed * rate)):
                if self._idle:
                    self._send(started + number / rate)
                else:
                    self.unsent += 1
            due = int(passed * rate)
            await asyncio.sleep(PACE_S)

    async def drain(self) -> None:
        """Wait for what is under way; what never comes is broken."""
        self._ends = True
        end = time.perf_counter() + DRAIN_S
        while self.under_way and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        self.broken += self.under_way


def summary(latencies: list[float]) -> dict[str, float]:
    """How many, and their percentiles in microseconds."""
    ordered = sorted(latencies)
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] * 1e6 for share in (0.50, 0.99))
    return {"count": len(ordered), "p50_us": p50, "p99_us": p99, "max_us": ordered[-1] * 1e6}


async def run(asked: argparse.Namespace) -> dict[str, Any]:
    """The whole load."""
    load = Load(asked.url, asked.body.read_bytes(), json.loads(asked.headers), asked.connections)
    await load.open()
    if asked.rate:
        await load.at_rate(asked.rate, asked.seconds)
    else:
        await load.answer_by_answer(asked.seconds)
    await load.drain()
    statuses = {str(status): summary(latencies) for status, latencies in sorted(load.latencies.items())}
    return {
        "seconds": asked.seconds,
        "sent": load.sent,
        "unsent": load.unsent,
        "broken": load.broken,
        "statuses": statuses,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("body", type=Path)
    parser.add_argument("headers")
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rate", type=float)
    asked = parser.parse_args()
    sys.stdout.write(json.dumps(uvloop.run(run(asked))))


if __name__ == "__main__":
    main()
