"""Restarts under load of both protocols: counts the requests that are lost."""

import io
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2

from tests.support.client_threads import ClientThreads
from tests.support.color_model import write_onnx
from tests.support.free_port import free_port
from tests.support.grpc_server import INFERENCE
from tests.support.server_process import Client, encode_request, start_server, wait_until, wait_until_ready

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HTTP_CLIENTS, GRPC_CLIENTS, STREAM_CLIENTS = 3, 4, 2
RESTARTS = 50
ANSWERS = 30
"""How many answers of each kind a server gives before it is restarted."""

PAUSE_S = 0.005
TIMEOUT_S = 30.0
REQUEST_ID = "x-request-id"
"""In the trailing metadata of every call that the server has answered, if only with an error."""

OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
]


class Load(ClientThreads):
    """Clients of all kinds that send one request after the other.

    A request is lost if the client was connected and got neither an answer nor an error of the server. A call that
    finds no server is not counted.
    """

    def __init__(self, port: int, grpc_port: int) -> None:
        super().__init__([self._http] * HTTP_CLIENTS + [self._unary] * GRPC_CLIENTS + [self._stream] * STREAM_CLIENTS)
        self._port = port
        self._address = f"127.0.0.1:{grpc_port}"
        self.results: Counter[tuple[str, str]] = Counter()
        self.lost: list[str] = []

    def _http(self) -> None:
        image = io.BytesIO()
        Image.new("RGB", (6, 4), "red").save(image, "PNG")
        request = encode_request("POST", "/v1/predict", image.getvalue(), content_type="image/png")
        while not self.stopping.is_set():
            try:
                client = Client(self._port)
            except OSError:
                time.sleep(PAUSE_S)
                continue
            with client:
                self._use_connection(client, request)

    def _use_connection(self, client: Client, request: bytes) -> None:
        while not self.stopping.is_set():
            try:
                client.send(request)
                response = client.read_response()
            except (OSError, EOFError) as error:
                self.lost.append(f"HTTP: {error!r}")
                return
            self._count("HTTP", str(response.status))
            if response.status != 200:
                time.sleep(PAUSE_S)
            if response.headers.get("connection") == "close":
                return

    def _unary(self) -> None:
        with grpc.insecure_channel(self._address, options=OPTIONS) as channel:
            infer = channel.unary_unary(f"{INFERENCE}/ModelInfer")
            while not self.stopping.is_set():
                try:
                    answer = service_pb2.ModelInferResponse.FromString(infer(infer_request(), timeout=TIMEOUT_S))
                except grpc.RpcError as error:
                    self._count_error("gRPC", error)
                else:
                    self._count_answer("gRPC", answer)

    def _stream(self) -> None:
        """Send a request when the answer to the one before has come, in streams of twenty."""
        with grpc.insecure_channel(self._address, options=OPTIONS) as channel:
            while not self.stopping.is_set():
                answered = threading.Semaphore(1)
                stream = channel.stream_stream(f"{INFERENCE}/ModelStreamInfer")(requests(answered), timeout=TIMEOUT_S)
                try:
                    for message in stream:
                        answer = service_pb2.ModelStreamInferResponse.FromString(message)
                        if answer.error_message:
                            self._count("stream", answer.error_message.partition(":")[0])
                        else:
                            self._count_answer("stream", answer.infer_response)
                        answered.release()
                except grpc.RpcError as error:
                    self._count_error("stream", error)
                answered.release()

    def _count_answer(self, kind: str, answer: Any) -> None:
        (raw,) = answer.raw_output_contents
        is_right = np.allclose(np.frombuffer(raw, np.float32), [10, 0, 0], atol=1e-4)
        self._count(kind, "OK" if is_right else "wrong")

    def _count_error(self, kind: str, error: Any) -> None:
        if any(key == REQUEST_ID for key, _ in error.trailing_metadata() or ()):
            self._count(kind, error.code().name)
        elif not (error.code() is grpc.StatusCode.UNAVAILABLE and "ailed to connect" in error.details()):
            self.lost.append(f"{kind}: {error.code()} {error.details()} {error.debug_error_string()}")
        time.sleep(PAUSE_S)

    def _count(self, kind: str, result: str) -> None:
        self.results[kind, result] += 1


def infer_request() -> bytes:
    request = service_pb2.ModelInferRequest(model_name="colors")
    request.inputs.add(name="input", datatype="UINT8", shape=[1, 4, 6, 3])
    request.raw_input_contents.append(bytes([255, 0, 0] * 24))
    message: bytes = request.SerializeToString()
    return message


def requests(answered: threading.Semaphore) -> Iterator[bytes]:
    for _ in range(20):
        answered.acquire()
        yield infer_request()


def test_fifty_restarts_lose_no_request(tmp_path: Path) -> None:
    """The clients reconnect to the next server, on the same ports."""
    model = write_onnx(tmp_path / "colors.onnx")
    port, grpc_port = free_port(), free_port()
    options = ("--workers", 1, "--deadline-ms", 1000, "--port", port, "--grpc-port", grpc_port)
    kinds = (("HTTP", "200"), ("gRPC", "OK"), ("stream", "OK"))
    stops = []
    with Load(port, grpc_port) as clients:
        for number in range(RESTARTS):
            with start_server(tmp_path / str(number), model, *options) as server:
                wait_until_ready(server)
                before = clients.results.copy()
                wait_until(
                    lambda before=before: all(clients.results[kind] >= before[kind] + ANSWERS for kind in kinds),  # type: ignore[misc]
                    lambda: f"no answers: {dict(clients.results)}",
                )
                started = time.monotonic()
                assert server.stop() == 0
                stops.append(time.monotonic() - started)
                assert server.err.count("\n") == 1, server.err
    sys.stdout.write(f"{dict(clients.results)}, lost {len(clients.lost)}, drained in {max(stops):.1f} s at most\n")
    assert clients.lost == []
    assert {result for _, result in clients.results} <= {"200", "503", "OK", "UNAVAILABLE"} | {
        "model colors is still loading"
    }
    assert max(stops) < 10
