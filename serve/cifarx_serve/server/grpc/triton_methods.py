"""The extensions of Triton's protocol: model configuration, statistics and model repository.

They belong to the service of the Open Inference Protocol. What they answer is that of HTTP: its JSON has the fields of
these messages.
"""

from http import HTTPStatus
from typing import Any

import msgspec
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2

from cifarx_serve.server.api.model_config import model_config
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.grpc.call import Call
from cifarx_serve.server.grpc.handlers import Method
from cifarx_serve.server.grpc.inference_service import SERVICE
from cifarx_serve.server.grpc.messages import parse
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model_control import ModelControl
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.inference.statistics import read_statistics


class TritonMethods:
    """The methods.

    Args:
        repository: the models.
        metrics: the metrics of all workers.
        control: loads and unloads models.
    """

    def __init__(self, repository: ModelRepository, metrics: Metrics, control: ModelControl) -> None:
        self._repository = repository
        self._metrics = metrics
        self._control = control

    def methods(self) -> dict[str, Method]:
        """Return the methods by name."""
        return {
            f"/{SERVICE}/ModelConfig": Method(self._model_config),
            f"/{SERVICE}/ModelStatistics": Method(self._model_statistics),
            f"/{SERVICE}/RepositoryIndex": Method(self._index),
            f"/{SERVICE}/RepositoryModelLoad": Method(self._load),
            f"/{SERVICE}/RepositoryModelUnload": Method(self._unload),
        }

    async def _model_config(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        request = parse(message, service_pb2.ModelConfigRequest)
        model = self._repository.get(request.name, request.version or None).model
        config = msgspec.to_builtins(model_config(model, self._repository.settings.limits))
        return _encode({"config": config}, service_pb2.ModelConfigResponse)

    async def _model_statistics(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        """Answer the statistics of one version, of all versions of a model, or without a name of all models."""
        request = parse(message, service_pb2.ModelStatisticsRequest)
        if not request.name:
            instances = self._repository.instances
        elif request.version:
            instances = [self._repository.get(request.name, request.version)]
        else:
            instances = self._repository.versions(self._repository.get(request.name).model.name)
        statistics = await read_statistics(self._metrics, [instance.model for instance in instances])
        return _encode({"model_stats": msgspec.to_builtins(statistics)}, service_pb2.ModelStatisticsResponse)

    async def _index(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        request = parse(message, service_pb2.RepositoryIndexRequest)
        entries = await self._control.index(request.ready)
        return _encode({"models": msgspec.to_builtins(entries)}, service_pb2.RepositoryIndexResponse)

    async def _load(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        request = parse(message, service_pb2.RepositoryModelLoadRequest)
        if request.parameters:
            problem = f"loading has the parameter {min(request.parameters)[:80]!r}, which is not supported"
            raise RequestError(HTTPStatus.BAD_REQUEST, problem, "put the files of the model into the model repository")
        await self._control.change("load", request.model_name)
        return b""

    async def _unload(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        """Unload a model. The parameter `unload_dependents` has no effect: no model depends on another."""
        request = parse(message, service_pb2.RepositoryModelUnloadRequest)
        await self._control.change("unload", request.model_name)
        return b""


def _encode(fields: dict[str, Any], message_type: Any) -> bytes:
    encoded: bytes = ParseDict(fields, message_type()).SerializeToString()
    return encoded
