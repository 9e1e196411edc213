"""The service `grpc.health.v1.Health`, which Kubernetes, load balancers and `grpc_health_probe` call.

Source: doc/health-checking.md of grpc/grpc.
"""

from contextlib import suppress
from http import HTTPStatus
from typing import Final

from grpc_health.v1 import health_pb2

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.grpc.call import Call
from cifarx_serve.server.grpc.handlers import Method, Stream, shutting_down
from cifarx_serve.server.grpc.inference_service import SERVICE as INFERENCE
from cifarx_serve.server.grpc.messages import parse
from cifarx_serve.server.inference.errors import ModelNotFound, ModelNotReady
from cifarx_serve.server.inference.readiness import Readiness
from cifarx_serve.server.inference.repository import ModelRepository

SERVICE: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_OVERALL: Final = ("", INFERENCE)
"""The names that stand for all models."""

_POLL_S: Final = 0.25
"""How late a client that watches the health learns of a change."""

_SERVING: Final[int] = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final[int] = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN: Final[int] = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService:
    """The service. The empty name and that of the inference service stand for all models; other names are models.

    Args:
        repository: the models.
        readiness: the state of the worker.
    """

    def __init__(self, repository: ModelRepository, readiness: Readiness) -> None:
        self._repository = repository
        self._readiness = readiness

    def methods(self) -> dict[str, Method]:
        """Return the methods by name."""
        return {
            f"/{SERVICE}/Check": Method(self._check, public=True),
            f"/{SERVICE}/Watch": Method(stream=self._watch, public=True),
        }

    async def _check(self, message: bytes, call: Call) -> bytes:
        """Answer the health of a service; a model that does not exist is an error."""
        name = _requested(message, call)
        with suppress(ModelNotReady):
            if name not in _OVERALL:
                self._repository.get(name)
        return _encode(self._status(name))

    async def _watch(self, stream: Stream) -> None:
        """Send the health of a service now and whenever it changes, until the client or the server ends."""
        message = await stream.receive()
        if message is None:
            raise RequestError(HTTPStatus.BAD_REQUEST, "the call has no message", "send one")
        name = _requested(message, stream.call)
        last, draining = None, False
        while not draining:
            status = self._status(name)
            if status != last:
                await stream.send(_encode(status))
                last = status
            draining = await stream.wait_for_drain(_POLL_S)
        if last != _NOT_SERVING:
            await stream.send(_encode(_NOT_SERVING))
        raise shutting_down()

    def _status(self, name: str) -> int:
        if name in _OVERALL:
            return _SERVING if self._readiness.state == "ready" else _NOT_SERVING
        try:
            model = self._repository.get(name).model
        except ModelNotFound:
            return _SERVICE_UNKNOWN
        except ModelNotReady:
            return _NOT_SERVING
        return _NOT_SERVING if model.failed or self._repository.draining else _SERVING


def _requested(message: bytes, call: Call) -> str:
    """Return the name of the requested service. As over HTTP, the health of one model requires an API key."""
    name: str = parse(message, health_pb2.HealthCheckRequest).service
    if name not in _OVERALL:
        call.require_key()
    return name


def _encode(status: int) -> bytes:
    encoded: bytes = health_pb2.HealthCheckResponse(status=status).SerializeToString()
    return encoded
