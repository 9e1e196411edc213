"""A server in processes of its own, on loopback: started, waited for, paused, weighed and ended."""

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

START_S = 60.0
END_S = 20.0
POLL_S = 0.005


class Reply(NamedTuple):
    """Of one request."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Memory(NamedTuple):
    """Of processes together, in MiB; `pss` shares out what several have in common."""

    pss: float
    rss: float


class ServerProcess:
    """One that was started; made by `serving`."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.port = port
        self._leader = psutil.Process(process.pid)
        self._process = process
        self._seen: set[psutil.Process] = set()
        self._log = log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
        """One request on a connection of its own; OSError where nobody listens yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def wait(self, is_ready: Callable[["ServerProcess"], bool]) -> None:
        """Until it answers as it should; it is asked every few milliseconds, `START_S` long."""
        end = time.perf_counter() + START_S
        while time.perf_counter() < end:
            assert self._process.poll() is None, f"it ended with {self._process.returncode}: {self.said()}"
            with suppress(OSError, http.client.HTTPException):
                if is_ready(self):
                    self.processes()  # they are known from here on, should the first die
                    return
            time.sleep(POLL_S)
        raise AssertionError(f"it was not ready after {START_S:g} s: {self.said()}")

    def said(self) -> str:
        """The end of what it wrote."""
        return self._log.read_text(errors="replace")[-3000:]

    def processes(self) -> list[psutil.Process]:
        """The first and all that it started."""
        found = [self._leader, *self._leader.children(recursive=True)]
        self._seen.update(found)
        return found

    def memory(self) -> Memory:
        """Of all its processes."""
        return memory(self.processes())

    def pause(self) -> None:
        """Some servers look into their queues all the time: that would cost those whose turn it is."""
        for process in self.processes():
            process.suspend()

    def resume(self) -> None:
        for process in self.processes():
            process.resume()

    def end(self) -> None:
        """Ask it to end, and end what is left."""
        if self._process.poll() is None:
            self.resume()  # a paused process does not hear the signal
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        for process in self._seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(self._seen), timeout=5)


def memory(processes: list[psutil.Process]) -> Memory:
    """Of some processes; those that have ended by now weigh nothing."""
    pss, rss = 0, 0
    for process in processes:
        try:
            found = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        pss += getattr(found, "pss", found.rss)  # Linux has it
        rss += found.rss
    return Memory(pss / 2**20, rss / 2**20)


@contextmanager
def serving(command: list[str], folder: Path) -> Iterator[ServerProcess]:
    """Start a server whose command holds {port}; its output goes to a file in a folder, and it ends with the block."""
    port = free_port()
    log = folder / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            start_new_session=True,  # Ctrl-C is for pytest, which then ends the servers
        )
    server = ServerProcess(process, port, log)
    try:
        yield server
    finally:
        server.end()


def free_port() -> int:
    """One of loopback that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
