"""The HTTP status of every error of inference."""

from http import HTTPStatus
from typing import Final

from cifarx_serve.errors import CifarxError, DeviceMemoryError, ImageError
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.server.api.open_inference import EXTENSIONS
from cifarx_serve.server.errors import ClientDisconnect, RequestError, RouteNotFound
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

_OPEN_INFERENCE: Final = "/v2/"

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
    """Return the HTTP error that an error of inference or of routing stands for, and any other exception as it is."""
    if isinstance(error, CifarxError) and (status := STATUSES.get(type(error))):
        return RequestError(status, error.problem, error.remedy)
    if isinstance(error, RouteNotFound):
        return _route_not_found(error.path)
    return ClientDisconnect() if isinstance(error, RequestCancelled) else error


def _route_not_found(path: str) -> RequestError:
    remedy = "see /docs for the routes"
    if path.startswith(_OPEN_INFERENCE):  # Triton's clients have calls for all of its extensions
        remedy = f"the extensions of this server are {', '.join(EXTENSIONS)}"
    return RequestError(HTTPStatus.NOT_FOUND, f"no route matches the path {path[:80]!r}", remedy)
