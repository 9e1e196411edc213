"""Restarts, reloads and killed workers under load: counts the requests that are lost."""

import io
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.server.inference.model import file_version
from tests.support.client_threads import ClientThreads
from tests.support.free_port import free_port
from tests.support.server_process import Client, encode_request, run_server, start_server, wait_until, wait_until_ready
from tests.support.trained_model import Trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CLIENTS = 8
RESTARTS = 100
RELOADS = 20
KILLS = 5
PAUSE_S = 0.005

RESTART_S = 2.0
"""How much longer the restart of a worker may take than the start of the server: a bound, not a measurement."""


class Result(NamedTuple):
    """The response to one request."""

    status: int
    version: str


class Load(ClientThreads):
    """Clients that send one request after the other; every second client opens a new connection for each request.

    A request is lost if the client was connected and got no complete response. A refused connection is not counted.
    """

    def __init__(self, port: int) -> None:
        super().__init__([partial(self._run_client, number % 2 == 0) for number in range(CLIENTS)])
        self._port = port
        image = io.BytesIO()
        Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(image, "PNG")
        self._request = encode_request("POST", "/v1/predict", image.getvalue(), content_type="image/png")
        self.results: list[Result] = []
        self.lost: list[str] = []

    def statuses(self) -> Counter[int]:
        return Counter(result.status for result in self.results)

    def _run_client(self, keep_alive: bool) -> None:
        while not self.stopping.is_set():
            try:
                client = Client(self._port)
            except OSError:
                time.sleep(PAUSE_S)
                continue
            with client:
                self._use_connection(client, keep_alive)

    def _use_connection(self, client: Client, keep_alive: bool) -> None:
        sent = 0
        while not self.stopping.is_set():
            try:
                client.send(self._request)
                sent += 1
                response = client.read_response()
            except (OSError, EOFError) as error:
                self.lost.append(f"request {sent} of a connection at {time.monotonic():.3f}: {error!r}")
                return
            version = response.json["version"] if response.status == 200 else ""
            self.results.append(Result(response.status, version))
            if response.status != 200:
                time.sleep(PAUSE_S)
            if response.headers.get("connection") == "close" or not keep_alive:
                return


def wait_for_responses(clients: Load, count: int) -> None:
    """Wait for this many more responses with status 200."""
    before = clients.statuses()[200]
    wait_until(lambda: clients.statuses()[200] >= before + count)


def report(line: str) -> None:
    """Print a measurement, which `pytest -rP` shows."""
    sys.stdout.write(f"{line}\n")


def test_a_hundred_restarts_lose_no_request(trained: Trained, tmp_path: Path) -> None:
    """The clients reconnect to the next server, on the same port."""
    port = free_port()
    seconds = []
    with Load(port) as clients:
        for number in range(RESTARTS):
            started = time.monotonic()
            with start_server(tmp_path / str(number), trained.onnx, "--workers", 1, "--port", port) as server:
                wait_until_ready(server)
                seconds.append(time.monotonic() - started)
                wait_for_responses(clients, 100)
                assert server.stop() == 0
                assert server.err.count("\n") == 1, server.err
    statuses = clients.statuses()
    report(f"{RESTARTS} restarts: {dict(statuses)}, lost {len(clients.lost)}, started in {max(seconds):.2f} s at most")
    assert clients.lost == []
    assert statuses.keys() <= {200, 503}
    assert statuses[200] >= 100 * RESTARTS


def test_reloads_fail_no_request(trained: Trained, tmp_path: Path) -> None:
    served, other = tmp_path / "lzh.onnx", tmp_path / "other.onnx"
    shutil.copy(trained.onnx, served)
    other.write_bytes(trained.onnx.read_bytes() + b"\x72\x06\x0a\x01k\x12\x01v")  # one more entry of metadata
    write_checksum(other)
    versions = [file_version(str(path)) for path in (served, other)]
    sources = [trained.onnx, other]
    with run_server(tmp_path / "server", served, "--workers", 1) as server, Load(server.port) as clients:
        for number in range(1, RELOADS + 1):
            shutil.copy(sources[number % 2], tmp_path / "next.onnx")
            (tmp_path / "next.onnx").replace(served)
            server.signal(signal.SIGHUP)
            server.wait_for("reloaded lzh from", number)
            wait_for_responses(clients, 50)
            assert clients.results[-1].version == versions[number % 2]
        clients.stop()
        assert server.stop() == 0
    report(f"{RELOADS} reloads: {dict(clients.statuses())}, lost {len(clients.lost)}")
    assert clients.lost == []
    assert clients.statuses().keys() == {200}
    assert {result.version for result in clients.results} == set(versions)


def test_a_killed_worker_loses_only_its_own_requests(trained: Trained, tmp_path: Path) -> None:
    """The worker is suspended first, to count its connections; each has at most one request."""
    started = time.monotonic()
    with run_server(tmp_path / "server", trained.onnx, "--workers", 2) as server:
        start_s = time.monotonic() - started
        with Load(server.port) as clients:
            for number in range(1, KILLS + 1):
                wait_for_responses(clients, 100)
                lost, killed = len(clients.lost), server.workers()[0]
                killed.suspend()
                connections = sum(entry.status == "ESTABLISHED" for entry in killed.net_connections())
                killed.kill()
                killed_at = time.monotonic()
                server.wait_for("is ready again", number)
                restart_s = time.monotonic() - killed_at
                wait_for_responses(clients, 100)
                new_lost = len(clients.lost) - lost
                times = f"started in {start_s:.2f} s, restarted in {restart_s:.2f} s"
                report(f"killed: {connections} connections, {new_lost} lost, {times}")
                assert new_lost <= connections
                assert restart_s < start_s + RESTART_S
                assert len(server.workers()) == 2
                assert not killed.is_running()
        assert server.stop() == 0
    assert clients.statuses().keys() == {200}
