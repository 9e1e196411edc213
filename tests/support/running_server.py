"""`cifarx serve` and its workers as tests run them: real processes on loopback, ended by their own ids in any case."""

import io
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import psutil
from PIL import Image

from cifarx_serve.backends.registry import RegisteredBackend
from cifarx_serve.server.processes.messages import READY, Start
from cifarx_serve.server.processes.supervisor import listen
from cifarx_serve.server.settings import Settings
from cifarx_serve.system.worker_process import child_command, child_environment

PROGRAM = Path(sys.executable).with_name("cifarx")
PLANTED = RegisteredBackend("planted", "tests.support.planted_backend:PlantedBackend", (".planted",))
"""For a worker's settings: the backend of `planted_backend`, whose slowness and failures are files beside the model."""

PATIENCE_S = 60.0
"""How long anything is waited for: a shared machine may take its time."""


class Reply(NamedTuple):
    """An answer; names of headers in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection, byte by byte as a test wants it."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        self._read = b""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, has_body: bool = True) -> Reply:
        """The next answer. Raises EOFError or OSError where the connection ends before its end."""
        while b"\r\n\r\n" not in self._read:
            self._more()
        head, _, self._read = self._read.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers["content-length"]) if has_body else 0
        while len(self._read) < length:
            self._more()
        body, self._read = self._read[:length], self._read[length:]
        return Reply(int(first.split()[1]), headers, body)

    def is_closed(self) -> bool:
        """Waits for the server's end of the connection; nothing else may come."""
        try:
            return not self._read and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError(f"the connection ended after {self._read!r}")
        self._read += data


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of a request; `_` in a header's name stands for `-`."""
    lines = [f"{method} {path} HTTP/1.1", "host: test"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def picture(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    """A request for what the small models answer: a PNG file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(file, "PNG")
    return request("POST", "/v1/predict", file.getvalue(), content_type="image/png")


class Running:
    """A process that serves; `status` is where a worker alone says that it is ready."""

    status: BinaryIO

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, tls: ssl.SSLContext | None = None) -> None:
        self.process = process
        self.port = 0
        self.tls = tls
        self._folder = folder
        self._started: set[psutil.Process] = set()

    @property
    def out(self) -> str:
        """Its standard output up to now."""
        return (self._folder / "out.txt").read_text()

    @property
    def err(self) -> str:
        """Its standard error up to now."""
        return (self._folder / "err.txt").read_text()

    def connect(self) -> Client:
        return Client(self.port, self.tls)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        """One request on a connection of its own."""
        with self.connect() as client:
            client.send(request(method, path, body, **headers))
            return client.answer(has_body=method != "HEAD")

    def predict(self) -> Reply:
        """The answer to `picture`."""
        with self.connect() as client:
            client.send(picture())
            return client.answer()

    def workers(self) -> list[psutil.Process]:
        """Those that live."""
        try:
            found = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        self._started.update(found)
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def wait_for(self, words: str, count: int = 1) -> None:
        """Until standard error has them so many times."""
        wait_until(lambda: self.err.count(words) >= count, lambda: f"no {words!r} in {self.err!r}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        self.workers()
        return self.process.wait(PATIENCE_S)

    def end(self) -> int:
        """The exit status after SIGTERM."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def leftovers(self) -> list[psutil.Process]:
        """Processes that it started and that live on; they are given time to end."""
        return psutil.wait_procs(list(self._started), timeout=PATIENCE_S)[1]

    def kill(self) -> None:
        """Whatever is left of it."""
        self.workers()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for process in self._started:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def wait_until(holds: Callable[[], object], problem: Callable[[], str] = lambda: "it did not come") -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, problem()
        time.sleep(0.01)


@contextmanager
def starting(folder: Path, *arguments: object, **environment: str) -> Iterator[Running]:
    """`cifarx serve ARGUMENTS`, on a free port of loopback; it may not yet be ready. Its streams go to the folder,
    and what it leaves behind when it is killed.

    In a process group of its own, as a terminal has it, and with warnings that are errors.
    """
    folder.mkdir(exist_ok=True)
    command = [PROGRAM, "serve", *map(str, arguments)]
    if "--port" not in arguments:
        command += ["--port", "0"]
    with (folder / "out.txt").open("wb") as out, (folder / "err.txt").open("wb") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, "PYTHONWARNINGS": "error", "TMPDIR": str(folder), **environment},
            start_new_session=True,
        )
    running = Running(process, folder)
    try:
        yield running
    finally:
        running.kill()


@contextmanager
def serving(folder: Path, *arguments: object, **environment: str) -> Iterator[Running]:
    """The same, ready."""
    with starting(folder, *arguments, **environment) as running:
        until_ready(running)
        yield running


def until_ready(running: Running) -> None:
    """Wait for the line that says where it serves."""
    line = re.compile(r"^serving .* on https?://127\.0\.0\.1:(\d+) with ", re.MULTILINE)
    wait_until(
        lambda: line.search(running.err) or running.process.poll() is not None, lambda: f"not ready: {running.err}"
    )
    found = line.search(running.err)
    assert found, running.err
    running.port = int(found[1])
    running.workers()


@contextmanager
def worker(folder: Path, settings: Settings, at_once: bool = False, ready: bool = True) -> Iterator[Running]:
    """A worker alone, as the supervisor starts it, with limits that no option has."""
    folder.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    with listen("127.0.0.1", 0) as listener, (folder / "out.txt").open("wb") as out:
        with (folder / "err.txt").open("wb") as err:
            process = subprocess.Popen(
                child_command("cifarx_serve.server.processes.worker"),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env={**child_environment(), "PYTHONWARNINGS": "error"},
                pass_fds=(listener.fileno(), writing),
            )
        os.close(writing)
        running = Running(process, folder)
        running.port = listener.getsockname()[1]
        start = Start(settings=settings, listener=listener.fileno(), status=writing, at_once=at_once)
    assert process.stdin
    try:
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
        with os.fdopen(reading, "rb") as running.status:
            if ready:
                assert running.status.readline() == READY, running.err
            yield running
    finally:
        running.kill()
        process.stdin.close()
