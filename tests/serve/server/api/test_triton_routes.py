"""The extensions of Triton's protocol for one process; `test_triton_client` has them for several."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import ParseDict
from PIL import Image
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.grpc.service_pb2 import ModelStatisticsResponse

from tests.support.asgi_client import AsgiClient, encode_image, run_with_client
from tests.support.color_model import write_onnx
from tests.support.spec_model import make_spec, write_model

PIXELS = json.dumps(
    {"inputs": [{"name": "input", "datatype": "UINT8", "shape": [2, 4, 6, 3], "data": [255] * 2 * 72}]}
).encode()


def test_the_configuration_of_a_model(color_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        config = (await client.get("/v2/models/colors/config")).json
        parsed = ParseDict(config, ModelConfig())
        assert (parsed.name, parsed.platform, parsed.backend) == ("colors", "onnx_onnxruntime", "onnxruntime")
        assert parsed.max_batch_size == 7
        assert list(parsed.dynamic_batching.preferred_batch_size) == [4]
        assert parsed.dynamic_batching.max_queue_delay_microseconds == 20
        assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [3, 4, 6]}]
        assert config["output"] == [{"name": "logits", "data_type": "TYPE_FP32", "dims": [3]}]
        assert json.loads(parsed.parameters["class_names"].string_value) == ["red", "green", "blue"]
        assert (await client.get("/v2/models/colors/versions/1/config")).json == config
        assert (await client.get("/v2/models/absent/config")).status == 404

    run_with_client(test, color_model, max_images=7, max_delay_us=20)


def test_the_configuration_of_a_model_that_takes_images_of_any_size(tmp_path: Path) -> None:
    path = write_model(tmp_path / "any.onnx", make_spec(embedded_preprocessing=True))

    async def test(client: AsgiClient) -> None:
        config = (await client.get("/v2/models/any/config")).json
        assert config["input"] == [{"name": "input", "data_type": "TYPE_UINT8", "dims": [-1, -1, 3]}]

    run_with_client(test, path)


def test_statistics_count_images_batches_requests_and_failures(color_model: Path, faulty_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        for path in ("/v2/models/faulty/infer", "/v2/models/faulty/versions/1/infer", "/v2/models/colors/infer"):
            assert (await client.post(path, PIXELS)).status == 200
        image = encode_image(Image.new("RGB", (9, 5)))
        assert (await client.post("/v1/predict?model=faulty", image, "image/png")).status == 200
        faulty_model.with_suffix(".failing").touch()
        assert (await client.post("/v2/models/faulty/infer", PIXELS)).status == 503
        (entry,) = (await client.get("/v2/models/faulty/stats")).json["model_stats"]
        version = client.repository.get("faulty").model.version
        assert (entry["name"], entry["version"]) == ("faulty", version)
        assert (entry["inference_count"], entry["execution_count"]) == (7, 4)
        durations: dict[str, Any] = entry["inference_stats"]
        counts = {name: duration["count"] for name, duration in durations.items()}
        assert counts == {
            **{"success": 3, "fail": 1, "queue": 4, "compute_infer": 4},
            **{"compute_input": 0, "compute_output": 0, "cache_hit": 0, "cache_miss": 0},
        }
        total_ns = durations["queue"]["ns"] + durations["compute_infer"]["ns"]
        assert durations["success"]["ns"] == pytest.approx(total_ns, abs=2)
        assert durations["fail"]["ns"] > 0
        everything = (await client.get("/v2/models/stats")).json
        ParseDict(everything, ModelStatisticsResponse())
        assert [model["inference_count"] for model in everything["model_stats"]] == [2, 7]
        (one,) = (await client.get("/v2/models/colors/versions/1/stats")).json["model_stats"]
        assert one == everything["model_stats"][0]

    run_with_client(test, color_model, faulty_model)


def test_the_index_lists_the_models(color_model: Path, faulty_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        entries = (await client.post("/v2/repository/index", b"")).json
        assert [(entry["name"], entry["state"]) for entry in entries] == [("colors", "READY"), ("faulty", "READY")]
        assert entries[0]["version"] == client.repository.get("colors").model.version
        client.repository.get("faulty").model.failed = True
        entries = (await client.post("/v2/repository/index", b"{}")).json
        assert (entries[1]["state"], entries[1]["reason"]) == ("UNAVAILABLE", "fails on every input")
        (ready,) = (await client.post("/v2/repository/index", b'{"ready": true}')).json
        assert ready["name"] == "colors"

    run_with_client(test, color_model, faulty_model)


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("index", b'{"ready": 1}', "the body is not valid (Expected `bool`"),
        ("index", b"[", "the body is not valid"),
        ("models/colors/load", b"", "cannot load models: the server has no model repository: start it with --model-"),
        ("models/colors/unload", b'{"parameters": {"unload_dependents": false}}', "cannot unload models"),
        ("models/colors/load", b'{"parameters": {"config": "{}"}}', "loading has the parameter 'config', which is not"),
        ("models/colors/load", b'{"parameters": []}', "the body is not valid (Expected `object`"),
    ],
)
def test_invalid_requests_are_refused(color_model: Path, path: str, body: bytes, problem: str) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.post(f"/v2/repository/{path}", body)
        assert response.status == 400
        assert problem in response.error

    run_with_client(test, color_model)


def test_outputs_of_versions_differ(tmp_path: Path) -> None:
    paths = [write_onnx(tmp_path / "lzh@1.onnx"), write_onnx(tmp_path / "lzh@2.onnx", order=(2, 1, 0))]
    red = np.zeros((1, 4, 6, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    tensor = {"name": "input", "datatype": "UINT8", "shape": red.shape, "data": red.ravel().tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()

    async def test(client: AsgiClient) -> None:
        assert (await client.get("/v2/models/lzh")).json["versions"] == ["1", "2"]
        for path, version, best in [("", "2", 2), ("/versions/1", "1", 0), ("/versions/2", "2", 2)]:
            response = (await client.post(f"/v2/models/lzh{path}/infer", body)).json
            assert (response["model_name"], response["model_version"]) == ("lzh", version)
            assert int(np.argmax(response["outputs"][0]["data"])) == best
        image = encode_image(Image.new("RGB", (9, 5), "red"))
        for query, label in [("", "blue"), ("?model=lzh", "blue"), ("?model=lzh@1", "red"), ("?model=lzh@2", "blue")]:
            predicted = (await client.post(f"/v1/predict{query}", image, "image/png")).json
            assert predicted["model"] == "lzh"
            assert predicted["predictions"][0]["label"] == label
        models = (await client.get("/v1/models")).json["models"]
        assert [(model["name"], model["number"]) for model in models] == [("lzh", 1), ("lzh", 2)]

    run_with_client(test, *paths)
