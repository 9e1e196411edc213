"""The service `grpc.reflection.v1alpha.ServerReflection`, with which tools such as grpcurl find the methods."""

from collections.abc import AsyncIterator
from typing import Final

from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import SERVICE_NAME, aio

from cifarx_serve.server.grpc.handlers import Method, Stream
from cifarx_serve.server.grpc.health_service import SERVICE as HEALTH
from cifarx_serve.server.grpc.inference_service import SERVICE as INFERENCE
from cifarx_serve.server.grpc.messages import parse

SERVICE: Final[str] = SERVICE_NAME


class ReflectionService:
    """The service."""

    def __init__(self) -> None:
        self._servicer = aio.ReflectionServicer(service_names=(INFERENCE, HEALTH, SERVICE))

    def methods(self) -> dict[str, Method]:
        """Return the methods by name."""
        return {f"/{SERVICE}/ServerReflectionInfo": Method(stream=self._answer, public=True)}

    async def _answer(self, stream: Stream) -> None:
        async for response in self._servicer.ServerReflectionInfo(_requests(stream), None):
            await stream.send(response.SerializeToString())


async def _requests(stream: Stream) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    while (message := await stream.receive()) is not None:
        yield parse(message, reflection_pb2.ServerReflectionRequest)
