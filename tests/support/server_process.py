"""`cifarx serve` and its workers as processes under test, on the loopback interface."""

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
from cifarx_serve.system.worker_process import worker_command, worker_environment

PROGRAM = Path(sys.executable).with_name("cifarx")
FAULTY_BACKEND = RegisteredBackend("faulty", "tests.support.faulty_backend:FaultyBackend", (".faulty",))
"""The backend of `faulty_backend`, for the settings of a worker; files next to the model make it slow or fail."""

TIMEOUT_S = 60.0
"""How long a test waits for anything, because a shared machine can be slow."""


class Response(NamedTuple):
    """A response; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection, over which a test sends any bytes, to a port or to a Unix socket."""

    def __init__(self, address: int | Path, ssl_context: ssl.SSLContext | None = None) -> None:
        if isinstance(address, Path):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(TIMEOUT_S)
            try:
                self.socket.connect(str(address))
            except OSError:
                self.socket.close()
                raise
        else:
            self.socket = socket.create_connection(("127.0.0.1", address), timeout=TIMEOUT_S)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if ssl_context:
            self.socket = ssl_context.wrap_socket(self.socket, server_hostname="localhost")
        self._received = b""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_response(self, has_body: bool = True) -> Response:
        """Return the next response.

        Raises:
            EOFError, OSError: the connection ended before the end of the response.
        """
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers["content-length"]) if has_body else 0
        while len(self._received) < length:
            self._receive()
        body, self._received = self._received[:length], self._received[length:]
        return Response(int(status_line.split()[1]), headers, body)

    def is_closed(self) -> bool:
        """Wait for the server to close the connection, and return whether it sent nothing else."""
        try:
            return not self._received and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _receive(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError(f"the connection ended after {self._received!r}")
        self._received += data


def encode_request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """Return the bytes of a request; `_` in the name of a header stands for `-`."""
    lines = [f"{method} {path} HTTP/1.1", "host: test"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def predict_request(color: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    """Return the bytes of a request for a prediction of a PNG image of one color, which the small models can answer."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(file, "PNG")
    return encode_request("POST", "/v1/predict", file.getvalue(), content_type="image/png")


class ServerProcess:
    """A supervisor or a worker that serves on `port`, or on a Unix socket, and gRPC on `grpc_address` if it is set.

    A worker alone has a `status` pipe.
    """

    status: BinaryIO

    def __init__(self, process: "subprocess.Popen[bytes]", directory: Path) -> None:
        self.process = process
        self.port = 0
        self.grpc_address = ""
        self.uds: Path | None = None
        self.ssl_context: ssl.SSLContext | None = None
        self._directory = directory
        self._started: set[psutil.Process] = set()

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return (self._directory / "out.txt").read_text()

    @property
    def err(self) -> str:
        """Its standard error so far."""
        return (self._directory / "err.txt").read_text()

    def connect(self) -> Client:
        return Client(self.uds or self.port, self.ssl_context)

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> Response:
        """Send one request over a new connection."""
        with self.connect() as client:
            client.send(encode_request(method, path, body, **headers))
            return client.read_response(has_body=method != "HEAD")

    def predict(self) -> Response:
        """Send `predict_request` over a new connection."""
        with self.connect() as client:
            client.send(predict_request())
            return client.read_response()

    def workers(self) -> list[psutil.Process]:
        """Return its running child processes."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        self._started.update(children)
        return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until standard error contains a text this many times."""
        wait_until(lambda: self.err.count(text) >= count, lambda: f"no {text!r} in {self.err!r}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for it to exit, and return its exit status."""
        self.workers()
        return self.process.wait(TIMEOUT_S)

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def leftovers(self) -> list[psutil.Process]:
        """Wait for its child processes to exit, and return those that do not."""
        return psutil.wait_procs(list(self._started), timeout=TIMEOUT_S)[1]

    def kill(self) -> None:
        """Kill it and its child processes."""
        self.workers()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for process in self._started:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def wait_until(condition: Callable[[], object], message: Callable[[], str] = lambda: "timed out") -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, message()
        time.sleep(0.01)


@contextmanager
def start_server(directory: Path, *arguments: object, **environment: str) -> Iterator[ServerProcess]:
    """Start `cifarx serve ARGUMENTS`, on a free port unless they say where, without waiting until it is ready.

    Its output goes to the directory, and so do its temporary files, which it leaves behind when it is killed. It runs
    in a process group of its own, as from a terminal, and with warnings as errors.
    """
    directory.mkdir(exist_ok=True)
    command: list[str | Path] = [PROGRAM, "serve", *map(str, arguments)]
    if not {"--port", "--uds"} & {*map(str, arguments)}:
        command += ["--port", "0"]
    with (directory / "out.txt").open("wb") as out, (directory / "err.txt").open("wb") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, "PYTHONWARNINGS": "error", "TMPDIR": str(directory), **environment},
            start_new_session=True,
        )
    server = ServerProcess(process, directory)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def run_server(directory: Path, *arguments: object, **environment: str) -> Iterator[ServerProcess]:
    """Start `cifarx serve ARGUMENTS` as `start_server` does, and wait until it is ready."""
    with start_server(directory, *arguments, **environment) as server:
        wait_until_ready(server)
        yield server


def wait_until_ready(server: ServerProcess) -> None:
    """Wait for the line with the address of the server, and set its port or its socket."""
    line = re.compile(
        r"^serving .* on (?:https?://127\.0\.0\.1:(\d+)|unix:(.*)) with \d+ process(?:es)?(?:, gRPC on (\S+))?$",
        re.MULTILINE,
    )
    wait_until(lambda: line.search(server.err) or server.process.poll() is not None, lambda: f"not ready: {server.err}")
    match = line.search(server.err)
    assert match, server.err
    if match[1]:
        server.port = int(match[1])
    else:
        server.uds = Path(match[2])
    server.grpc_address = match[3] or ""
    server.workers()


@contextmanager
def run_worker(
    directory: Path, settings: Settings, accept_while_opening: bool = False, wait: bool = True
) -> Iterator[ServerProcess]:
    """Start one worker as the supervisor does, with any settings, and wait until it is ready unless `wait` is false."""
    directory.mkdir(exist_ok=True)
    read_fd, write_fd = os.pipe()
    with listen("127.0.0.1", 0) as listener, (directory / "out.txt").open("wb") as out:
        with (directory / "err.txt").open("wb") as err:
            process = subprocess.Popen(
                worker_command("cifarx_serve.server.processes.worker"),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env={**worker_environment(), "PYTHONWARNINGS": "error"},
                pass_fds=(listener.fileno(), write_fd),
            )
        os.close(write_fd)
        worker = ServerProcess(process, directory)
        worker.port = listener.getsockname()[1]
        start = Start(
            number=0,
            settings=settings,
            listener_fd=listener.fileno(),
            status_fd=write_fd,
            accept_while_opening=accept_while_opening,
        )
    assert process.stdin
    try:
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
        with os.fdopen(read_fd, "rb") as worker.status:
            if wait:
                assert worker.status.readline() == READY, worker.err
            yield worker
    finally:
        worker.kill()
        process.stdin.close()
