"""The extensions of Triton's protocol, as messages."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from grpc import StatusCode
from tritonclient.grpc import service_pb2

from cifarx_serve.server.settings import Settings
from tests.support.color_model import write_onnx
from tests.support.grpc_server import INFERENCE, Server, run_grpc_server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(files={"colors": str(write_onnx(tmp_path / "colors.onnx"))})


async def ask(server: Server, method: str, request: Any) -> Any:
    answer = await server.call(f"{INFERENCE}/{method}", request.SerializeToString())
    message = getattr(service_pb2, f"{method}Response").FromString(answer)
    return MessageToDict(message, preserving_proto_field_name=True)


def infer_request() -> bytes:
    request = service_pb2.ModelInferRequest(model_name="colors")
    request.inputs.add(name="input", datatype="UINT8", shape=[3, 4, 6, 3])
    request.raw_input_contents.append(bytes([255, 0, 0] * 72))
    message: bytes = request.SerializeToString()
    return message


def test_config(settings: Settings) -> None:
    async def run() -> None:
        async with run_grpc_server(settings) as server:
            config = (await ask(server, "ModelConfig", service_pb2.ModelConfigRequest(name="colors")))["config"]
            assert (config["name"], config["platform"], config["max_batch_size"]) == ("colors", "onnx_onnxruntime", 64)
            assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": ["3", "4", "6"]}]
            assert config["output"] == [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["3"]}]
            assert json.loads(config["parameters"]["class_names"]["string_value"]) == ["red", "green", "blue"]
            request = service_pb2.ModelConfigRequest(name="shapes").SerializeToString()
            assert (await server.error(f"{INFERENCE}/ModelConfig", request))[0] is StatusCode.NOT_FOUND

    asyncio.run(run())


def test_statistics(settings: Settings) -> None:
    async def run() -> None:
        async with run_grpc_server(settings) as server:
            for _ in range(2):
                await server.call(f"{INFERENCE}/ModelInfer", infer_request())
            for name in ("", "colors"):
                request = service_pb2.ModelStatisticsRequest(name=name)
                (model,) = (await ask(server, "ModelStatistics", request))["model_stats"]
                assert (model["name"], model["inference_count"], model["execution_count"]) == ("colors", "6", "2")
                assert model["inference_stats"]["success"]["count"] == "2"
                assert int(model["inference_stats"]["compute_infer"]["ns"]) > 0
            version = service_pb2.ModelStatisticsRequest(name="colors", version="none").SerializeToString()
            assert (await server.error(f"{INFERENCE}/ModelStatistics", version))[0] is StatusCode.NOT_FOUND

    asyncio.run(run())


def test_the_model_repository(settings: Settings) -> None:
    """Without --model-repository, the loaded models are listed, and none can be loaded or unloaded."""

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            index = await ask(server, "RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True))
            assert [(model["name"], model["state"]) for model in index["models"]] == [("colors", "READY")]
            for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
                request = getattr(service_pb2, f"{method}Request")(model_name="colors").SerializeToString()
                code, message = await server.error(f"{INFERENCE}/{method}", request)
                assert code is StatusCode.INVALID_ARGUMENT
                assert "the server has no model repository: start it with --model-repository DIR" in message
            load = service_pb2.RepositoryModelLoadRequest(model_name="colors")
            load.parameters["config"].string_param = "{}"
            assert (await server.error(f"{INFERENCE}/RepositoryModelLoad", load.SerializeToString()))[1] == (
                "loading has the parameter 'config', which is not supported: "
                "put the files of the model into the model repository"
            )

    asyncio.run(run())
