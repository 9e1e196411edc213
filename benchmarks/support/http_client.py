"""Load generator: send the same HTTP request over and over, in a process of its own.

usage: python http_client.py URL BODY_FILE HEADERS --connections N --seconds S [--rate R]

HEADERS is a JSON object. Without a rate, each connection sends its next request after the response (closed loop). With
a rate, requests are sent at fixed times regardless of earlier responses (open loop), like many independent clients. A
request that finds no free connection counts as unsent. Prints one JSON object with the latencies per status in
microseconds, measured from the scheduled send time, so that a stall of the generator or the server shows.
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
"""Longest time to wait at the end for responses to requests in flight."""


class Connection(asyncio.Protocol):
    """A keep-alive connection with at most one request in flight."""

    def __init__(self, answered: Callable[["Connection", int, float], None], lost: Callable[["Connection"], None]):
        self._answered, self._lost = answered, lost
        self.scheduled: float | None = None
        self._data = b""
        self._whole = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's transport does not subclass it

    def send(self, request: bytes, scheduled: float) -> None:
        """Write one request, scheduled for a time of `time.perf_counter` (the clock of uvloop ticks every 1 ms)."""
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
            assert scheduled is not None, "a response without a request"
            self._answered(self, status, scheduled)

    def connection_lost(self, _error: Exception | None) -> None:
        self._lost(self)


class Load:
    """The connections, and the counts and latencies of their requests."""

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
        self.in_flight = self.sent = self.unsent = self.broken = 0
        self.latencies: dict[int, list[float]] = defaultdict(list)

    async def open(self) -> None:
        """Open all connections. Lost ones are replaced later."""
        for _ in range(self._connections):
            await self._open_one()

    async def _open_one(self) -> None:
        _, connection = await self._loop.create_connection(lambda: Connection(self._answered, self._lost), *self._place)
        self._idle.append(connection)

    def _send(self, scheduled: float) -> None:
        self._idle.pop().send(self._request, scheduled)
        self.sent += 1
        self.in_flight += 1

    def _answered(self, connection: Connection, status: int, scheduled: float) -> None:
        now = time.perf_counter()
        self.latencies[status].append(now - scheduled)
        self.in_flight -= 1
        self._idle.append(connection)
        if self._closed_until is not None and now < self._closed_until:
            self._send(now)

    def _lost(self, connection: Connection) -> None:
        if connection.scheduled is not None:
            self.broken += 1
            self.in_flight -= 1
        elif connection in self._idle:
            self._idle.remove(connection)
        if not self._ends:
            task = self._loop.create_task(self._open_one())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if task.exception() is not None:  # refused: with a fixed rate, requests then count as unsent
            self.broken += 1

    async def closed_loop(self, seconds: float) -> None:
        """Keep a request in flight on every connection for some seconds (closed loop)."""
        self._closed_until = time.perf_counter() + seconds
        for _ in range(len(self._idle)):
            self._send(time.perf_counter())
        await asyncio.sleep(seconds)

    async def open_loop(self, rate: float, seconds: float) -> None:
        """Send `rate` requests per second for some seconds (open loop)."""
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
        """Wait for the requests in flight; those without a response count as broken."""
        self._ends = True
        end = time.perf_counter() + DRAIN_S
        while self.in_flight and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        self.broken += self.in_flight


def summary(latencies: list[float]) -> dict[str, float]:
    """Return the number of latencies and their percentiles in microseconds."""
    ordered = sorted(latencies)
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] * 1e6 for share in (0.50, 0.99))
    return {"count": len(ordered), "p50_us": p50, "p99_us": p99, "max_us": ordered[-1] * 1e6}


async def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Generate the load and return the counts and latencies."""
    load = Load(asked.url, asked.body.read_bytes(), json.loads(asked.headers), asked.connections)
    await load.open()
    if asked.rate:
        await load.open_loop(asked.rate, asked.seconds)
    else:
        await load.closed_loop(asked.seconds)
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
