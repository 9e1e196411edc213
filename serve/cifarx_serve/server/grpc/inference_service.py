"""The service `inference.GRPCInferenceService` of the Open Inference Protocol, as Triton and KServe define it."""

import asyncio
import time
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from cifarx_serve.server.api.open_inference import model_metadata, server_metadata
from cifarx_serve.server.api.tensor_codec import EncodedImages
from cifarx_serve.server.errors import ClientDisconnect, RequestError
from cifarx_serve.server.grpc.call import Call
from cifarx_serve.server.grpc.handlers import Method, Stream
from cifarx_serve.server.grpc.messages import (
    infer_response,
    model_metadata_response,
    parse,
    parse_infer,
    stream_error,
    stream_response,
)
from cifarx_serve.server.grpc.status import Status, Unimplemented
from cifarx_serve.server.inference.deadline import Deadline, ThreadPool
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.errors import ModelNotFound, ModelNotReady
from cifarx_serve.server.inference.image_batch import decode_batch
from cifarx_serve.server.inference.readiness import Readiness
from cifarx_serve.server.inference.repository import ModelInstance, ModelRepository
from cifarx_serve.server.inference.stages import record_decoding, record_inference
from cifarx_serve.system.versions import package_version

SERVICE: Final = "inference.GRPCInferenceService"

_MAX_INLINE_BYTES: Final = 256 * 1024
"""Messages up to this size are parsed in the event loop; larger ones are parsed in a thread."""

_MAX_STREAMED: Final = 16
"""How many requests of a stream are answered at the same time; the next one is received when an answer is sent."""

_UNSUPPORTED: Final = {
    **dict.fromkeys(
        ("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
        "send tensors as raw_input_contents",
    ),
    **dict.fromkeys(
        ("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"),
        "send tensors as raw_input_contents",
    ),
    "TraceSetting": "set it when the server is started",
    "LogSettings": "set it when the server is started",
}
"""The methods of Triton that are not supported, and what to use instead."""


class InferenceService:
    """The service.

    Args:
        repository: the models.
        readiness: the state of the worker.
        decoder: decodes encoded images.
        threads: the threads that parse large messages.
    """

    def __init__(
        self, repository: ModelRepository, readiness: Readiness, decoder: ImageDecoder, threads: ThreadPool
    ) -> None:
        self._repository = repository
        self._readiness = readiness
        self._decoder = decoder
        self._threads = threads
        self._limits = repository.settings.limits
        self._abandoned: set[asyncio.Future[Any]] = set()  # the event loop keeps only weak references

    def methods(self) -> dict[str, Method]:
        """Return the methods by name."""
        methods = {
            "ServerLive": Method(self._server_live, public=True),
            "ServerReady": Method(self._server_ready, public=True),
            "ServerMetadata": Method(self._server_metadata, public=True),
            "ModelReady": Method(self._model_ready),
            "ModelMetadata": Method(self._model_metadata),
            "ModelInfer": Method(self._model_infer),
            "ModelStreamInfer": Method(stream=self._model_stream_infer),
        }
        methods |= {name: _unsupported_method(name, remedy) for name, remedy in _UNSUPPORTED.items()}
        return {f"/{SERVICE}/{name}": method for name, method in methods.items()}

    async def _server_live(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        parse(message, service_pb2.ServerLiveRequest)
        return _encode(service_pb2.ServerLiveResponse(live=True))

    async def _server_ready(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        parse(message, service_pb2.ServerReadyRequest)
        return _encode(service_pb2.ServerReadyResponse(ready=self._readiness.state == "ready"))

    async def _server_metadata(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        parse(message, service_pb2.ServerMetadataRequest)
        metadata = server_metadata(package_version())
        return _encode(service_pb2.ServerMetadataResponse(name=metadata.name, version=metadata.version))

    async def _model_ready(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        """Answer whether a model can answer requests. As with Triton, a model that does not exist is not ready."""
        request = parse(message, service_pb2.ModelReadyRequest)
        try:
            model = self._instance(request.name, request.version).model
        except (ModelNotFound, ModelNotReady):
            return _encode(service_pb2.ModelReadyResponse(ready=False))
        return _encode(service_pb2.ModelReadyResponse(ready=not (model.failed or self._repository.draining)))

    async def _model_metadata(self, message: bytes, call: Call) -> bytes:  # noqa: ARG002
        request = parse(message, service_pb2.ModelMetadataRequest)
        model = self._instance(request.name, request.version).model
        versions = [instance.model.protocol_version for instance in self._repository.versions(model.name)]
        return _encode(model_metadata_response(model_metadata(model.name, versions, model.platform, model.spec)))

    async def _model_infer(self, message: bytes, call: Call) -> bytes:
        deadline = call.deadline(self._limits.deadline_s)
        request = await self._parse(message, deadline)
        return _encode(await self._infer(request, len(message), call, deadline))

    async def _model_stream_infer(self, stream: Stream) -> None:
        """Answer the requests of a stream in their order. Several wait for the model at the same time."""
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(_MAX_STREAMED)
        end: RequestError | None = None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_send_answers(stream, answers))
            try:
                while (message := await stream.receive()) is not None:
                    await answers.put(tasks.create_task(self._answer_streamed(message, stream)))
            except RequestError as error:  # the server is shut down: first answer what has been received
                end = error
            await answers.put(None)
        if end is not None:
            raise end

    async def _answer_streamed(self, message: bytes, stream: Stream) -> bytes:
        request_id = ""

        async def infer(message: bytes, call: Call) -> bytes:
            nonlocal request_id
            deadline = call.deadline(self._limits.deadline_s)
            request = await self._parse(message, deadline)
            request_id = request.id
            return _encode(stream_response(await self._infer(request, len(message), call, deadline)))

        def error(status: Status) -> bytes:
            return _encode(stream_error(request_id, status.message))

        return await stream.answer(message, infer, error)

    async def _parse(self, message: bytes, deadline: Deadline) -> service_pb2.ModelInferRequest:
        if len(message) <= _MAX_INLINE_BYTES:
            return parse(message, service_pb2.ModelInferRequest)
        return await self._threads.run(deadline, parse, message, service_pb2.ModelInferRequest)

    async def _infer(
        self, request: service_pb2.ModelInferRequest, size: int, call: Call, deadline: Deadline
    ) -> service_pb2.ModelInferResponse:
        """Return the answer to a request, whose message had `size` bytes."""
        with self._instance(request.model_name, request.model_version) as instance:
            model = instance.model
            if size <= _MAX_INLINE_BYTES:
                infer = parse_infer(request, model.spec, self._limits)
            else:
                infer = await self._threads.run(deadline, parse_infer, request, model.spec, self._limits)
            tensor = infer.tensor
            if isinstance(tensor, list):
                started_at, images = time.perf_counter(), len(tensor)
                tensor = await self._decode(tensor, instance, call, deadline)
                if call.span is not None:
                    record_decoding(call.span, started_at, time.perf_counter() - started_at, images)
            result = await instance.infer(tensor, deadline, call.is_disconnected)
            if call.span is not None:
                record_inference(call.span, model, result)
        return infer_response(infer, model.name, model.protocol_version, model.spec.output, result.values)

    async def _decode(
        self, images: EncodedImages, instance: ModelInstance, call: Call, deadline: Deadline
    ) -> NDArray[np.uint8]:
        """Decode image files. When the call is cancelled, the image that is being decoded is finished first."""
        decoding = asyncio.ensure_future(
            decode_batch(images, self._decoder, instance, self._limits.max_pixels, deadline, call.is_disconnected)
        )
        try:
            return await asyncio.shield(decoding)
        except asyncio.CancelledError:
            call.cancelled = True
            self._abandoned.add(decoding)
            decoding.add_done_callback(self._forget)
            raise

    def _forget(self, decoding: "asyncio.Future[Any]") -> None:
        self._abandoned.discard(decoding)
        if not decoding.cancelled():
            decoding.exception()  # otherwise asyncio would log it

    def _instance(self, name: str, version: str) -> ModelInstance:
        return self._repository.get(name, version or None)


async def _send_answers(stream: Stream, answers: "asyncio.Queue[asyncio.Task[bytes] | None]") -> None:
    """Send the answers in their order until `None`, or drop them if the client has left."""
    has_left = False
    while (answer := await answers.get()) is not None:
        message = await answer
        if not has_left:
            try:
                await stream.send(message)
            except ClientDisconnect:
                has_left = True


def _unsupported_method(name: str, remedy: str) -> Method:
    async def refuse(message: bytes, call: Call) -> bytes:  # noqa: ARG001
        raise Unimplemented(f"{name} is not supported", remedy)

    return Method(refuse)


def _encode(message: Message) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded
