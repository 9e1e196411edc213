"""What every call has in common, in calls to a server in the event loop of the test."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc import StatusCode
from tritonclient.grpc import service_pb2

from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.settings import Limits, Settings
from tests.support.color_model import write_onnx
from tests.support.grpc_server import HEALTH, INFERENCE, REFLECTION, Server, run_grpc_server

INFER = f"{INFERENCE}/ModelInfer"
STREAM = f"{INFERENCE}/ModelStreamInfer"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(files={"colors": str(write_onnx(tmp_path / "colors.onnx"))})


def red_request(images: int = 1, model: str = "colors") -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model, id="7")
    request.inputs.add(name="input", datatype="UINT8", shape=[images, 4, 6, 3])
    request.raw_input_contents.append(bytes([255, 0, 0] * 24 * images))
    message: bytes = request.SerializeToString()
    return message


async def read_all(server: Server, method: str, *messages: bytes) -> list[Any]:
    stream = server.channel.stream_stream(method)(timeout=30)
    for message in messages:
        await stream.write(message)
    await stream.done_writing()
    return [answer async for answer in stream]


def test_errors_of_calls(settings: Settings) -> None:
    async def run() -> None:
        async with run_grpc_server(settings) as server:
            assert await server.error("/a/b", b"") == (
                StatusCode.UNIMPLEMENTED,
                "unknown method /a/b: see the reflection service for the methods",
            )
            code, message = await server.error(INFER, b"\xff")
            assert code is StatusCode.INVALID_ARGUMENT
            assert message.startswith("1 bytes are not a valid inference.ModelInferRequest: send the message")
            with pytest.raises(grpc.aio.AioRpcError, match="the call has no message: send one"):
                await server.channel.stream_unary(INFER)(iter([]), timeout=30)
            assert len(await server.call(INFER, red_request())) > 10

    asyncio.run(run())


def test_a_message_must_arrive_in_time(settings: Settings) -> None:
    settings = Settings(files=settings.files, limits=Limits(body_timeout_s=0.1))

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            call = server.channel.stream_unary(INFER)(timeout=30)
            with pytest.raises(grpc.aio.AioRpcError, match=r"the message was not received within 0\.1") as raised:
                await call
            assert raised.value.code() is StatusCode.DEADLINE_EXCEEDED
            assert len(await server.call(INFER, red_request())) > 10

    asyncio.run(run())


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_that_is_too_large(settings: Settings, compression: grpc.Compression) -> None:
    """Also one that is small only as long as it is compressed. The log names the cause."""
    settings = Settings(files=settings.files, limits=Limits(max_body_bytes=100_000))
    log = io.BytesIO()

    async def run() -> None:
        async with run_grpc_server(settings, AccessLog(log)) as server:
            call = server.channel.unary_unary(INFER)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(bytes(100_001), timeout=30, compression=compression)
            assert raised.value.code() is StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(bytes(99_999), timeout=30, compression=compression)
            assert raised.value.code() is StatusCode.INVALID_ARGUMENT
            assert len(await call(red_request(), timeout=30, compression=compression)) > 10
            await asyncio.sleep(0.2)

    asyncio.run(run())
    statuses = [(record["status"], record.get("cause")) for record in map(json.loads, log.getvalue().splitlines())]
    assert sorted(statuses) == [("INVALID_ARGUMENT", "bad_request"), ("OK", None), ("RESOURCE_EXHAUSTED", "too_large")]


def test_api_keys(settings: Settings, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("secret\n")
    settings = Settings(files=settings.files, api_key_file=str(keys))

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            refused = (
                StatusCode.UNAUTHENTICATED,
                "missing or invalid API key: send the metadata authorization: Bearer KEY",
            )
            for method in ("ModelInfer", "ModelMetadata", "ModelReady"):
                assert await server.error(f"{INFERENCE}/{method}", b"") == refused
            assert await server.error(INFER, red_request(), authorization="Bearer wrong") == refused
            assert await server.error("/a/b", b"") == refused
            with pytest.raises(grpc.aio.AioRpcError, match="missing or invalid API key"):
                await read_all(server, STREAM, red_request())
            for metadata in ({"authorization": "Bearer secret"}, {"x_api_key": "secret"}):
                assert len(await server.call(INFER, red_request(), **metadata)) > 10
            for method in ("ServerLive", "ServerReady", "ServerMetadata"):
                await server.call(f"{INFERENCE}/{method}", b"")
            await server.call(f"{HEALTH}/Check", b"")
            assert await server.error(f"{HEALTH}/Check", b"\x0a\x06colors") == refused
            await server.call(f"{HEALTH}/Check", b"\x0a\x06colors", x_api_key="secret")
            assert await read_all(server, f"{REFLECTION}/ServerReflectionInfo", b"\x3a\x00")

    asyncio.run(run())


def test_no_more_calls_than_connections(settings: Settings) -> None:
    settings = Settings(files=settings.files, limits=Limits(max_connections=2))

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            streams = [server.channel.stream_stream(STREAM)(timeout=30) for _ in range(2)]
            for stream in streams:
                await stream.write(red_request())
                await stream.read()
            assert await server.error(INFER, red_request()) == (
                StatusCode.UNAVAILABLE,
                "2 calls are open: try again in a second",
            )
            await server.call(f"{HEALTH}/Check", b"")
            for stream in streams:
                await stream.done_writing()
                assert await stream.read() is grpc.aio.EOF
            assert len(await server.call(INFER, red_request())) > 10

    asyncio.run(run())


def test_the_access_log_and_the_request_id(settings: Settings) -> None:
    log = io.BytesIO()

    async def run() -> None:
        async with run_grpc_server(settings, AccessLog(log)) as server:
            call = server.channel.unary_unary(INFER)(red_request(), timeout=30, metadata=[("x-request-id", "mine")])
            await call
            assert dict(await call.trailing_metadata())["x-request-id"] == "mine"
            await server.error(INFER, red_request(model="shapes"), x_request_id="not valid")
            await read_all(server, STREAM, red_request(), red_request(model="shapes"))
            await asyncio.sleep(0.2)

    asyncio.run(run())
    records = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(record["path"], record["status"], record.get("cause")) for record in records] == [
        (INFER, "OK", None),
        (INFER, "NOT_FOUND", "not_found"),
        (STREAM, "OK", None),
        (STREAM, "NOT_FOUND", "not_found"),
    ]
    assert {(record["method"], record["client"]) for record in records} == {("gRPC", "127.0.0.1")}
    assert records[0]["id"] == "mine"
    assert records[1]["id"] != "not valid"
    assert records[0]["bytes"] > 10
    assert len({record["id"] for record in records}) == 4


def test_the_metrics(settings: Settings) -> None:
    async def run() -> str:
        async with run_grpc_server(settings) as server:
            await server.call(INFER, red_request())
            await server.error(INFER, b"\xff")
            await server.error("/a/b", b"")
            await read_all(server, STREAM, red_request(), red_request())
            return server.components.metrics.render().decode()

    page = asyncio.run(run())
    assert f'cifarx_requests_total{{route="{INFER}",status="OK"}} 1.0' in page
    assert f'cifarx_requests_total{{route="{INFER}",status="INVALID_ARGUMENT"}} 1.0' in page
    assert 'cifarx_requests_total{route="unknown",status="UNIMPLEMENTED"} 1.0' in page
    assert f'cifarx_requests_total{{route="{STREAM}",status="OK"}} 2.0' in page
    assert 'cifarx_errors_total{cause="bad_request"} 1.0' in page
