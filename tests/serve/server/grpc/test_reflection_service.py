"""The reflection service, as grpcurl calls it."""

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc import StatusCode
from grpc_reflection.v1alpha import reflection_pb2

from cifarx_serve.server.settings import Settings
from tests.support.color_model import write_onnx
from tests.support.grpc_server import REFLECTION, run_grpc_server

METHOD = f"{REFLECTION}/ServerReflectionInfo"


def test_services_and_their_messages_are_found(tmp_path: Path) -> None:
    async def run() -> None:
        settings = Settings(files={"colors": str(write_onnx(tmp_path / "colors.onnx"))})
        async with run_grpc_server(settings) as server:
            stream = server.channel.stream_stream(METHOD)(timeout=30)

            async def ask(**fields: str) -> reflection_pb2.ServerReflectionResponse:
                await stream.write(reflection_pb2.ServerReflectionRequest(**fields).SerializeToString())
                return reflection_pb2.ServerReflectionResponse.FromString(await stream.read())

            listed = (await ask(list_services="*")).list_services_response
            assert sorted(service.name for service in listed.service) == [
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
                "inference.GRPCInferenceService",
            ]
            found = (await ask(file_containing_symbol="inference.ModelInferRequest")).file_descriptor_response
            files = [FileDescriptorProto.FromString(file) for file in found.file_descriptor_proto]
            assert "ModelInferRequest" in [message.name for file in files for message in file.message_type]
            assert (await ask(file_containing_symbol="no.Such")).error_response.error_code == 5
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
            malformed = server.channel.stream_stream(METHOD)(timeout=30)
            await malformed.write(b"\xff")
            with pytest.raises(grpc.aio.AioRpcError, match="are not a valid") as raised:
                await malformed.read()
            assert raised.value.code() is StatusCode.INVALID_ARGUMENT

    asyncio.run(run())
