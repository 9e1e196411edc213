"""Start, pause, measure and stop a server on the loopback interface."""

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

PROJECT = Path(__file__).parents[2]
START_S = 60.0
END_S = 20.0
POLL_S = 0.005


class Reply(NamedTuple):
    """The response to one request."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Memory(NamedTuple):
    """Memory of several processes in MiB; `pss` divides shared pages among the processes that share them."""

    pss: float
    rss: float


class ServerProcess:
    """A running server; see `serving`."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.port = port
        self._leader = psutil.Process(process.pid)
        self._process = process
        self._seen: set[psutil.Process] = set()
        self._log_file = log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """Send one request on a new connection. Raises OSError if the server does not listen yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def wait(self, is_ready: Callable[["ServerProcess"], bool]) -> None:
        """Wait until `is_ready` returns True, for at most `START_S` seconds."""
        end = time.perf_counter() + START_S
        while time.perf_counter() < end:
            assert self._process.poll() is None, (
                f"the server exited with status {self._process.returncode}: {self.log()}"
            )
            with suppress(OSError, http.client.HTTPException):
                if is_ready(self):
                    self.processes()  # remember them in case the first process dies
                    return
            time.sleep(POLL_S)
        raise AssertionError(f"the server was not ready after {START_S:g} s: {self.log()}")

    def log(self) -> str:
        """Return the end of its output."""
        return self._log_file.read_text(errors="replace")[-3000:]

    def processes(self) -> list[psutil.Process]:
        """Return the first process and all its descendants."""
        found = [self._leader, *self._leader.children(recursive=True)]
        self._seen.update(found)
        return found

    def memory(self) -> Memory:
        """Return the memory of all its processes."""
        return memory(self.processes())

    def pause(self) -> None:
        """Suspend all its processes: some servers poll their queues, which would slow down the one being measured."""
        for process in self.processes():
            process.suspend()

    def resume(self) -> None:
        for process in self.processes():
            process.resume()

    def stop(self) -> None:
        """Terminate the server, then kill what is left."""
        if self._process.poll() is None:
            self.resume()  # a suspended process does not handle the signal
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        for process in self._seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(self._seen), timeout=5)


def memory(processes: list[psutil.Process]) -> Memory:
    """Return the memory of several processes; those that have exited count as zero."""
    pss, rss = 0, 0
    for process in processes:
        try:
            found = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        pss += getattr(found, "pss", found.rss)  # on Linux only
        rss += found.rss
    return Memory(pss / 2**20, rss / 2**20)


@contextmanager
def serving(command: list[str], folder: Path) -> Iterator[ServerProcess]:
    """Start a server and stop it at the end of the block.

    Args:
        command: the command; `{port}` is replaced by a free port.
        folder: working folder and place of the log file.
    """
    port = free_port()
    log = folder / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},  # the peers import `benchmarks.peers`
            start_new_session=True,  # Ctrl-C reaches pytest, which then stops the servers
        )
    server = ServerProcess(process, port, log)
    try:
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """Return a loopback port that is free at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
