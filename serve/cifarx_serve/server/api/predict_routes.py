"""The routes of the server's own API: classify images, list the models."""

import re
import time
from http import HTTPStatus
from typing import Final

from cifarx_serve.errors import ImageError
from cifarx_serve.predictor import Prediction
from cifarx_serve.server.api.openapi import (
    BINARY,
    BINARY_TYPE,
    BODY_ERRORS,
    MODEL_NOT_FOUND,
    error_responses,
    ok_response,
)
from cifarx_serve.server.api.schemas import ImagePrediction, ModelsResponse, PredictResponse, Timing
from cifarx_serve.server.api.uploads import parse_uploads
from cifarx_serve.server.asgi import Body, Operation, Parameter, Route
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import IMAGE_FIELDS, MULTIPART_FORM, Upload
from cifarx_serve.server.http.request import Request
from cifarx_serve.server.http.response import Response, json_response
from cifarx_serve.server.inference.classification import Classification, ImageClassifier
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.repository import ModelInstance, ModelRepository

_DEFAULT_TOP_K: Final = 5
_QUERY: Final = (
    Parameter("model", "query", {"type": "string"}, "The name of the model; by default the first one."),
    Parameter(
        "top_k",
        "query",
        {"type": "integer", "minimum": 1},
        f"The number of classes per image; by default {_DEFAULT_TOP_K}, or all if the model has fewer.",
    ),
)
_QUERY_FIELDS: Final = tuple(parameter.name for parameter in _QUERY)
_FORM: Final = {
    "type": "object",
    "properties": {name: {"type": "array", "items": BINARY} for name in IMAGE_FIELDS},
    "minProperties": 1,
}
_IMAGES: Final = Body(
    "An image file, or a form with one or several.", {"image/*": BINARY, BINARY_TYPE: BINARY, MULTIPART_FORM: _FORM}
)
_IMAGE_ERRORS: Final = {
    HTTPStatus.BAD_REQUEST: "No image can be read, or a query field is invalid",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The content type is not that of an image or a form",
}


class PredictRoutes:
    """The routes below `/v1`.

    Args:
        repository: the models.
        decoder: decodes the images.
    """

    def __init__(self, repository: ModelRepository, decoder: ImageDecoder) -> None:
        self._repository = repository
        self._classifier = ImageClassifier(decoder, repository.settings.limits.max_pixels)

    def table(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(
                "POST",
                "/v1/predict",
                self._predict,
                Operation(
                    "predict",
                    "Classify one or several images",
                    {
                        **ok_response("The best classes of each image", PredictResponse),
                        **error_responses(_IMAGE_ERRORS, MODEL_NOT_FOUND, BODY_ERRORS),
                    },
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
        ]

    async def _predict(self, request: Request) -> Response:
        query = _query_fields(request)
        with self._repository.get(query.get("model")) as instance:
            top_k = _parse_top_k(query.get("top_k"), len(instance.model.spec.class_names))
            uploads = parse_uploads(request, await request.body())
            result = await self._classifier.classify(
                [upload.data for upload in uploads],
                instance,
                top_k,
                Deadline(request.received_at, request.limits.deadline_s),
                request.is_disconnected,
            )
            return _predict_response(request, instance, uploads, result)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002
        return json_response(ModelsResponse([instance.model.info() for instance in self._repository.instances]))


def _predict_response(
    request: Request, instance: ModelInstance, uploads: list[Upload], result: Classification
) -> Response:
    images = [
        _image_prediction(upload, prediction) for upload, prediction in zip(uploads, result.predictions, strict=True)
    ]
    seconds = (result.decode_s, result.queue_s, result.compute_s, time.perf_counter() - request.received_at)
    timing = Timing(*(round(spent * 1e6) for spent in seconds))
    return json_response(PredictResponse(instance.model.name, instance.model.version, images, timing))


def _image_prediction(upload: Upload, prediction: Prediction | ImageError) -> ImagePrediction:
    if isinstance(prediction, ImageError):
        return ImagePrediction(upload.filename, error=str(prediction))
    return ImagePrediction(
        upload.filename, prediction.label, prediction.index, prediction.score, prediction.top, prediction.labels
    )


def _query_fields(request: Request) -> dict[str, str]:
    fields = request.query_params()
    if unknown := [name for name in fields if name not in _QUERY_FIELDS]:
        problem = f"unknown query field {unknown[0][:80]!r}"
        raise RequestError(HTTPStatus.BAD_REQUEST, problem, f"use {' or '.join(_QUERY_FIELDS)}")
    return fields


def _parse_top_k(value: str | None, classes: int) -> int:
    if value is None:
        return min(_DEFAULT_TOP_K, classes)
    if not re.fullmatch("[0-9]{1,6}", value) or not 1 <= int(value) <= classes:
        raise RequestError(HTTPStatus.BAD_REQUEST, f"top_k is {value[:20]!r}", f"send a number from 1 to {classes}")
    return int(value)
