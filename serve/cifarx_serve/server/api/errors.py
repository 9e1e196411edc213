"""The HTTP status of every error of inference."""

from http import HTTPStatus
from typing import Final

from cifarx_serve.errors import CifarxError, DeviceMemoryError, ImageError
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.server.errors import ClientDisconnect, RequestError
from cifarx_serve.server.inference.decoder_pool import SlowImage
from cifarx_serve.server.inference.errors import (
    BatcherClosed,
    DeadlineExceeded,
    DecoderUnavailable,
    InvalidInput,
    ModelControlError,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
    QueueFull,
    RequestCancelled,
)

STATUSES: Final[dict[type[CifarxError], HTTPStatus]] = {
    ImageError: HTTPStatus.BAD_REQUEST,
    InvalidInput: HTTPStatus.BAD_REQUEST,
    ModelControlError: HTTPStatus.BAD_REQUEST,
    ModelNotFound: HTTPStatus.NOT_FOUND,
    TooManyPixels: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    SlowImage: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ModelNotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    ModelFailed: HTTPStatus.SERVICE_UNAVAILABLE,
    DeviceMemoryError: HTTPStatus.SERVICE_UNAVAILABLE,
    QueueFull: HTTPStatus.SERVICE_UNAVAILABLE,
    DecoderUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    BatcherClosed: HTTPStatus.SERVICE_UNAVAILABLE,
    DeadlineExceeded: HTTPStatus.GATEWAY_TIMEOUT,
}


def to_http_error(error: Exception) -> Exception:
    """Return the HTTP error that an error of inference stands for, and any other exception as it is."""
    if isinstance(error, CifarxError) and (status := STATUSES.get(type(error))):
        return RequestError(status, error.problem, error.remedy)
    return ClientDisconnect() if isinstance(error, RequestCancelled) else error
