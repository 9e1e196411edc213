"""What serves HTTP and gRPC in one process."""

from collections.abc import Callable
from pathlib import Path

from tests.support.color_model import write_onnx

PROGRAM = """
import asyncio, sys
from cifarx_serve.server import app
from cifarx_serve.server.processes import worker
from cifarx_serve.server.settings import Settings

async def main():
    components = app.create_components(Settings(files={"colors": sys.argv[1]}), None)
    app.create_app(components)
    assert not {"grpc", "tritonclient", "google.protobuf", "opentelemetry"} & set(sys.modules)
    app.create_grpc_server(components, "127.0.0.1:0")
    assert "grpc" in sys.modules

asyncio.run(main())
"""


def test_grpc_is_imported_only_to_serve_it(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    fresh_python(PROGRAM, write_onnx(tmp_path / "colors.onnx"))
