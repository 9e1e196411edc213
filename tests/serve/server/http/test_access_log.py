import asyncio
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import BinaryIO

from cifarx_serve.server.http.access_log import AccessLog, AccessRecord


def make_record(request_id: str, cause: str | None = None) -> AccessRecord:
    return AccessRecord(datetime.now(UTC), request_id, "127.0.0.1", "GET", "/\n\u2028é", 200, 1.25, 12, 99, cause)


class CountingFile(io.BytesIO):
    writes = 0

    def write(self, data: object) -> int:
        self.writes += 1
        return super().write(data)  # type: ignore[arg-type]


def test_writes_one_line_of_json_per_request() -> None:
    file = io.BytesIO()

    async def run() -> None:
        log = AccessLog(file)
        log.write(make_record("a"))
        log.write(make_record("b", "not_found"))
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


def test_buffers_lines_and_writes_them_together() -> None:
    file = CountingFile()

    async def run() -> None:
        log = AccessLog(file)
        for request_id in "abc":
            log.write(make_record(request_id))
        assert file.getvalue() == b""
        async with asyncio.timeout(10):
            while not file.getvalue():
                await asyncio.sleep(0.01)
        assert [json.loads(line)["id"] for line in file.getvalue().splitlines()] == ["a", "b", "c"]
        log.write(make_record("d"))
        async with asyncio.timeout(10):
            while file.writes < 2:
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert file.writes == 2
    assert len(file.getvalue().splitlines()) == 4


@contextmanager
def broken_pipe() -> Iterator[BinaryIO]:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    file = os.fdopen(write_fd, "wb", buffering=0)
    with file:
        yield file


def test_ignores_a_closed_pipe() -> None:
    async def run(file: BinaryIO) -> None:
        log = AccessLog(file)
        for request_id in "ab":
            log.write(make_record(request_id))
            log.flush()

    with broken_pipe() as file:
        asyncio.run(run(file))


def test_writes_the_time_in_utc() -> None:
    file, record = io.BytesIO(), make_record("a")

    async def run() -> None:
        log = AccessLog(file)
        log.write(record)
        log.flush()

    asyncio.run(run())
    written = json.loads(file.getvalue())["time"]
    assert written.endswith("Z")
    assert datetime.fromisoformat(written) == record.time
