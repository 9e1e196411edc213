"""The routes of the Open Inference Protocol."""

import re
import time
from http import HTTPStatus
from typing import Final

from cifarx_serve.server.api.open_inference import (
    InferRequest,
    infer_response,
    model_metadata,
    parse_infer,
    server_metadata,
)
from cifarx_serve.server.api.open_inference_schemas import (
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
from cifarx_serve.server.api.openapi import (
    BINARY,
    BINARY_TYPE,
    BODY_ERRORS,
    JSON_TYPE,
    MODEL_NOT_FOUND,
    error_responses,
    ok_response,
    reference,
)
from cifarx_serve.server.asgi import Body, Operation, Parameter, Route
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.request import Request
from cifarx_serve.server.http.response import JSON, ErrorResponse, Response, json_response
from cifarx_serve.server.inference.deadline import Deadline, ThreadPool
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.image_batch import decode_batch
from cifarx_serve.server.inference.readiness import Readiness
from cifarx_serve.server.inference.repository import ModelInstance, ModelRepository
from cifarx_serve.server.inference.stages import record_decoding, record_inference
from cifarx_serve.system.versions import package_version

_HEADER_LENGTH: Final = b"inference-header-content-length"

_MAX_INLINE_JSON: Final = 256 * 1024
"""JSON up to this many bytes is parsed in the event loop; more is parsed in a thread."""

_MODEL: Final = Parameter("model", "path", {"type": "string"}, "The name of the model.")
_VERSION: Final = Parameter("version", "path", {"type": "string"}, "The version of the model.")
_HEADER_LENGTH_PARAMETER: Final = Parameter(
    "Inference-Header-Content-Length",
    "header",
    {"type": "integer", "minimum": 1},
    "The number of bytes of the JSON before binary tensor data.",
)
_TENSOR_ERRORS: Final = {HTTPStatus.BAD_REQUEST: "The input's name, shape, data type or data is invalid"}
_NOT_READY: Final = {"anyOf": [reference(ModelReady), reference(ErrorResponse)]}
_JSON_AND_BINARY: Final = {**BINARY, "description": "The JSON, followed by the bytes of the tensor."}


class OpenInferenceRoutes:
    """The routes below `/v2`.

    Args:
        repository: the models.
        readiness: the state of the worker.
        decoder: decodes encoded images.
        threads: the threads that parse large requests.
    """

    def __init__(
        self, repository: ModelRepository, readiness: Readiness, decoder: ImageDecoder, threads: ThreadPool
    ) -> None:
        self._repository = repository
        self._readiness = readiness
        self._decoder = decoder
        self._threads = threads

    def table(self) -> list[Route]:
        """Return the routes."""
        return [
            *self._server_routes(),
            *self._model_routes("/v2/models/{model}", "", (_MODEL,)),
            *self._model_routes("/v2/models/{model}/versions/{version}", "_of_version", (_MODEL, _VERSION)),
        ]

    def _server_routes(self) -> list[Route]:
        return [
            Route(
                "GET",
                "/v2",
                self._server_metadata,
                Operation(
                    "server_metadata",
                    "Return the metadata of the server",
                    ok_response("The name and version, and the supported extensions", ServerMetadata),
                ),
                public=True,
            ),
            Route(
                "GET",
                "/v2/health/live",
                self._live,
                Operation("live", "Check that the server is running", ok_response("The server is running", ServerLive)),
                public=True,
            ),
            Route(
                "GET",
                "/v2/health/ready",
                self._ready,
                Operation(
                    "ready",
                    "Check that all models can answer requests",
                    {
                        **ok_response("All models can answer requests", ServerReady),
                        HTTPStatus.SERVICE_UNAVAILABLE: Body(
                            "A model cannot answer requests", {JSON_TYPE: ServerReady}
                        ),
                    },
                ),
                public=True,
            ),
        ]

    def _model_routes(self, path: str, suffix: str, parameters: tuple[Parameter, ...]) -> list[Route]:
        """Return the routes of a model; `suffix` is that of the operation IDs."""
        return [
            Route(
                "GET",
                path,
                self._model_metadata,
                Operation(
                    f"model_metadata{suffix}",
                    "Return the metadata of a model",
                    {
                        **ok_response("The names, data types and shapes of its tensors", ModelMetadata),
                        **error_responses(MODEL_NOT_FOUND),
                    },
                    parameters=parameters,
                ),
            ),
            Route(
                "GET",
                f"{path}/ready",
                self._model_ready,
                Operation(
                    f"model_ready{suffix}",
                    "Check that a model can answer requests",
                    {
                        **ok_response("The model can answer requests", ModelReady),
                        **error_responses(MODEL_NOT_FOUND),
                        HTTPStatus.SERVICE_UNAVAILABLE: Body(
                            "The model cannot answer requests", {JSON_TYPE: _NOT_READY}
                        ),
                    },
                    parameters=parameters,
                ),
            ),
            Route("POST", f"{path}/infer", self._infer, _infer_operation(suffix, parameters)),
        ]

    async def _server_metadata(self, request: Request) -> Response:  # noqa: ARG002
        return json_response(server_metadata(package_version()))

    async def _live(self, request: Request) -> Response:  # noqa: ARG002
        return json_response(ServerLive(live=True))

    async def _ready(self, request: Request) -> Response:  # noqa: ARG002
        ready = self._readiness.state == "ready"
        return json_response(ServerReady(ready), _ready_status(ready))

    async def _model_metadata(self, request: Request) -> Response:
        model = self._instance(request).model
        versions = [instance.model.protocol_version for instance in self._repository.versions(model.name)]
        return json_response(model_metadata(model.name, versions, model.platform, model.spec))

    async def _model_ready(self, request: Request) -> Response:
        model = self._instance(request).model
        ready = not (model.failed or self._repository.draining)
        return json_response(ModelReady(model.name, ready), _ready_status(ready))

    async def _infer(self, request: Request) -> Response:
        deadline = Deadline(request.received_at, request.limits.deadline_s)
        with self._instance(request) as instance:
            infer = await self._parse(request, instance, deadline)
            tensor = infer.tensor
            if isinstance(tensor, list):
                started_at, images = time.perf_counter(), len(tensor)
                tensor = await decode_batch(
                    tensor, self._decoder, instance, request.limits.max_pixels, deadline, request.is_disconnected
                )
                if request.span is not None:
                    record_decoding(request.span, started_at, time.perf_counter() - started_at, images)
            result = await instance.infer(tensor, deadline, request.is_disconnected)
            if request.span is not None:
                record_inference(request.span, instance.model, result)
        model = instance.model
        body, header_length = infer_response(
            infer, model.name, model.protocol_version, model.spec.output, result.values
        )
        if header_length is None:
            return Response(body, content_type=JSON)
        headers = ((_HEADER_LENGTH, str(header_length).encode()),)
        return Response(body, content_type=BINARY_TYPE.encode(), headers=headers)

    async def _parse(self, request: Request, instance: ModelInstance, deadline: Deadline) -> InferRequest:
        body, header_length, limits = await request.body(), _header_length(request), request.limits
        spec = instance.model.spec
        if (len(body) if header_length is None else header_length) <= _MAX_INLINE_JSON:
            return parse_infer(body, header_length, spec, limits.max_images, limits.max_pixels)
        return await self._threads.run(
            deadline, parse_infer, body, header_length, spec, limits.max_images, limits.max_pixels
        )

    def _instance(self, request: Request) -> ModelInstance:
        return self._repository.get(request.path_params["model"], request.path_params.get("version"))


def _ready_status(ready: bool) -> HTTPStatus:
    return HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE


def _infer_operation(suffix: str, parameters: tuple[Parameter, ...]) -> Operation:
    return Operation(
        f"infer{suffix}",
        "Run a model on a batch and return its logits or probabilities",
        {
            HTTPStatus.OK: Body(
                "The output, as JSON or as binary data",
                {JSON_TYPE: InferenceResponse, BINARY_TYPE: _JSON_AND_BINARY},
            ),
            **error_responses(_TENSOR_ERRORS, MODEL_NOT_FOUND, BODY_ERRORS),
        },
        parameters=(*parameters, _HEADER_LENGTH_PARAMETER),
        request=Body("The batch", {JSON_TYPE: InferenceRequest, BINARY_TYPE: _JSON_AND_BINARY}),
    )


def _header_length(request: Request) -> int | None:
    value = request.headers.get(_HEADER_LENGTH)
    if value is None:
        return None
    value = value.strip()
    if not re.fullmatch(rb"[0-9]{1,12}", value):
        problem = f"Inference-Header-Content-Length is {value[:20].decode('latin-1')!r}"
        raise RequestError(HTTPStatus.BAD_REQUEST, problem, "send the number of bytes of the JSON before the tensors")
    return int(value)
