"""The gRPC status of every error."""

import pytest
from grpc import StatusCode

from cifarx_serve.server.api.errors import STATUSES
from cifarx_serve.server.grpc.status import CANCELLED, Unimplemented, error_status
from cifarx_serve.server.inference.errors import DeadlineExceeded, ModelNotFound, QueueFull, RequestCancelled


@pytest.mark.parametrize("kind", STATUSES)
def test_every_error_of_inference_has_a_status_of_its_own_kind(kind: type[Exception]) -> None:
    status = error_status(kind("problem", "remedy"))
    assert status.code not in (StatusCode.OK, StatusCode.INTERNAL, StatusCode.UNKNOWN)
    assert status.message == "problem: remedy"
    assert status.cause


def test_statuses() -> None:
    assert error_status(ModelNotFound("a", "b")).code is StatusCode.NOT_FOUND
    assert error_status(QueueFull("a", "b")) == (StatusCode.UNAVAILABLE, "a: b", "overloaded")
    assert error_status(DeadlineExceeded("a", "b")) == (StatusCode.DEADLINE_EXCEEDED, "a: b", "deadline")
    assert error_status(Unimplemented("a", "b")).code is StatusCode.UNIMPLEMENTED
    assert error_status(RequestCancelled()) is CANCELLED


def test_an_unexpected_error_is_logged_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    status = error_status(ZeroDivisionError("secret"))
    assert status.code is StatusCode.INTERNAL
    assert "secret" not in status.message
    assert "ZeroDivisionError: secret" in capsys.readouterr().err
