"""Restarts, new versions and killed workers while clients ask: what no client may lose, counted."""

import io
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from cifarx_serve.files.checksum import seal
from cifarx_serve.server.inference.model import file_version
from tests.support.running_server import Client, request, serving, starting, until_ready, wait_until
from tests.support.trained_model import Trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CLIENTS = 8
RESTARTS = 100
SWAPS = 20
KILLS = 5
PAUSE_S = 0.005

BACK_S = 2.0
"""What a worker may take to be replaced beyond what the server took to start: a bound, not a measurement."""


class Answered(NamedTuple):
    """A whole answer to one request, and when it came."""

    status: int
    version: str
    at: float


class Load:
    """Clients that each ask for one answer after the other: every second one on a new connection each time.

    A request is lost where the client was connected, and no whole answer came. A connection that is refused is none.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number % 2 == 0,)) for number in range(CLIENTS)]
        picture = io.BytesIO()
        Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(picture, "PNG")
        self._request = request("POST", "/v1/predict", picture.getvalue(), content_type="image/png")
        self.answered: list[Answered] = []
        self.lost: list[str] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def statuses(self) -> Counter[int]:
        return Counter(answer.status for answer in self.answered)

    def _ask(self, keeps: bool) -> None:
        while not self._ends.is_set():
            try:
                client = Client(self._port)
            except OSError:
                time.sleep(PAUSE_S)
                continue
            with client:
                self._ask_on(client, keeps)

    def _ask_on(self, client: Client, keeps: bool) -> None:
        asked = 0
        while not self._ends.is_set():
            try:
                client.send(self._request)
                asked += 1
                answer = client.answer()
            except (OSError, EOFError) as error:
                self.lost.append(f"request {asked} of a connection at {time.monotonic():.3f}: {error!r}")
                return
            version = answer.json["version"] if answer.status == 200 else ""
            self.answered.append(Answered(answer.status, version, time.monotonic()))
            if answer.status != 200:
                time.sleep(PAUSE_S)
            if answer.headers.get("connection") == "close" or not keeps:
                return


@contextmanager
def load(port: int) -> Iterator[Load]:
    asking = Load(port)
    asking.start()
    try:
        yield asking
    finally:
        asking.end()


def more_answers(asking: Load, count: int) -> None:
    """Wait for so many more that are 200."""
    before = asking.statuses()[200]
    wait_until(lambda: asking.statuses()[200] >= before + count)


def tell(line: str) -> None:
    """A figure, for `pytest -rP`."""
    sys.stdout.write(f"{line}\n")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_a_hundred_restarts_lose_no_request(trained: Trained, tmp_path: Path) -> None:
    """The clients go on from one server to the next, on the same port."""
    port = free_port()
    seconds = []
    with load(port) as asking:
        for number in range(RESTARTS):
            started = time.monotonic()
            with starting(tmp_path / str(number), trained.onnx, "--workers", 1, "--port", port) as server:
                until_ready(server)
                seconds.append(time.monotonic() - started)
                more_answers(asking, 100)
                assert server.end() == 0
                assert server.err.count("\n") == 1, server.err
    statuses = asking.statuses()
    tell(f"{RESTARTS} restarts: {dict(statuses)}, lost {len(asking.lost)}, started in {max(seconds):.2f} s at most")
    assert asking.lost == []
    assert statuses.keys() <= {200, 503}
    assert statuses[200] >= 100 * RESTARTS


def test_new_versions_fail_no_request(trained: Trained, tmp_path: Path) -> None:
    served, other = tmp_path / "lzh.onnx", tmp_path / "other.onnx"
    shutil.copy(trained.onnx, served)
    other.write_bytes(trained.onnx.read_bytes() + b"\x72\x06\x0a\x01k\x12\x01v")  # one more entry of metadata
    seal(other)
    versions = [file_version(str(path)) for path in (served, other)]
    sources = [trained.onnx, other]
    with serving(tmp_path / "server", served, "--workers", 1) as server, load(server.port) as asking:
        for number in range(1, SWAPS + 1):
            shutil.copy(sources[number % 2], tmp_path / "next.onnx")
            (tmp_path / "next.onnx").replace(served)
            server.signal(signal.SIGHUP)
            server.wait_for("swapped lzh from", number)
            more_answers(asking, 50)
            assert asking.answered[-1].version == versions[number % 2]
        asking.end()
        assert server.end() == 0
    tell(f"{SWAPS} new versions: {dict(asking.statuses())}, lost {len(asking.lost)}")
    assert asking.lost == []
    assert asking.statuses().keys() == {200}
    assert {answer.version for answer in asking.answered} == set(versions)


def test_a_killed_worker_fails_its_own_requests_alone(trained: Trained, tmp_path: Path) -> None:
    """Of two. It is stopped first, so that the connections that it had are counted: each has one request at most."""
    started = time.monotonic()
    with serving(tmp_path / "server", trained.onnx, "--workers", 2) as server:
        start_s = time.monotonic() - started
        with load(server.port) as asking:
            for number in range(1, KILLS + 1):
                more_answers(asking, 100)
                lost, killed = len(asking.lost), server.workers()[0]
                killed.suspend()
                held = sum(entry.status == "ESTABLISHED" for entry in killed.net_connections())
                killed.kill()
                at = time.monotonic()
                server.wait_for("is ready again", number)
                back_s = time.monotonic() - at
                more_answers(asking, 100)
                tell(f"killed: {held} held, {len(asking.lost) - lost} lost, back in {back_s:.2f} s ({start_s:.2f} s)")
                assert len(asking.lost) - lost <= held
                assert back_s < start_s + BACK_S
                assert len(server.workers()) == 2
                assert not killed.is_running()
        assert server.end() == 0
    assert asking.statuses().keys() == {200}
