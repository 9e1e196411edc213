"""Triton's gRPC client against a running server; its logits must be those of HTTP, bit for bit."""

import asyncio
import io
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc.aio
import tritonclient.http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from cifarx_serve.images.preprocess import normalize
from cifarx_serve.server.inference.model import file_version
from tests.support.certificates import create_certificate
from tests.support.color_model import SPEC, write_onnx
from tests.support.server_process import ServerProcess, run_server, start_server, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="a worker is a POSIX process"),
    # gevent, which the HTTP client uses, patches modules of the standard library that are already imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
BATCH = normalize(PIXELS, SPEC.input)
TIMEOUT_S = 30


def image_files() -> NDArray[np.object_]:
    """Return PNG files of several sizes as an array of bytes."""
    files = []
    for number, size in enumerate(((6, 4), (40, 30), (300, 200))):
        file = io.BytesIO()
        Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 10 + number).convert("RGB").save(file, "PNG")
        files.append(file.getvalue())
    return np.array(files, object)


TENSORS = {"FP32": BATCH, "UINT8": PIXELS, "BYTES": image_files()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("model") / "colors.onnx")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    with run_server(model.parent / "server", model, "--workers", 2, "--max-queue", 4000, "--grpc-port", 0) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.grpc_address) as client:
        yield client


def inputs(datatype: str, tensor: NDArray[Any] | None = None, library: Any = tritonclient.grpc) -> list[Any]:
    tensor = TENSORS[datatype] if tensor is None else tensor
    entry = library.InferInput("input", list(tensor.shape), datatype)
    entry.set_data_from_numpy(tensor)
    return [entry]


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> dict[str, NDArray[np.float32]]:
    """The answers over HTTP for each type of tensor."""
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        return {
            datatype: client.infer("colors", inputs(datatype, library=tritonclient.http)).as_numpy("logits")
            for datatype in TENSORS
        }


def test_health_and_metadata(client: InferenceServerClient, model: Path) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colors")
    assert not client.is_model_ready("shapes")
    version = file_version(str(model))
    assert client.is_model_ready("colors", version)
    assert client.get_server_metadata().name == "cifarx"
    metadata = client.get_model_metadata("colors", as_json=True)
    assert metadata["name"] == "colors"
    assert version in metadata["versions"]
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": ["-1", "3", "4", "6"]}]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": ["-1", "3"]}]


@pytest.mark.parametrize("datatype", TENSORS)
def test_logits_are_those_of_http(
    client: InferenceServerClient, expected: dict[str, NDArray[np.float32]], datatype: str
) -> None:
    outputs = [InferRequestedOutput("logits")]
    result = client.infer("colors", inputs(datatype), outputs=outputs, request_id="é 7")
    assert result.get_response().id == "é 7"
    assert result.as_numpy("logits").dtype == np.float32
    np.testing.assert_array_equal(result.as_numpy("logits"), expected[datatype])
    np.testing.assert_array_equal(client.infer("colors", inputs(datatype)).as_numpy("logits"), expected[datatype])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(
    client: InferenceServerClient, expected: dict[str, NDArray[np.float32]], algorithm: str
) -> None:
    result = client.infer("colors", inputs("FP32"), compression_algorithm=algorithm)
    np.testing.assert_array_equal(result.as_numpy("logits"), expected["FP32"])


def test_errors(client: InferenceServerClient) -> None:
    for arguments, status, message in (
        (("shapes", inputs("FP32")), "NOT_FOUND", "unknown model 'shapes': choose from colors"),
        (("colors", inputs("FP32"), "none"), "NOT_FOUND", "model colors has no version 'none'"),
        (("colors", inputs("FP32", BATCH[:, :2])), "INVALID_ARGUMENT", r"the input is FP32 \[5, 2, 4, 6\]: the model"),
        (("colors", inputs("FP32", np.full_like(BATCH, np.nan))), "INVALID_ARGUMENT", "numbers that are finite"),
        (("colors", [*inputs("FP32"), *inputs("FP32")]), "INVALID_ARGUMENT", "the request has 2 inputs: send one"),
        (("colors", inputs("FP32", np.repeat(BATCH, 20, axis=0))), "RESOURCE_EXHAUSTED", "100 images in one request"),
    ):
        with pytest.raises(InferenceServerException, match=message) as raised:
            client.infer(*arguments)
        assert raised.value.status() == f"StatusCode.{status}"
    with pytest.raises(InferenceServerException, match="unknown output 'labels'"):
        client.infer("colors", inputs("FP32"), outputs=[InferRequestedOutput("labels")])
    with pytest.raises(InferenceServerException, match="has the parameter classification, which is not supported"):
        client.infer("colors", inputs("FP32"), outputs=[InferRequestedOutput("logits", class_count=2)])
    shared = InferInput("input", list(BATCH.shape), "FP32")
    shared.set_shared_memory("region", BATCH.nbytes)
    with pytest.raises(InferenceServerException, match="has the parameter shared_memory_region, which is not supp"):
        client.infer("colors", [shared])


def test_concurrent_requests(client: InferenceServerClient, expected: dict[str, NDArray[np.float32]]) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for number in range(600):
        client.async_infer(
            "colors",
            inputs("FP32", BATCH[number % 5 :]),
            lambda result, error: answers.put((result, error)),
            request_id=str(number),
        )
    numbers = set()
    for _ in range(600):
        result, error = answers.get(timeout=TIMEOUT_S)
        assert error is None, str(error)
        number = int(result.get_response().id)
        numbers.add(number)
        np.testing.assert_array_equal(result.as_numpy("logits"), expected["FP32"][number % 5 :])
    assert len(numbers) == 600


def test_streams(client: InferenceServerClient, expected: dict[str, NDArray[np.float32]]) -> None:
    """Errors come in the place of an answer, and the stream goes on."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    datatypes = [list(TENSORS)[number % 3] for number in range(60)]
    for number, datatype in enumerate(datatypes):
        model = "shapes" if number == 31 else "colors"
        client.async_stream_infer(model, inputs(datatype), request_id=str(number), enable_empty_final_response=True)
    for number, datatype in enumerate(datatypes):
        result, error = answers.get(timeout=TIMEOUT_S)
        if number == 31:
            assert "unknown model 'shapes'" in str(error)
            continue
        assert error is None, str(error)
        assert result.get_response().id == str(number)
        assert result.get_response().parameters["triton_final_response"].bool_param
        np.testing.assert_array_equal(result.as_numpy("logits"), expected[datatype])
    client.stop_stream()
    assert answers.empty()


def test_the_asynchronous_client(server: ServerProcess, expected: dict[str, NDArray[np.float32]]) -> None:
    async def requests() -> Any:
        for number in range(20):
            yield {"model_name": "colors", "inputs": inputs("FP32", BATCH[number % 5 :]), "request_id": str(number)}

    async def run() -> tuple[list[Any], list[tuple[Any, Any]]]:
        async with tritonclient.grpc.aio.InferenceServerClient(server.grpc_address) as client:
            assert await client.is_server_ready()
            results = await asyncio.gather(*(client.infer("colors", inputs("FP32", BATCH[n:])) for n in range(5)))
            return results, [answer async for answer in client.stream_infer(requests())]

    results, streamed = asyncio.run(run())
    for number, result in enumerate(results):
        np.testing.assert_array_equal(result.as_numpy("logits"), expected["FP32"][number:])
    assert len(streamed) == 20
    for number, (result, error) in enumerate(streamed):
        assert error is None, str(error)
        assert result.get_response().id == str(number)
        np.testing.assert_array_equal(result.as_numpy("logits"), expected["FP32"][number % 5 :])


def test_the_health_protocol(server: ServerProcess) -> None:
    """As `grpc_health_probe` and Kubernetes speak it."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService", "colors"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as raised:
            health.Check(health_pb2.HealthCheckRequest(service="shapes"), timeout=TIMEOUT_S)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_both_protocols_at_the_same_time(server: ServerProcess, expected: dict[str, NDArray[np.float32]]) -> None:
    """Requests of both are batched together, and each gets its own answer."""
    failures: list[Exception] = []

    def run(library: Any, address: str, datatype: str) -> None:
        try:
            with library.InferenceServerClient(address) as client:
                for _ in range(50):
                    result = client.infer("colors", inputs(datatype, library=library))
                    np.testing.assert_array_equal(result.as_numpy("logits"), expected[datatype])
        except Exception as error:
            failures.append(error)

    addresses = ((tritonclient.grpc, server.grpc_address), (tritonclient.http, f"127.0.0.1:{server.port}"))
    threads = [
        threading.Thread(target=run, args=(library, address, datatype))
        for library, address in addresses
        for datatype in TENSORS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_deadline_of_a_client(client: InferenceServerClient) -> None:
    """It passes while an image is decoded that takes a tenth of a second."""
    file = io.BytesIO()
    Image.effect_mandelbrot((4000, 3000), (-2, -1.5, 1, 1.5), 5).save(file, "PNG")
    large = inputs("BYTES", np.array([file.getvalue()], object))
    with pytest.raises(InferenceServerException) as raised:
        client.infer("colors", large, client_timeout=0.02)
    assert raised.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert client.infer("colors", large, client_timeout=TIMEOUT_S).as_numpy("logits").shape == (1, 3)


def test_a_call_that_is_cancelled(client: InferenceServerClient) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    call = client.async_infer("colors", inputs("BYTES"), lambda result, error: answers.put((result, error)))
    call.cancel()
    result, error = answers.get(timeout=TIMEOUT_S)
    assert result is not None or error.status() == "StatusCode.CANCELLED"
    assert client.is_server_ready()


def test_tls_and_keys(model: Path, tmp_path: Path) -> None:
    certificate, key = create_certificate(tmp_path)
    keys = tmp_path / "keys.txt"
    keys.write_text("secret\n")
    options = ("--certfile", certificate, "--keyfile", key, "--api-key-file", keys, "--grpc-port", 0)
    with run_server(tmp_path / "server", model, "--workers", 1, *options) as server:
        address = f"localhost:{server.grpc_address.rpartition(':')[2]}"
        with InferenceServerClient(address, ssl=True, root_certificates=str(certificate)) as client:
            assert client.is_server_ready()
            with pytest.raises(
                InferenceServerException, match="missing or invalid API key: send the metadata"
            ) as raised:
                client.infer("colors", inputs("FP32"))
            assert raised.value.status() == "StatusCode.UNAUTHENTICATED"
            for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
                client.infer("colors", inputs("FP32"), headers=headers)
        with InferenceServerClient(server.grpc_address) as client, pytest.raises(InferenceServerException) as raised:
            client.is_server_live()
        assert raised.value.status() == "StatusCode.UNAVAILABLE"
        assert server.stop() == 0
        assert server.err.count("\n") == 1


def test_the_port_is_reserved(model: Path, tmp_path: Path) -> None:
    """A second server cannot share it, and a worker that is restarted listens on it again."""
    with run_server(tmp_path / "server", model, "--workers", 1, "--grpc-port", 0) as server:
        port = server.grpc_address.rpartition(":")[2]
        problem = rf"cannot listen on 127\.0\.0\.1 port {port} for gRPC .*: choose another --grpc-port"
        with start_server(tmp_path / "second", model, "--workers", 1, "--grpc-port", port) as second:
            assert second.wait() == 2
            assert re.fullmatch(f"error: {problem}\n", second.err)
        (worker,) = server.workers()
        worker.kill()
        server.wait_for("worker 0 is ready again")
        with InferenceServerClient(server.grpc_address) as client:
            assert client.infer("colors", inputs("FP32")).as_numpy("logits").shape == (5, 3)


def test_a_reload_under_load(tmp_path: Path) -> None:
    """The version changes, and no call fails."""
    served = write_onnx(tmp_path / "colors.onnx")
    with run_server(tmp_path / "server", served, "--workers", 2, "--grpc-port", 0) as server:
        versions: set[str] = set()
        failures: list[Exception] = []
        stop = threading.Event()

        def load() -> None:
            options = [("grpc.use_local_subchannel_pool", 1)]
            with InferenceServerClient(server.grpc_address, channel_args=options) as client:
                while not stop.is_set():
                    try:
                        versions.add(client.infer("colors", inputs("FP32")).get_response().model_version)
                    except InferenceServerException as error:
                        failures.append(error)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for order in ((2, 1, 0), (0, 2, 1), (1, 0, 2)):
            before = server.err.count("reloaded colors")
            write_onnx(tmp_path / "new.onnx", order=order).replace(served)
            server.signal(signal.SIGHUP)
            wait_until(lambda: server.err.count("reloaded colors") == before + 2)  # noqa: B023
            time.sleep(0.2)
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(versions) == 4
        assert server.stop() == 0
