import asyncio
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import BinaryIO

from cifarx_serve.server.http.access_log import AccessLog, AccessRecord


def record(name: str, cause: str | None = None) -> AccessRecord:
    return AccessRecord(datetime.now(UTC), name, "127.0.0.1", "GET", "/\n\u2028é", 200, 1.25, 12, 99, cause)


class Counted(io.BytesIO):
    writes = 0

    def write(self, data: object) -> int:
        self.writes += 1
        return super().write(data)  # type: ignore[arg-type]


def test_a_request_is_one_line_of_json() -> None:
    file = io.BytesIO()

    async def run() -> None:
        log = AccessLog(file)
        log.write(record("a"))
        log.write(record("b", "not_found"))
        log.flush()

    asyncio.run(run())
    first, second = file.getvalue().decode().split("\n")[:-1]
    assert json.loads(first) == {
        "time": json.loads(first)["time"],
        "id": "a",
        "client": "127.0.0.1",
        "method": "GET",
        "path": "/\n\u2028é",
        "status": 200,
        "ms": 1.25,
        "bytes": 12,
        "worker": 99,
    }
    assert json.loads(second)["cause"] == "not_found"


def test_lines_are_written_soon_and_together() -> None:
    file = Counted()

    async def run() -> None:
        log = AccessLog(file)
        for name in "abc":
            log.write(record(name))
        assert file.getvalue() == b""
        async with asyncio.timeout(10):
            while not file.getvalue():
                await asyncio.sleep(0.01)
        assert [json.loads(line)["id"] for line in file.getvalue().splitlines()] == ["a", "b", "c"]
        log.write(record("d"))
        async with asyncio.timeout(10):
            while file.writes < 2:
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert file.writes == 2
    assert len(file.getvalue().splitlines()) == 4


@contextmanager
def broken_pipe() -> Iterator[BinaryIO]:
    reading, writing = os.pipe()
    os.close(reading)
    file = os.fdopen(writing, "wb", buffering=0)
    with file:
        yield file


def test_a_reader_that_left_ends_nothing() -> None:
    async def run(file: BinaryIO) -> None:
        log = AccessLog(file)
        for name in "ab":
            log.write(record(name))
            log.flush()

    with broken_pipe() as file:
        asyncio.run(run(file))


def test_the_time_is_utc() -> None:
    file, line = io.BytesIO(), record("a")

    async def run() -> None:
        log = AccessLog(file)
        log.write(line)
        log.flush()

    asyncio.run(run())
    written = json.loads(file.getvalue())["time"]
    assert written.endswith("Z")
    assert datetime.fromisoformat(written) == line.time
