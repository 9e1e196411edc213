"""The service of the Open Inference Protocol, in a server in the event loop of the test."""

import asyncio
import io
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc import StatusCode
from PIL import Image
from tritonclient.grpc import service_pb2

from cifarx_serve.server.grpc.inference_service import _MAX_STREAMED
from cifarx_serve.server.settings import Limits, Settings
from tests.support.color_model import write_onnx
from tests.support.faulty_backend import LARGE, POISON, register_faulty_backend, write_faulty_model
from tests.support.grpc_server import INFERENCE, Server, run_grpc_server

INFER = f"{INFERENCE}/ModelInfer"
STREAM = f"{INFERENCE}/ModelStreamInfer"
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(files={"colors": str(write_onnx(tmp_path / "colors.onnx"))})


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register_faulty_backend(monkeypatch)
    return write_faulty_model(tmp_path / "faulty.faulty")


def infer_request(color: tuple[int, ...] = RED, model: str = "colors", request_id: str = "", images: int = 1) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    request.inputs.add(name="input", datatype="UINT8", shape=[images, 4, 6, 3])
    request.raw_input_contents.append(bytes([*color] * 24 * images))
    message: bytes = request.SerializeToString()
    return message


def files_request(*files: bytes) -> bytes:
    request = service_pb2.ModelInferRequest(model_name="colors")
    request.inputs.add(name="input", datatype="BYTES", shape=[len(files)], contents={"bytes_contents": files})
    message: bytes = request.SerializeToString()
    return message


def png(color: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def logits(answer: bytes) -> list[list[float]]:
    response = service_pb2.ModelInferResponse.FromString(answer)
    (output,) = response.outputs
    raw = response.raw_output_contents
    values = np.frombuffer(raw[0], np.float32) if raw else np.array(output.contents.fp32_contents)
    rows: list[list[float]] = values.reshape(list(output.shape)).tolist()
    return rows


def test_metadata_and_health(settings: Settings) -> None:
    async def run() -> None:
        async with run_grpc_server(settings) as server:
            version = server.components.repository.get("colors").model.version
            live = await server.call(f"{INFERENCE}/ServerLive", b"")
            assert service_pb2.ServerLiveResponse.FromString(live).live
            ready = await server.call(f"{INFERENCE}/ServerReady", b"")
            assert service_pb2.ServerReadyResponse.FromString(ready).ready
            metadata = await server.call(f"{INFERENCE}/ServerMetadata", b"")
            assert service_pb2.ServerMetadataResponse.FromString(metadata).name == "cifarx"
            named = service_pb2.ModelMetadataRequest(name="colors", version=version).SerializeToString()
            metadata = service_pb2.ModelMetadataResponse.FromString(
                await server.call(f"{INFERENCE}/ModelMetadata", named)
            )
            assert (metadata.name, version in metadata.versions) == ("colors", True)
            for name, is_ready in (("colors", True), ("shapes", False)):
                request = service_pb2.ModelReadyRequest(name=name).SerializeToString()
                answer = await server.call(f"{INFERENCE}/ModelReady", request)
                assert service_pb2.ModelReadyResponse.FromString(answer).ready == is_ready
            unknown = service_pb2.ModelMetadataRequest(name="shapes").SerializeToString()
            assert (await server.error(f"{INFERENCE}/ModelMetadata", unknown))[0] is StatusCode.NOT_FOUND

    asyncio.run(run())


def test_models_that_are_opening_or_failing(faulty: Path) -> None:
    settings = Settings(files={"colors": str(faulty)})

    async def ready(server: Server) -> tuple[bool, bool]:
        of_server = await server.call(f"{INFERENCE}/ServerReady", b"")
        of_model = await server.call(f"{INFERENCE}/ModelReady", b"\x0a\x06colors")
        return (
            service_pb2.ServerReadyResponse.FromString(of_server).ready,
            service_pb2.ModelReadyResponse.FromString(of_model).ready,
        )

    async def run() -> None:
        async with run_grpc_server(settings, open_models=False) as server:
            assert await ready(server) == (False, False)
            assert await server.error(INFER, infer_request()) == (
                StatusCode.UNAVAILABLE,
                "model colors is still loading: try again in a second",
            )
            await server.components.repository.open()
            assert await ready(server) == (True, True)
            code, message = await server.error(INFER, infer_request(POISON))
            assert (code, message.partition(":")[0]) == (
                StatusCode.INVALID_ARGUMENT,
                "model colors cannot run on uint8 (1, 4, 6, 3)",
            )
            assert (await server.error(INFER, infer_request(LARGE)))[0] is StatusCode.UNAVAILABLE
            faulty.with_suffix(".failing").touch()
            assert await server.error(INFER, infer_request()) == (
                StatusCode.UNAVAILABLE,
                "model colors has failed: try again in a second",
            )
            assert await ready(server) == (False, False)

    asyncio.run(run())


def test_image_files(settings: Settings) -> None:
    """They are decoded and resized like those of /v1/predict; an error names the image."""

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            answer = await server.call(INFER, files_request(png(RED), png(BLUE, (1300, 900))))
            np.testing.assert_allclose(logits(answer), [[10, 0, 0], [0, 0, 10]], atol=1e-4)
            code, message = await server.error(INFER, files_request(png(RED), b"not an image"))
            assert code is StatusCode.INVALID_ARGUMENT
            assert message.startswith("image 1: ")

    asyncio.run(run())


def test_large_messages_are_parsed_in_a_thread(settings: Settings) -> None:
    settings = Settings(files=settings.files, limits=Limits(max_images=4000, max_queue=4000))

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            assert logits(await server.call(INFER, infer_request(images=4000))) == [[10, 0, 0]] * 4000
            await server.error(INFER, bytes(300_000))

    asyncio.run(run())


def test_limits(settings: Settings) -> None:
    settings = Settings(files=settings.files, limits=Limits(max_images=2, max_pixels=100))

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            assert await server.error(INFER, infer_request(images=3)) == (
                StatusCode.RESOURCE_EXHAUSTED,
                "3 images in one request: send at most 2",
            )
            code, _ = await server.error(INFER, files_request(png(RED, (50, 50))))
            assert code is StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(run())


async def wait_until_queued(server: Server, images: int) -> None:
    batcher = server.components.repository.get("colors")._batcher
    end = time.monotonic() + 30
    while batcher._queued_images != images:
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def test_deadlines_and_cancellation(faulty: Path) -> None:
    """The shorter deadline holds, that of the server or of the client; a cancelled call leaves the queue."""
    settings = Settings(files={"colors": str(faulty)}, limits=Limits(deadline_s=1.0))

    async def run() -> str:
        async with run_grpc_server(settings) as server:
            faulty.with_suffix(".slow").touch()
            infer = server.channel.unary_unary(INFER)
            blocking = infer(infer_request(), timeout=30)
            await asyncio.sleep(0.1)
            short = infer(infer_request(), timeout=0.2)
            cancelled = infer(infer_request(), timeout=30)
            long = infer(infer_request(), timeout=30)
            await wait_until_queued(server, 3)
            cancelled.cancel()
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await short
            assert raised.value.code() is StatusCode.DEADLINE_EXCEEDED
            await wait_until_queued(server, 1)
            with pytest.raises(grpc.aio.AioRpcError, match="no response within 1 s: try again") as raised:
                await long
            assert raised.value.code() is StatusCode.DEADLINE_EXCEEDED
            faulty.with_suffix(".slow").unlink()
            with pytest.raises(grpc.aio.AioRpcError, match="no response within 1 s"):
                await blocking
            np.testing.assert_allclose(logits(await infer(infer_request(), timeout=30)), [[10, 0, 0]])
            return server.components.metrics.render().decode()

    counts = [line for line in asyncio.run(run()).splitlines() if "_total{" in line]
    assert f'cifarx_requests_total{{route="{INFER}",status="CANCELLED"}} 1.0' in counts
    assert f'cifarx_requests_total{{route="{INFER}",status="DEADLINE_EXCEEDED"}} 3.0' in counts
    assert 'cifarx_errors_total{cause="client_left"} 1.0' in counts
    assert 'cifarx_errors_total{cause="deadline"} 3.0' in counts


@pytest.mark.parametrize("seconds", (0.05, 1.001, 1.0095))
def test_the_deadline_of_the_client_is_no_cancellation(faulty: Path, seconds: float) -> None:
    """The client ends the call first: its deadline starts earlier, and gRPC sends 1.001 s as 1.01 s."""
    settings = Settings(files={"colors": str(faulty)})

    async def run() -> str:
        async with run_grpc_server(settings) as server:
            faulty.with_suffix(".slow").touch()
            infer = server.channel.unary_unary(INFER)
            blocking = infer(infer_request(), timeout=30)
            await asyncio.sleep(0.1)
            stream = server.channel.stream_stream(STREAM)(timeout=seconds)
            await stream.write(infer_request())
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await infer(infer_request(), timeout=seconds)
            assert raised.value.code() is StatusCode.DEADLINE_EXCEEDED
            assert await stream.code() is StatusCode.DEADLINE_EXCEEDED
            await wait_until_queued(server, 0)
            faulty.with_suffix(".slow").unlink()
            await blocking
            return server.components.metrics.render().decode()

    counts = [line for line in asyncio.run(run()).splitlines() if "_total{" in line]
    assert f'cifarx_requests_total{{route="{INFER}",status="DEADLINE_EXCEEDED"}} 1.0' in counts
    assert not [line for line in counts if "CANCELLED" in line or "client_left" in line]


def test_a_full_queue(faulty: Path) -> None:
    settings = Settings(files={"colors": str(faulty)}, limits=Limits(max_queue=1))

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            faulty.with_suffix(".slow").touch()
            infer = server.channel.unary_unary(INFER)
            running = infer(infer_request(), timeout=30)
            await asyncio.sleep(0.1)
            queued = infer(infer_request(), timeout=30)
            await wait_until_queued(server, 1)
            assert await server.error(INFER, infer_request()) == (
                StatusCode.UNAVAILABLE,
                "the queue is full, with 1 images of at most 1: try again in a second",
            )
            faulty.with_suffix(".slow").unlink()
            await running
            await queued

    asyncio.run(run())


async def read_answers(stream: Any) -> list[service_pb2.ModelStreamInferResponse]:
    return [service_pb2.ModelStreamInferResponse.FromString(answer) async for answer in stream]


def test_streams_answer_in_order_and_go_on_after_errors(settings: Settings) -> None:
    async def run() -> None:
        async with run_grpc_server(settings) as server:
            stream = server.channel.stream_stream(STREAM)(timeout=30)
            answers = asyncio.ensure_future(read_answers(stream))
            for number in range(100):
                await stream.write(
                    infer_request(model="shapes" if number % 10 == 3 else "colors", request_id=str(number))
                )
            await stream.write(b"\xff")
            await stream.done_writing()
            received = await answers
            assert [answer.infer_response.id for answer in received] == [*map(str, range(100)), ""]
            for number, answer in enumerate(received[:-1]):
                if number % 10 == 3:
                    assert answer.error_message == "unknown model 'shapes': choose from colors"
                else:
                    assert not answer.error_message
                    assert logits(answer.infer_response.SerializeToString()) == [[10, 0, 0]]
                assert answer.infer_response.parameters["triton_final_response"].bool_param
            assert received[-1].error_message.startswith("1 bytes are not a valid inference.ModelInferRequest")
            assert await stream.code() is StatusCode.OK

    asyncio.run(run())


def test_a_stream_has_a_limited_number_of_requests_in_flight(faulty: Path) -> None:
    settings = Settings(files={"colors": str(faulty)})

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            faulty.with_suffix(".slow").touch()
            stream = server.channel.stream_stream(STREAM)(timeout=30)
            answers = asyncio.ensure_future(read_answers(stream))
            for number in range(100):
                await stream.write(infer_request(request_id=str(number)))
            await stream.done_writing()
            # One runs, one more is awaited than fits into the queue of answers, and one waits for room there.
            await wait_until_queued(server, _MAX_STREAMED + 1)
            await asyncio.sleep(0.2)
            await wait_until_queued(server, _MAX_STREAMED + 1)
            faulty.with_suffix(".slow").unlink()
            assert [answer.infer_response.id for answer in await answers] == [*map(str, range(100))]

    asyncio.run(run())


def test_a_stream_that_is_cancelled_leaves_the_queue(faulty: Path) -> None:
    settings = Settings(files={"colors": str(faulty)})

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            faulty.with_suffix(".slow").touch()
            stream = server.channel.stream_stream(STREAM)(timeout=30)
            for _ in range(5):
                await stream.write(infer_request())
            await wait_until_queued(server, 4)
            stream.cancel()
            await wait_until_queued(server, 0)
            faulty.with_suffix(".slow").unlink()
            assert logits(await server.call(INFER, infer_request())) == [[10, 0, 0]]

    asyncio.run(run())


def test_requests_of_a_stream_have_deadlines(faulty: Path) -> None:
    settings = Settings(files={"colors": str(faulty)}, limits=Limits(deadline_s=0.2))

    async def run() -> None:
        async with run_grpc_server(settings) as server:
            faulty.with_suffix(".slow").touch()
            stream = server.channel.stream_stream(STREAM)(timeout=30)
            await stream.write(infer_request(request_id="7"))
            answer = service_pb2.ModelStreamInferResponse.FromString(await stream.read())
            assert (answer.infer_response.id, answer.error_message.partition(":")[0]) == (
                "7",
                "no response within 0.2 s",
            )
            faulty.with_suffix(".slow").unlink()
            await stream.write(infer_request(request_id="8"))
            answer = service_pb2.ModelStreamInferResponse.FromString(await stream.read())
            assert (answer.infer_response.id, answer.error_message) == ("8", "")
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF

    asyncio.run(run())


def test_methods_that_are_not_supported(settings: Settings) -> None:
    async def run() -> None:
        async with run_grpc_server(settings) as server:
            for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
                if method.name.startswith(("SystemSharedMemory", "CudaSharedMemory", "Trace", "Log")):
                    code, message = await server.error(f"{INFERENCE}/{method.name}", b"")
                    assert code is StatusCode.UNIMPLEMENTED
                    assert message.startswith(f"{method.name} is not supported: ")

    asyncio.run(run())
