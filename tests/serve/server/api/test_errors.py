from http import HTTPStatus

import pytest

from cifarx_serve.errors import CifarxError, DeviceMemoryError, ImageError, ModelFileError
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.server.api.errors import STATUSES, to_http_error
from cifarx_serve.server.errors import CAUSES, ClientDisconnect, RequestError
from cifarx_serve.server.inference import errors
from cifarx_serve.server.inference.errors import InferenceError, RequestCancelled


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ImageError, 400),
        (errors.InvalidInput, 400),
        (errors.ModelNotFound, 404),
        (TooManyPixels, 413),
        (errors.ModelNotReady, 503),
        (errors.ModelFailed, 503),
        (DeviceMemoryError, 503),
        (errors.QueueFull, 503),
        (errors.BatcherClosed, 503),
        (errors.DeadlineExceeded, 504),
    ],
)
def test_an_error_of_inference_has_a_status(error: type[CifarxError], status: int) -> None:
    converted = to_http_error(error("what is wrong", "how to fix it"))
    assert isinstance(converted, RequestError)
    assert converted.status == HTTPStatus(status)
    assert converted.status in CAUSES
    assert str(converted) == "what is wrong: how to fix it"


def test_every_error_of_inference_has_a_status() -> None:
    assert set(InferenceError.__subclasses__()) <= STATUSES.keys()


def test_a_cancelled_request_is_a_disconnected_client() -> None:
    assert isinstance(to_http_error(RequestCancelled()), ClientDisconnect)


@pytest.mark.parametrize(
    "error",
    [
        RequestError(HTTPStatus.NOT_FOUND, "what is wrong", "how to fix it"),
        ClientDisconnect(),
        ModelFileError("what is wrong", "how to fix it"),
        ZeroDivisionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_exceptions_are_returned_unchanged(error: Exception) -> None:
    assert to_http_error(error) is error
