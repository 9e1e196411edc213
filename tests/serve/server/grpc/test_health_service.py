"""The standard health service."""

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from cifarx_serve.server.settings import Settings
from tests.support.faulty_backend import register_faulty_backend, write_faulty_model
from tests.support.grpc_server import HEALTH, INFERENCE, Server, run_grpc_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register_faulty_backend(monkeypatch)
    return write_faulty_model(tmp_path / "faulty.faulty")


def named(service: str) -> bytes:
    message: bytes = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    return message


def status(answer: bytes) -> int:
    value: int = health_pb2.HealthCheckResponse.FromString(answer).status
    return value


async def check(server: Server, service: str) -> int:
    return status(await server.call(f"{HEALTH}/Check", named(service)))


def test_checks(faulty: Path) -> None:
    async def run() -> None:
        settings = Settings(files={"colors": str(faulty)})
        async with run_grpc_server(settings, open_models=False) as server:
            services = ("", INFERENCE.strip("/"), "colors")
            assert [await check(server, service) for service in services] == [NOT_SERVING] * 3
            await server.components.repository.open()
            assert [await check(server, service) for service in services] == [SERVING] * 3
            code, message = await server.error(f"{HEALTH}/Check", named("shapes"))
            assert (code, message) == (StatusCode.NOT_FOUND, "unknown model 'shapes': choose from colors")
            assert (await server.error(f"{HEALTH}/Check", b"\xff"))[0] is StatusCode.INVALID_ARGUMENT
            server.components.repository.draining = True
            assert [await check(server, service) for service in services] == [NOT_SERVING] * 3

    asyncio.run(run())


def test_a_watch_ends_with_the_server(faulty: Path) -> None:
    """It receives every change, and finally the shutdown of the server."""

    async def run() -> None:
        settings = Settings(files={"colors": str(faulty)})
        async with run_grpc_server(settings, open_models=False) as server:
            watches = [server.channel.unary_stream(f"{HEALTH}/Watch")(named(name)) for name in ("", "colors", "shapes")]
            for watch, first in zip(watches, (NOT_SERVING, NOT_SERVING, SERVICE_UNKNOWN), strict=True):
                assert status(await watch.read()) == first
            await server.components.repository.open()
            assert [status(await watch.read()) for watch in watches[:2]] == [SERVING] * 2
            server.components.repository.draining = True
            draining = asyncio.ensure_future(server.server.drain())
            for watch in watches:
                assert status(await watch.read()) == NOT_SERVING
                with pytest.raises(grpc.aio.AioRpcError, match="the server is shutting down") as raised:
                    await watch.read()
                assert raised.value.code() is StatusCode.UNAVAILABLE
            await draining

    asyncio.run(run())
