"""The routes of the extensions of Triton's protocol: model configuration, statistics and model repository.

Sources: extension_model_configuration.md, extension_statistics.md and extension_model_repository.md of
triton-inference-server/server.
"""

from http import HTTPStatus
from typing import Any, Final, TypeVar

import msgspec

from cifarx_serve.server.api.model_config import ModelConfig, model_config
from cifarx_serve.server.api.openapi import (
    JSON_TYPE,
    MODEL_NOT_FOUND,
    error_responses,
    ok_response,
)
from cifarx_serve.server.asgi import Body, Handler, Operation, Parameter, Route
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.request import Request
from cifarx_serve.server.http.response import Response, json_response
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model_control import IndexEntry, ModelControl
from cifarx_serve.server.inference.repository import ModelInstance, ModelRepository
from cifarx_serve.server.inference.statistics import ModelStatistics, read_statistics
from cifarx_serve.server.model_changes import Action

_MODEL: Final = Parameter("model", "path", {"type": "string"}, "The name of the model.")
_VERSION: Final = Parameter("version", "path", {"type": "string"}, "The version of the model.")
_REFUSED: Final = {
    HTTPStatus.BAD_REQUEST: "The server does not allow it, there is no such model, or a worker could not load it"
}
_EMPTY: Final = {HTTPStatus.OK: Body("Every worker has done it", {JSON_TYPE: {}})}
_INDEX: Final = {"type": "array", "items": msgspec.json.schema(IndexEntry)["$defs"]["IndexEntry"]}

Message = TypeVar("Message", bound=msgspec.Struct)


class StatisticsResponse(msgspec.Struct, frozen=True):
    """The statistics of models."""

    model_stats: list[ModelStatistics]


class IndexRequest(msgspec.Struct, frozen=True):
    """Whether only models are listed that can answer requests."""

    ready: bool = False


class ChangeModelRequest(msgspec.Struct, frozen=True):
    """The parameters of Triton's clients; `unload_dependents` has no effect, because no model depends on another."""

    parameters: dict[str, Any] = {}


class TritonRoutes:
    """The routes below `/v2` that are not part of the Open Inference Protocol itself.

    Args:
        repository: the models.
        metrics: the metrics of all workers.
        control: loads and unloads models.
    """

    def __init__(self, repository: ModelRepository, metrics: Metrics, control: ModelControl) -> None:
        self._repository = repository
        self._metrics = metrics
        self._control = control

    def table(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(
                "GET",
                "/v2/models/stats",
                self._all_statistics,
                Operation(
                    "all_statistics",
                    "Return what the models have done, over all workers",
                    ok_response("The statistics of all models", StatisticsResponse),
                ),
            ),
            *self._model_routes("/v2/models/{model}", "", (_MODEL,)),
            *self._model_routes("/v2/models/{model}/versions/{version}", "_of_version", (_MODEL, _VERSION)),
            Route(
                "POST",
                "/v2/repository/index",
                self._index,
                Operation(
                    "repository_index",
                    "List the models that are loaded, and those of the model repository that are not",
                    {
                        HTTPStatus.OK: Body(
                            "The models",
                            {
                                JSON_TYPE: {
                                    "type": "array",
                                    "items": msgspec.json.schema(IndexEntry)["$defs"]["IndexEntry"],
                                }
                            },
                        ),
                        **error_responses({HTTPStatus.BAD_REQUEST: "The request or the model repository is invalid"}),
                    },
                    request=Body("Which models", {JSON_TYPE: IndexRequest}),
                ),
            ),
            self._change_route("load", self._load, "Load the versions of a model, or those whose file has changed"),
            self._change_route("unload", self._unload, "Unload all versions of a model"),
        ]

    def _model_routes(self, path: str, suffix: str, parameters: tuple[Parameter, ...]) -> list[Route]:
        return [
            Route(
                "GET",
                f"{path}/config",
                self._config,
                Operation(
                    f"model_config{suffix}",
                    "Return the configuration of a model",
                    {**ok_response("The configuration", ModelConfig), **error_responses(MODEL_NOT_FOUND)},
                    parameters=parameters,
                ),
            ),
            Route(
                "GET",
                f"{path}/stats",
                self._statistics,
                Operation(
                    f"statistics{suffix}",
                    "Return what a model has done, over all workers",
                    {**ok_response("The statistics", StatisticsResponse), **error_responses(MODEL_NOT_FOUND)},
                    parameters=parameters,
                ),
            ),
        ]

    @staticmethod
    def _change_route(action: Action, handler: Handler, summary: str) -> Route:
        return Route(
            "POST",
            f"/v2/repository/models/{{model}}/{action}",
            handler,
            Operation(
                f"{action}_model",
                summary,
                {**_EMPTY, **error_responses(_REFUSED)},
                parameters=(_MODEL,),
                request=Body("Parameters, or nothing", {JSON_TYPE: ChangeModelRequest}),
            ),
        )

    async def _config(self, request: Request) -> Response:
        return json_response(model_config(self._instance(request).model, request.limits))

    async def _all_statistics(self, request: Request) -> Response:  # noqa: ARG002
        return await self._statistics_of(self._repository.instances)

    async def _statistics(self, request: Request) -> Response:
        if "version" in request.path_params:
            return await self._statistics_of([self._instance(request)])
        return await self._statistics_of(self._repository.versions(self._instance(request).model.name))

    async def _statistics_of(self, instances: list[ModelInstance]) -> Response:
        models = [instance.model for instance in instances]
        return json_response(StatisticsResponse(await read_statistics(self._metrics, models)))

    async def _index(self, request: Request) -> Response:
        asked = await _decode(request, IndexRequest)
        return json_response(await self._control.index(asked.ready))

    async def _load(self, request: Request) -> Response:
        asked = await _decode(request, ChangeModelRequest)
        if asked.parameters:
            problem = f"loading has the parameter {min(asked.parameters)[:80]!r}, which is not supported"
            raise RequestError(HTTPStatus.BAD_REQUEST, problem, "put the files of the model into the model repository")
        return await self._change("load", request)

    async def _unload(self, request: Request) -> Response:
        await _decode(request, ChangeModelRequest)
        return await self._change("unload", request)

    async def _change(self, action: Action, request: Request) -> Response:
        await self._control.change(action, request.path_params["model"])
        return json_response({})

    def _instance(self, request: Request) -> ModelInstance:
        return self._repository.get(request.path_params["model"], request.path_params.get("version"))


async def _decode(request: Request, message: type[Message]) -> Message:
    """Decode the body of a request; an empty one has the defaults.

    Raises:
        RequestError: it is not such a JSON document (400), or as for `Request.body`.
    """
    body = await request.body()
    try:
        return msgspec.json.decode(body or b"{}", type=message)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        problem = f"the body is not valid ({str(error)[:200]})"
        raise RequestError(HTTPStatus.BAD_REQUEST, problem, "send a JSON object, or nothing") from error
