"""The routes below `/v2`, called by Triton's client."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from cifarx_serve.predictor import load
from tests.support.asgi_client import AsgiClient, encode_image, run_with_client
from tests.support.trained_model import Trained


def triton_request(batch: NDArray[Any], binary: bool) -> tuple[bytes, dict[str, str]]:
    datatype = {"float32": "FP32", "uint8": "UINT8"}[batch.dtype.name]
    tensor = InferInput("input", batch.shape, datatype)
    tensor.set_data_from_numpy(batch, binary_data=binary)
    outputs = [InferRequestedOutput("logits", binary_data=binary)]
    body, length = InferenceServerClient.generate_request_body([tensor], outputs=outputs)
    return body, {} if length is None else {"inference-header-content-length": str(length)}


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("version", [False, True], ids=["any", "version"])
def test_logits_are_those_of_the_predictor(trained: Trained, binary: bool, version: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)[None].repeat(3, axis=0)
    with load(trained.onnx, device="cpu") as predictor:
        batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
        expected = predictor.run(batch)
        prediction = predictor.predict(pixels[0], logits=True)

    async def test(client: AsgiClient) -> None:
        path = f"/v2/models/{trained.onnx.stem}"
        if version:
            path += f"/versions/{client.repository.get().model.version}"
        for tensor, logits in [(batch, expected), (pixels, np.array([prediction.logits] * 3))]:
            body, headers = triton_request(tensor, binary)
            response = await client.request("POST", f"{path}/infer", body, headers)
            assert response.status == 200
            length = response.headers.get("inference-header-content-length")
            assert (length is not None) == binary
            assert response.headers["content-type"] == f"application/{'octet-stream' if binary else 'json'}"
            read = InferenceServerClient.parse_response_body(response.body, header_length=length and int(length))
            assert read.as_numpy("logits") == pytest.approx(logits, abs=1e-4)

    run_with_client(test, trained.onnx)


def test_large_json_is_parsed_in_the_threadpool(color_model: Path) -> None:
    """Send 256 images as JSON, more than one batch, so the request is also split."""
    batch = np.random.default_rng(0).random((64, 3, 4, 6), dtype=np.float32)
    body, _ = triton_request(batch.repeat(4, axis=0), binary=False)
    assert len(body) > 256 * 1024

    async def test(client: AsgiClient) -> None:
        response = (await client.post("/v2/models/colors/infer", body)).json
        assert response["outputs"][0]["shape"] == [256, 3]
        logits = np.reshape(response["outputs"][0]["data"], (256, 3))
        assert logits == pytest.approx(10 * batch.repeat(4, axis=0).mean((2, 3)), abs=1e-4)

    run_with_client(test, color_model, max_images=256)


def test_metadata(color_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        assert (await client.get("/v2")).json["name"] == "cifarx"
        model = (await client.get("/v2/models/colors")).json
        version = client.repository.get().model.version
        assert (model["name"], model["versions"], model["platform"]) == ("colors", [version], "onnx_onnxruntime")
        assert model["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 4, 6]}]
        assert model["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]
        assert (await client.get(f"/v2/models/colors/versions/{version}")).json == model
        ready = (await client.get(f"/v2/models/colors/versions/{version}/ready")).json
        assert ready == {"name": "colors", "ready": True}

    run_with_client(test, color_model)


@pytest.mark.parametrize(
    ("method", "path", "status", "problem"),
    [
        ("GET", "/v2/models/absent", 404, "unknown model 'absent'"),
        ("GET", "/v2/models/absent/ready", 404, "unknown model 'absent'"),
        ("POST", "/v2/models/absent/infer", 404, "unknown model 'absent'"),
        ("GET", "/v2/models/colors/versions/2", 404, "model colors has no version '2': its version is "),
        ("GET", "/v2/models/colors/versions/2/ready", 404, "model colors has no version '2'"),
        ("POST", "/v2/models/colors/versions/2/infer", 404, "model colors has no version '2'"),
        ("GET", "/v2/models/colors/infer", 405, "method GET is not allowed here: use POST"),
        ("POST", "/v2/models/colors", 405, "method POST is not allowed here: use GET, HEAD"),
        ("POST", "/v2/models/colors/infer", 400, "the body is not a valid inference request"),
    ],
)
def test_invalid_requests_are_refused(color_model: Path, method: str, path: str, status: int, problem: str) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.request(method, path)
        assert response.status == status
        assert problem in response.error

    run_with_client(test, color_model)


@pytest.mark.parametrize("length", ["", "x", "-1", "1e1", "9" * 13, "3"])
def test_an_invalid_header_length_is_refused(color_model: Path, length: str) -> None:
    async def test(client: AsgiClient) -> None:
        headers = {"inference-header-content-length": length}
        response = await client.request("POST", "/v2/models/colors/infer", b"{}", headers)
        assert response.status == 400
        assert "Inference-Header-Content-Length" in response.error

    run_with_client(test, color_model)


def test_a_tensor_over_the_limits_is_refused(color_model: Path) -> None:
    body, headers = triton_request(np.zeros((3, 3, 4, 6), np.float32), binary=True)

    async def test(client: AsgiClient) -> None:
        response = await client.request("POST", "/v2/models/colors/infer", body, headers)
        assert (response.status, "3 images in one request" in response.error) == (413, True)

    run_with_client(test, color_model, max_images=2)


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_image_files_are_decoded_by_the_server(color_model: Path, binary: bool) -> None:
    images = [encode_image(Image.new("RGB", (9, 5), color)) for color in ("red", "blue")]
    elements = images if binary else [base64.b64encode(image) for image in images]
    tensor = InferInput("input", [2, 1], "BYTES")
    tensor.set_data_from_numpy(np.array(elements, object)[:, None], binary_data=binary)
    body, length = InferenceServerClient.generate_request_body([tensor])
    headers = {} if length is None else {"inference-header-content-length": str(length)}

    async def test(client: AsgiClient) -> None:
        response = await client.request("POST", "/v2/models/colors/infer", body, headers)
        assert response.status == 200
        length = response.headers.get("inference-header-content-length")
        read = InferenceServerClient.parse_response_body(response.body, header_length=length and int(length))
        assert read.as_numpy("logits") == pytest.approx(np.array([[10, 0, 0], [0, 0, 10]]), abs=1e-5)

    run_with_client(test, color_model)


def test_an_image_file_that_cannot_be_read_is_refused(color_model: Path) -> None:
    tensor = InferInput("input", [2], "BYTES")
    tensor.set_data_from_numpy(np.array([encode_image(Image.new("RGB", (9, 5))), b"text"], object))
    body, length = InferenceServerClient.generate_request_body([tensor])

    async def test(client: AsgiClient) -> None:
        headers = {"inference-header-content-length": str(length)}
        response = await client.request("POST", "/v2/models/colors/infer", body, headers)
        assert (response.status, response.error.startswith("image 1: 4 bytes")) == (400, True)

    run_with_client(test, color_model)
