"""Check that hostile clients did not harm a running server."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tests.support.server_process import ServerProcess


@contextmanager
def unharmed(server: ServerProcess) -> Iterator[None]:
    """Check after the block that the same workers run, and that they have logged no errors."""
    workers = server.workers()
    printed, logged = server.err, server.out.count("\n")
    yield
    assert server.workers() == workers
    # libtiff prints the errors of a file to standard error itself.
    assert not re.search("Traceback|[Ee]xception|error|note", server.err.removeprefix(printed)), server.err
    *lines, _ = server.out.split("\n")  # the last line may be incomplete
    records = [json.loads(line) for line in lines[logged:]]
    assert not [record for record in records if record.get("cause") == "internal"]


def memory(workers: list[psutil.Process]) -> float:
    """Return the memory of the workers, in MiB."""
    return float(sum(worker.memory_info().rss for worker in workers) / 2**20)
