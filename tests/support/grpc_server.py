"""A gRPC server in the event loop of a test, and calls of its methods without a client library."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import grpc.aio

from cifarx_serve.server.app import Components, create_components, create_grpc_server
from cifarx_serve.server.grpc.server import GrpcServer
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.processes.port_reservation import PortReservation
from cifarx_serve.server.settings import Settings

INFERENCE = "/inference.GRPCInferenceService"
HEALTH = "/grpc.health.v1.Health"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection"

TIMEOUT_S = 30.0


class Server(NamedTuple):
    """A server, what it is made of, and a channel to it."""

    server: GrpcServer
    components: Components
    channel: grpc.aio.Channel

    async def call(self, method: str, message: bytes, **metadata: str) -> Any:
        """Send one message, and return the answer as bytes; `_` in the name of a metadatum stands for `-`."""
        pairs = [(key.replace("_", "-"), value) for key, value in metadata.items()]
        return await self.channel.unary_unary(method)(message, timeout=TIMEOUT_S, metadata=pairs)

    async def error(self, method: str, message: bytes, **metadata: str) -> tuple[grpc.StatusCode, str]:
        """Send one message, and return the code and the message of the error."""
        try:
            await self.call(method, message, **metadata)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        raise AssertionError("no error")


@asynccontextmanager
async def run_grpc_server(
    settings: Settings, access_log: AccessLog | None = None, open_models: bool = True
) -> AsyncIterator[Server]:
    """Serve models on a free port of the loopback interface, and drain the server at the end."""
    components = create_components(settings, access_log)
    reservation = PortReservation("127.0.0.1", 0)
    server = create_grpc_server(components, reservation.address)
    try:
        if open_models:
            await components.repository.open()
        await server.start()
        async with grpc.aio.insecure_channel(
            reservation.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            yield Server(server, components, channel)
    finally:
        await server.drain()
        reservation.close()
        await components.repository.close()
        components.decoder.close()
        components.threads.close()
