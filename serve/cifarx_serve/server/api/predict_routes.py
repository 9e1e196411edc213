"""The routes that classify images, and describe the models: our own, KServe's v1 protocol and SageMaker's."""

import re
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final, TypeAlias

from cifarx_serve.errors import ImageError
from cifarx_serve.predictor import Prediction
from cifarx_serve.server.api.json_images import JsonImages
from cifarx_serve.server.api.openapi import (
    BINARY,
    BINARY_TYPE,
    BODY_ERRORS,
    MODEL_NOT_FOUND,
    error_responses,
    ok_response,
)
from cifarx_serve.server.api.schemas import (
    ImagePrediction,
    KServePredictResponse,
    ModelsResponse,
    PredictResponse,
    Timing,
)
from cifarx_serve.server.api.uploads import JSON, parse_uploads
from cifarx_serve.server.asgi import Body, Operation, Parameter, Route
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import IMAGE_FIELDS, MULTIPART_FORM, Upload
from cifarx_serve.server.http.request import Request
from cifarx_serve.server.http.response import Response, json_response
from cifarx_serve.server.inference.classification import Classification, ImageClassifier
from cifarx_serve.server.inference.deadline import Deadline, ThreadPool
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.model import ModelInfo
from cifarx_serve.server.inference.repository import ModelInstance, ModelRepository
from cifarx_serve.server.inference.stages import record_classification

_DEFAULT_TOP_K: Final = 5
_TOP_K: Final = {"type": "integer", "minimum": 1}
_MODEL_PARAMETER: Final = Parameter(
    "model", "query", {"type": "string"}, "The name of the model; by default the first one."
)
_TOP_K_PARAMETER: Final = Parameter(
    "top_k",
    "query",
    _TOP_K,
    f"The number of classes per image; by default {_DEFAULT_TOP_K}, or all if the model has fewer.",
)
_QUERY: Final = (_MODEL_PARAMETER, _TOP_K_PARAMETER)
_FIELDS: Final = tuple(parameter.name for parameter in _QUERY)
"""The fields that a request may have in its query, and beside its images in a form or JSON."""

_PATH_MODEL: Final = Parameter("model", "path", {"type": "string"}, "The name of the model.")
_FORM: Final = {
    "type": "object",
    "properties": {
        **{name: {"type": "array", "items": BINARY} for name in IMAGE_FIELDS},
        "model": {"type": "string"},
        "top_k": _TOP_K,
    },
    "anyOf": [{"required": [name]} for name in IMAGE_FIELDS],
}
_IMAGES: Final = Body(
    "An image file, a form with one or several, or JSON with images in base64.",
    {"image/*": BINARY, BINARY_TYPE: BINARY, MULTIPART_FORM: _FORM, JSON: JsonImages},
)
_IMAGE_ERRORS: Final = {
    HTTPStatus.BAD_REQUEST: "No image can be read, or a field is invalid",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The content type is not that of an image, a form or JSON",
}
_MODEL_ERRORS: Final = {HTTPStatus.SERVICE_UNAVAILABLE: "The model is not ready"}
_ERRORS: Final = error_responses(_IMAGE_ERRORS, MODEL_NOT_FOUND, BODY_ERRORS)

_Respond: TypeAlias = Callable[[Request, ModelInstance, list[Upload], Classification], Response]
"""Returns the response to a request, from its model, its images and their predictions."""


class PredictRoutes:
    """The routes below `/v1`, and `/invocations`.

    Args:
        repository: the models.
        decoder: decodes the images.
        threads: the threads that parse large requests.
    """

    def __init__(self, repository: ModelRepository, decoder: ImageDecoder, threads: ThreadPool) -> None:
        self._repository = repository
        self._threads = threads
        self._classifier = ImageClassifier(decoder, repository.settings.limits.max_pixels)

    def table(self) -> list[Route]:
        """Return the routes."""
        predicted = ok_response("The best classes of each image", PredictResponse) | _ERRORS
        return [
            Route(
                "POST",
                "/v1/predict",
                self._predict,
                Operation("predict", "Classify one or several images", predicted, parameters=_QUERY, request=_IMAGES),
            ),
            Route(
                "POST",
                "/v1/models/{model}:predict",
                self._predict_kserve,
                Operation(
                    "predict_v1",
                    "Classify one or several images (KServe's v1 protocol)",
                    ok_response("The best classes of each image", KServePredictResponse) | _ERRORS,
                    parameters=(_PATH_MODEL, _TOP_K_PARAMETER),
                    request=_IMAGES,
                ),
            ),
            Route(
                "POST",
                "/invocations",
                self._predict,
                Operation(
                    "invocations",
                    "Classify one or several images (Amazon SageMaker)",
                    predicted,
                    parameters=_QUERY,
                    request=_IMAGES,
                ),
            ),
            Route(
                "GET",
                "/v1/models",
                self._models,
                Operation(
                    "models",
                    "List the models with their specs and parity reports",
                    ok_response("The models, in the order of the command line", ModelsResponse),
                ),
            ),
            Route(
                "GET",
                "/v1/models/{model}",
                self._model,
                Operation(
                    "model",
                    "Describe a model, with its spec and parity report",
                    ok_response("The model", ModelInfo) | error_responses(MODEL_NOT_FOUND, _MODEL_ERRORS),
                    parameters=(_PATH_MODEL,),
                ),
            ),
        ]

    async def _predict(self, request: Request) -> Response:
        query = _query_fields(request, _FIELDS)
        return await self._classify(request, query, _predict_response)

    async def _predict_kserve(self, request: Request) -> Response:
        query = _query_fields(request, ("top_k",)) | {"model": request.path_params["model"]}
        return await self._classify(request, query, _kserve_response)

    async def _classify(self, request: Request, query: Mapping[str, str], respond: _Respond) -> Response:
        """Classify the images of a request; `query` has the fields that are stated outside its body."""
        deadline = Deadline(request.received_at, request.limits.deadline_s)
        with self._repository.get(query.get("model")) as instance:
            uploads, fields = await parse_uploads(request, await request.body(), _FIELDS, self._threads, deadline)
            if twice := query.keys() & fields.keys():
                problem = f"{min(twice)} is stated in the body and outside of it"
                raise RequestError(HTTPStatus.BAD_REQUEST, problem, "state it once")
            fields |= query
            if "model" in query or "model" not in fields:
                return await self._run(request, fields, instance, uploads, deadline, respond)
        with self._repository.get(fields["model"]) as instance:
            return await self._run(request, fields, instance, uploads, deadline, respond)

    async def _run(
        self,
        request: Request,
        fields: Mapping[str, str],
        instance: ModelInstance,
        uploads: list[Upload],
        deadline: Deadline,
        respond: _Respond,
    ) -> Response:
        top_k = _parse_top_k(fields.get("top_k"), len(instance.model.spec.class_names))
        images = [upload.data for upload in uploads]
        result = await self._classifier.classify(images, instance, top_k, deadline, request.is_disconnected)
        if request.span is not None:
            record_classification(request.span, instance.model, result, len(images))
        return respond(request, instance, uploads, result)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002
        return json_response(ModelsResponse([instance.model.info() for instance in self._repository.instances]))

    async def _model(self, request: Request) -> Response:
        return json_response(self._repository.get(request.path_params["model"]).model.info())


def _predict_response(
    request: Request, instance: ModelInstance, uploads: list[Upload], result: Classification
) -> Response:
    seconds = (result.decode_s, result.queue_s, result.compute_s, time.perf_counter() - request.received_at)
    timing = Timing(*(round(spent * 1e6) for spent in seconds))
    predictions = _image_predictions(uploads, result)
    return json_response(PredictResponse(instance.model.name, instance.model.version, predictions, timing))


def _kserve_response(
    _request: Request, _instance: ModelInstance, uploads: list[Upload], result: Classification
) -> Response:
    return json_response(KServePredictResponse(_image_predictions(uploads, result)))


def _image_predictions(uploads: list[Upload], result: Classification) -> list[ImagePrediction]:
    return [
        _image_prediction(upload, prediction) for upload, prediction in zip(uploads, result.predictions, strict=True)
    ]


def _image_prediction(upload: Upload, prediction: Prediction | ImageError) -> ImagePrediction:
    if isinstance(prediction, ImageError):
        return ImagePrediction(upload.filename, error=str(prediction))
    return ImagePrediction(
        upload.filename, prediction.label, prediction.index, prediction.score, prediction.top, prediction.labels
    )


def _query_fields(request: Request, known: tuple[str, ...]) -> dict[str, str]:
    fields = request.query_params()
    if unknown := [name for name in fields if name not in known]:
        problem = f"unknown query field {unknown[0][:80]!r}"
        raise RequestError(HTTPStatus.BAD_REQUEST, problem, f"use {' or '.join(known)}")
    return fields


def _parse_top_k(value: str | None, classes: int) -> int:
    if value is None:
        return min(_DEFAULT_TOP_K, classes)
    if not re.fullmatch("[0-9]{1,6}", value) or not 1 <= int(value) <= classes:
        raise RequestError(HTTPStatus.BAD_REQUEST, f"top_k is {value[:20]!r}", f"send a number from 1 to {classes}")
    return int(value)
