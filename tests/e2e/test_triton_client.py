"""Triton's client against a running server; its logits must be those of the model file."""

import asyncio
import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http.aio
from numpy.typing import NDArray
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from cifarx_serve.images.preprocess import normalize
from cifarx_serve.predictor import load
from tests.support.asgi_client import encode_image
from tests.support.color_model import SPEC, write_onnx
from tests.support.server_process import run_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="a worker is a POSIX process"),
    # gevent, which the client uses, patches modules of the standard library that are already imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
BATCH = normalize(PIXELS, SPEC.input)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("model") / "colors.onnx")


@pytest.fixture(scope="module")
def logits(model: Path) -> NDArray[np.float32]:
    with load(model, device="cpu") as predictor:
        return predictor.run(BATCH)


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with run_server(model.parent / "server", model, "--workers", "1", "--device", "cpu") as running:
        yield f"127.0.0.1:{running.port}"


@pytest.fixture
def client(address: str) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(address) as client:
        yield client


def inputs(tensor: NDArray[Any], binary: bool = True, name: str = "input") -> list[InferInput]:
    datatype = {"float32": "FP32", "uint8": "UINT8"}[tensor.dtype.name]
    entry = InferInput(name, list(tensor.shape), datatype)
    entry.set_data_from_numpy(tensor, binary_data=binary)
    return [entry]


def test_health(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colors")
    assert not client.is_model_ready("shapes")


def test_versions(client: InferenceServerClient, logits: NDArray[np.float32]) -> None:
    (version,) = client.get_model_metadata("colors")["versions"]
    assert client.is_model_ready("colors", version)
    assert client.is_model_ready("colors", "1")
    assert not client.is_model_ready("colors", "2")
    assert client.get_model_metadata("colors", version)["versions"] == [version]
    result = client.infer("colors", inputs(BATCH), version)
    assert result.get_response()["model_version"] == version
    np.testing.assert_array_equal(result.as_numpy("logits"), logits)


def test_metadata(client: InferenceServerClient) -> None:
    assert client.get_server_metadata()["name"] == "cifarx"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("colors")
    assert metadata["name"] == "colors"
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 4, 6]}]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]


@pytest.mark.parametrize("binary_output", [False, True])
@pytest.mark.parametrize("binary_input", [False, True])
@pytest.mark.parametrize("tensor", [BATCH, PIXELS], ids=["FP32", "UINT8"])
def test_logits_are_those_of_the_model_file(
    client: InferenceServerClient,
    logits: NDArray[np.float32],
    tensor: NDArray[Any],
    binary_input: bool,
    binary_output: bool,
) -> None:
    outputs = [InferRequestedOutput("logits", binary_data=binary_output)]
    result = client.infer("colors", inputs(tensor, binary_input), outputs=outputs, request_id="é 7")
    assert result.get_response()["id"] == "é 7"
    output = result.as_numpy("logits")
    assert output.dtype == np.float32
    np.testing.assert_array_equal(output, logits)


def test_a_request_without_outputs_returns_them_all(client: InferenceServerClient, logits: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(client.infer("colors", inputs(BATCH)).as_numpy("logits"), logits)


def test_the_client_may_accept_compressed_responses(client: InferenceServerClient, logits: NDArray[np.float32]) -> None:
    for algorithm in ("gzip", "deflate"):
        result = client.infer("colors", inputs(BATCH), response_compression_algorithm=algorithm)
        np.testing.assert_array_equal(result.as_numpy("logits"), logits)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [False, True])
def test_requests_and_responses_may_be_compressed(
    client: InferenceServerClient, logits: NDArray[np.float32], algorithm: str, binary: bool
) -> None:
    repeated = np.repeat(BATCH, 12, axis=0)
    outputs = [InferRequestedOutput("logits", binary_data=binary)]
    compression = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    result = client.infer("colors", inputs(repeated, binary), outputs=outputs, **compression)
    np.testing.assert_allclose(result.as_numpy("logits"), np.repeat(logits, 12, axis=0), rtol=1e-5)


def test_image_files_need_no_preprocessing(client: InferenceServerClient) -> None:
    files = [encode_image(Image.new("RGB", (9, 5), color), "JPEG") for color in ("red", "blue", "lime")]
    tensor = InferInput("input", [3], "BYTES")
    tensor.set_data_from_numpy(np.array(files, object))
    assert client.infer("colors", [tensor]).as_numpy("logits").argmax(axis=1).tolist() == [0, 2, 1]
    encoded = InferInput("input", [3, 1], "BYTES")
    base64_texts = np.array([base64.b64encode(file) for file in files], object)[:, None]
    encoded.set_data_from_numpy(base64_texts, binary_data=False)
    assert client.infer("colors", [encoded]).as_numpy("logits").argmax(axis=1).tolist() == [0, 2, 1]


def test_extensions(client: InferenceServerClient) -> None:
    assert client.get_model_config("colors")["input"] == [
        {"name": "input", "data_type": "TYPE_FP32", "dims": [3, 4, 6]}
    ]
    client.infer("colors", inputs(BATCH))
    (statistics,) = client.get_inference_statistics()["model_stats"]
    assert statistics["inference_stats"]["success"]["count"] >= 1
    assert [entry["name"] for entry in client.get_model_repository_index()] == ["colors"]
    with pytest.raises(InferenceServerException, match="start it with --model-repository DIR") as raised:
        client.load_model("colors")
    assert raised.value.status() == "400"


def test_extensions_that_the_server_does_not_have(client: InferenceServerClient) -> None:
    for call in (
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.get_trace_settings,
        lambda: client.get_trace_settings("colors"),
        client.get_log_settings,
        lambda: client.update_log_settings({}),
    ):
        with pytest.raises(
            InferenceServerException, match="model_configuration, model_repository, statistics"
        ) as raised:
            call()
        assert raised.value.status() == "404"


def test_errors_have_the_message_of_the_server(client: InferenceServerClient) -> None:
    for arguments, status, message in (
        (("shapes", inputs(BATCH)), "404", "unknown model 'shapes': choose from colors"),
        (("colors", inputs(BATCH), "2"), "404", "model colors has no version '2'"),
        (
            ("colors", inputs(BATCH, name="images")),
            "400",
            "unknown input 'images': the model has one input, 'input'",
        ),
        (("colors", inputs(BATCH[:, :2])), "400", r"the input is FP32 \[5, 2, 4, 6\]: the model takes FP32"),
        (("colors", inputs(np.full_like(BATCH, np.nan))), "400", "send numbers that are finite in float32"),
        (("colors", [*inputs(BATCH), *inputs(BATCH)]), "400", "input 'input' occurs 2 times: name it once"),
        (("colors", inputs(np.repeat(BATCH, 20, axis=0))), "413", "100 images in one request: send at most 64"),
    ):
        with pytest.raises(InferenceServerException, match=message) as raised:
            client.infer(*arguments)
        assert raised.value.status() == status
    with pytest.raises(InferenceServerException, match="unknown output 'labels'"):
        client.infer("colors", inputs(BATCH), outputs=[InferRequestedOutput("labels")])
    with pytest.raises(InferenceServerException, match="has the parameter classification, which is not supported"):
        client.infer("colors", inputs(BATCH), outputs=[InferRequestedOutput("logits", class_count=2)])
    with pytest.raises(InferenceServerException, match="unknown model 'shapes'"):
        client.get_model_metadata("shapes")


def test_concurrent_requests(address: str, logits: NDArray[np.float32]) -> None:
    with InferenceServerClient(address, concurrency=8) as client:
        requests = [client.async_infer("colors", inputs(BATCH[n % 5 :]), request_id=str(n)) for n in range(40)]
        for number, request in enumerate(requests):
            result = request.get_result()
            assert result.get_response()["id"] == str(number)
            np.testing.assert_array_equal(result.as_numpy("logits"), logits[number % 5 :])


def test_the_asynchronous_client(address: str, logits: NDArray[np.float32]) -> None:
    async def infer() -> list[Any]:
        async with tritonclient.http.aio.InferenceServerClient(address) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("colors")
            assert (await client.get_model_config("colors"))["name"] == "colors"
            assert (await client.get_inference_statistics("colors"))["model_stats"][0]["name"] == "colors"
            assert (await client.get_model_repository_index())[0]["state"] == "READY"
            return await asyncio.gather(*(client.infer("colors", inputs(BATCH[n:])) for n in range(5)))

    for number, result in enumerate(asyncio.run(infer())):
        np.testing.assert_array_equal(result.as_numpy("logits"), logits[number:])
