"""Listening, TLS, and draining without the loss of a call."""

import asyncio
import socket
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from grpc import StatusCode
from tritonclient.grpc import service_pb2

from cifarx_serve.errors import CifarxError
from cifarx_serve.server.app import create_components, create_grpc_server
from cifarx_serve.server.settings import Limits, Settings
from tests.support.certificates import create_certificate
from tests.support.color_model import write_onnx
from tests.support.faulty_backend import register_faulty_backend, write_faulty_model
from tests.support.grpc_server import INFERENCE, Server, run_grpc_server

INFER = f"{INFERENCE}/ModelInfer"
STREAM = f"{INFERENCE}/ModelStreamInfer"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(files={"colors": str(write_onnx(tmp_path / "colors.onnx"))}, limits=Limits(deadline_s=1.0))


def infer_request(request_id: str = "") -> bytes:
    request = service_pb2.ModelInferRequest(model_name="colors", id=request_id)
    request.inputs.add(name="input", datatype="UINT8", shape=[1, 4, 6, 3])
    request.raw_input_contents.append(bytes([255, 0, 0] * 24))
    message: bytes = request.SerializeToString()
    return message


def port_of(server: Server) -> int:
    return server.server._port


def client_ports(port: int) -> set[int]:
    """Return the local ports of this process's connections to a port."""
    connections = psutil.Process().net_connections("tcp")
    return {each.laddr.port for each in connections if each.raddr and each.raddr.port == port}


def test_a_port_that_cannot_be_listened_on(settings: Settings) -> None:
    async def run() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            server = create_grpc_server(create_components(settings, None), address)
            with pytest.raises(
                CifarxError, match=f"cannot listen on {address} for gRPC .*: choose another --grpc-port"
            ):
                await server.start()
            await server.drain()

    asyncio.run(run())


def test_tls(settings: Settings, tmp_path: Path) -> None:
    certificate, key = create_certificate(tmp_path)
    settings = Settings(files=settings.files, certfile=str(certificate), keyfile=str(key))

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await server.call(INFER, infer_request())
            assert raised.value.code() is StatusCode.UNAVAILABLE
            credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
            async with grpc.aio.secure_channel(f"localhost:{port_of(server)}", credentials) as channel:
                assert len(await channel.unary_unary(INFER)(infer_request(), timeout=30)) > 10

    asyncio.run(run())


def test_draining_without_clients_is_quick(settings: Settings) -> None:
    async def run() -> float:
        async with run_grpc_server(settings) as server:
            started = time.perf_counter()
            await server.server.drain()
            return time.perf_counter() - started

    assert asyncio.run(run()) < 0.9


def test_draining_with_an_idle_connection_is_quick(settings: Settings) -> None:
    settings = Settings(files=settings.files, limits=Limits(deadline_s=60))

    async def run() -> float:
        async with run_grpc_server(settings) as server:
            await server.call(INFER, infer_request())
            started = time.perf_counter()
            await server.server.drain()
            return time.perf_counter() - started

    assert asyncio.run(run()) < 2


def test_draining_loses_no_call(settings: Settings) -> None:
    """Clients that call without pause get answers until no server is there any more."""

    async def call_until_refused(server: Server, answered: list[int]) -> grpc.aio.AioRpcError:
        infer = server.channel.unary_unary(INFER)
        while True:
            try:
                answered.append(len(await infer(infer_request(), timeout=30)))
            except grpc.aio.AioRpcError as error:
                return error

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            answered: list[int] = []
            clients = [asyncio.ensure_future(call_until_refused(server, answered)) for _ in range(8)]
            await asyncio.sleep(0.3)
            before = len(answered)
            started = time.perf_counter()
            await server.server.drain()
            assert time.perf_counter() - started < 5
            for error in await asyncio.gather(*clients):
                assert error.code() is StatusCode.UNAVAILABLE, error
                assert "onnect" in (error.details() or ""), error  # it could not connect
            assert len(answered) > before > 0

    asyncio.run(run())


def test_draining_answers_what_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_faulty_backend(monkeypatch)
    faulty = write_faulty_model(tmp_path / "faulty.faulty")
    settings = Settings(files={"colors": str(faulty)}, limits=Limits(deadline_s=30))

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            faulty.with_suffix(".slow").touch()
            calls: list[Any] = [server.channel.unary_unary(INFER)(infer_request(), timeout=30) for _ in range(3)]
            stream = server.channel.stream_stream(STREAM)(timeout=30)
            for number in range(3):
                await stream.write(infer_request(str(number)))
            await asyncio.sleep(0.1)
            draining = asyncio.ensure_future(server.server.drain())
            await asyncio.sleep(0.5)
            faulty.with_suffix(".slow").unlink()
            for call in calls:
                assert len(await call) > 10
            answers = [service_pb2.ModelStreamInferResponse.FromString(await stream.read()) for _ in range(3)]
            assert [answer.infer_response.id for answer in answers] == ["0", "1", "2"]
            with pytest.raises(
                grpc.aio.AioRpcError, match="the server is shutting down: open another stream"
            ) as raised:
                await stream.read()
            assert raised.value.code() is StatusCode.UNAVAILABLE
            await draining

    asyncio.run(run())


def test_draining_ends_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never sends its message, and a model that never returns, do not keep the server."""
    register_faulty_backend(monkeypatch)
    faulty = write_faulty_model(tmp_path / "faulty.faulty")
    limits = Limits(deadline_s=0.5, body_timeout_s=0.5)
    settings = Settings(files={"colors": str(faulty)}, limits=limits)

    async def run() -> float:
        async with run_grpc_server(settings) as server:
            faulty.with_suffix(".slow").touch()
            silent = server.channel.stream_unary(INFER)(timeout=30)
            running = server.channel.unary_unary(INFER)(infer_request(), timeout=30)
            await asyncio.sleep(0.1)
            started = time.perf_counter()
            await server.server.drain()
            seconds = time.perf_counter() - started
            for call in (silent, running):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
            faulty.with_suffix(".slow").unlink()
            return seconds

    assert asyncio.run(run()) < 3


def test_connections_end_when_they_are_old(settings: Settings) -> None:
    """Without an error: the client opens another one."""

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            clients: set[int] = set()
            end = time.perf_counter() + 3
            while time.perf_counter() < end and len(clients) < 2:
                await server.call(INFER, infer_request())
                clients |= client_ports(port_of(server))
                await asyncio.sleep(0.01)
            assert len(clients) == 2

    asyncio.run(run())


def test_no_more_connections_than_allowed(settings: Settings) -> None:
    settings = Settings(files=settings.files, limits=Limits(max_connections=2))

    async def run() -> None:
        async with run_grpc_server(settings) as server, AsyncExitStack() as channels:
            answers = []
            for _ in range(4):
                options = [("grpc.use_local_subchannel_pool", 1)]
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{port_of(server)}", options=options)
                await channels.enter_async_context(channel)
                try:
                    await channel.unary_unary(INFER)(infer_request(), timeout=2)
                except grpc.aio.AioRpcError as error:
                    answers.append(error.code())
                else:
                    answers.append(StatusCode.OK)
            assert answers[:2] == [StatusCode.OK] * 2
            assert set(answers[2:]) <= {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}

    asyncio.run(run())


def test_limits_beyond_those_of_grpc(settings: Settings) -> None:
    large = 2**40
    limits = Limits(max_body_bytes=large, max_connections=large, deadline_s=large)
    settings = Settings(files=settings.files, limits=limits)

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            assert len(await server.call(INFER, infer_request())) > 10

    asyncio.run(run())
