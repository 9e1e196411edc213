"""Triton's own client against a real server: what it asks is answered, and what it gets is what the file gives."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http.aio
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from cifarx_serve.images.preprocess import scale
from cifarx_serve.predictor import load
from tests.support.color_model import SPEC, write_onnx
from tests.support.running_server import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="a worker is a POSIX process"),
    # gevent, which the client is built on, patches what the standard library has loaded by now.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
BATCH = scale(PIXELS, SPEC.input)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("model") / "colours.onnx")


@pytest.fixture(scope="module")
def logits(file: Path) -> NDArray[np.float32]:
    with load(file, device="cpu") as model:
        return model.run(BATCH)


@pytest.fixture(scope="module")
def address(file: Path) -> Iterator[str]:
    with serving(file.parent / "server", file, "--workers", "1", "--device", "cpu") as running:
        yield f"127.0.0.1:{running.port}"


@pytest.fixture
def client(address: str) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(address) as client:
        yield client


def given(tensor: NDArray[Any], binary: bool = True, name: str = "input") -> list[InferInput]:
    datatype = {"float32": "FP32", "uint8": "UINT8"}[tensor.dtype.name]
    entry = InferInput(name, list(tensor.shape), datatype)
    entry.set_data_from_numpy(tensor, binary_data=binary)
    return [entry]


def test_health(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert not client.is_model_ready("shapes")


def test_versions(client: InferenceServerClient, logits: NDArray[np.float32]) -> None:
    (version,) = client.get_model_metadata("colours")["versions"]
    assert client.is_model_ready("colours", version)
    assert not client.is_model_ready("colours", "1")
    assert client.get_model_metadata("colours", version)["versions"] == [version]
    answer = client.infer("colours", given(BATCH), version)
    assert answer.get_response()["model_version"] == version
    np.testing.assert_array_equal(answer.as_numpy("logits"), logits)


def test_metadata(client: InferenceServerClient) -> None:
    assert client.get_server_metadata()["name"] == "cifarx"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    found = client.get_model_metadata("colours")
    assert found["name"] == "colours"
    assert found["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 4, 6]}]
    assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]


@pytest.mark.parametrize("binary_output", [False, True])
@pytest.mark.parametrize("binary_input", [False, True])
@pytest.mark.parametrize("tensor", [BATCH, PIXELS], ids=["FP32", "UINT8"])
def test_logits_are_those_of_the_file(
    client: InferenceServerClient,
    logits: NDArray[np.float32],
    tensor: NDArray[Any],
    binary_input: bool,
    binary_output: bool,
) -> None:
    outputs = [InferRequestedOutput("logits", binary_data=binary_output)]
    answer = client.infer("colours", given(tensor, binary_input), outputs=outputs, request_id="é 7")
    assert answer.get_response()["id"] == "é 7"
    found = answer.as_numpy("logits")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, logits)


def test_without_outputs_all_of_them_come(client: InferenceServerClient, logits: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(client.infer("colours", given(BATCH)).as_numpy("logits"), logits)


def test_a_compressed_answer_may_be_asked_for(client: InferenceServerClient, logits: NDArray[np.float32]) -> None:
    for algorithm in ("gzip", "deflate"):
        answer = client.infer("colours", given(BATCH), response_compression_algorithm=algorithm)
        np.testing.assert_array_equal(answer.as_numpy("logits"), logits)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_a_compressed_request_is_refused(client: InferenceServerClient, algorithm: str) -> None:
    with pytest.raises(InferenceServerException, match=f"encoding '{algorithm}': send it without") as refused:
        client.infer("colours", given(BATCH), request_compression_algorithm=algorithm)
    assert refused.value.status() == "415"


def test_mistakes_are_told_in_the_servers_words(client: InferenceServerClient) -> None:
    for arguments, status, words in (
        (("shapes", given(BATCH)), "404", "unknown model 'shapes': known are colours"),
        (("colours", given(BATCH), "1"), "404", "no version '1' of model colours"),
        (("colours", given(BATCH, name="images")), "400", "unknown input 'images': the model has one input, 'input'"),
        (("colours", given(BATCH[:, :2])), "400", r"a tensor of FP32 \[5, 2, 4, 6\]: the model takes FP32"),
        (("colours", given(np.full_like(BATCH, np.nan))), "400", "give numbers that are finite"),
        (("colours", [*given(BATCH), *given(BATCH)]), "400", "'input' stands there 2 times"),
        (("colours", given(np.repeat(BATCH, 20, axis=0))), "413", "100 images in one request: send at most 64"),
    ):
        with pytest.raises(InferenceServerException, match=words) as refused:
            client.infer(*arguments)
        assert refused.value.status() == status
    with pytest.raises(InferenceServerException, match="unknown output 'labels'"):
        client.infer("colours", given(BATCH), outputs=[InferRequestedOutput("labels")])
    with pytest.raises(InferenceServerException, match="asks for classification"):
        client.infer("colours", given(BATCH), outputs=[InferRequestedOutput("logits", class_count=2)])
    with pytest.raises(InferenceServerException, match="unknown model 'shapes'"):
        client.get_model_metadata("shapes")


def test_requests_in_flight_together(address: str, logits: NDArray[np.float32]) -> None:
    with InferenceServerClient(address, concurrency=8) as client:
        asked = [client.async_infer("colours", given(BATCH[n % 5 :]), request_id=str(n)) for n in range(40)]
        for number, request in enumerate(asked):
            answer = request.get_result()
            assert answer.get_response()["id"] == str(number)
            np.testing.assert_array_equal(answer.as_numpy("logits"), logits[number % 5 :])


def test_the_asynchronous_client(address: str, logits: NDArray[np.float32]) -> None:
    async def ask() -> list[Any]:
        async with tritonclient.http.aio.InferenceServerClient(address) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("colours")
            return await asyncio.gather(*(client.infer("colours", given(BATCH[n:])) for n in range(5)))

    for number, answer in enumerate(asyncio.run(ask())):
        np.testing.assert_array_equal(answer.as_numpy("logits"), logits[number:])
