"""A model repository on a running server with two workers, controlled with Triton's clients."""

import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.http.aio
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from tests.support.asgi_client import encode_image
from tests.support.color_model import write_onnx
from tests.support.server_process import ServerProcess, run_server, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="a worker is a POSIX process"),
    # gevent, which the client uses, patches modules of the standard library that are already imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

RED = encode_image(Image.new("RGB", (9, 5), "red"), "JPEG")
ATTEMPTS = 8
"""So many new connections reach both workers."""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    directory = tmp_path / "repository"
    for version, order in (("1", (0, 1, 2)), ("2", (2, 1, 0))):
        (directory / "lzh" / version).mkdir(parents=True)
        write_onnx(directory / "lzh" / version / "model.onnx", order=order)
    write_onnx(directory / "cats.onnx", order=(1, 0, 2))
    return directory


def best_class(server: ServerProcess, model: str, version: str = "") -> int:
    """Return the best class of a red image, over a new connection."""
    tensor = InferInput("input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([RED], object))
    with InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        return int(client.infer(model, [tensor], version).as_numpy("logits").argmax())


def answers(ask: Callable[[], int]) -> set[int]:
    return {ask() for _ in range(ATTEMPTS)}


def is_absent(server: ServerProcess, model: str) -> bool:
    """Return whether no worker has the model."""
    statuses = {server.request("GET", f"/v2/models/{model}").status for _ in range(ATTEMPTS)}
    assert statuses <= {200, 404}
    return statuses == {404}


def test_models_are_loaded_and_unloaded_on_request_in_every_worker(repository: Path, tmp_path: Path) -> None:
    arguments = ("--model-repository", repository, "--model-control", "explicit", "--workers", "2")
    with run_server(tmp_path / "server", *arguments) as server:
        assert server.err.startswith("serving no model yet on ")
        assert server.predict().status == 404
        assert server.request("GET", "/readyz").status == 200
        with InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=60) as client:
            index = client.get_model_repository_index()
            assert {(entry["name"], entry["version"], entry["state"]) for entry in index} == {
                *(("lzh", version, "UNAVAILABLE") for version in "12"),
                ("cats", "", "UNAVAILABLE"),
            }
            client.load_model("lzh")
            assert answers(lambda: best_class(server, "lzh")) == {2}
            assert answers(lambda: best_class(server, "lzh", "1")) == {0}
            assert client.get_model_metadata("lzh")["versions"] == ["1", "2"]
            assert client.get_model_config("lzh", "2")["name"] == "lzh"

            def inference_count() -> int:
                (entry,) = client.get_inference_statistics("lzh", "2")["model_stats"]
                return int(entry["inference_count"])

            wait_until(lambda: inference_count() == ATTEMPTS, lambda: f"counted {inference_count()}")

            write_onnx(repository / "lzh/2/model.onnx", order=(1, 0, 2))
            client.load_model("lzh")
            assert answers(lambda: best_class(server, "lzh")) == {1}

            (repository / "broken").mkdir()
            (repository / "broken" / "1").mkdir()
            (repository / "broken/1/model.onnx").write_bytes(b"text")
            with pytest.raises(InferenceServerException, match=r"cannot load broken@1: .*model\.onnx"):
                client.load_model("broken")
            assert is_absent(server, "broken")

            os.kill(server.workers()[0].pid, 9)
            server.wait_for("is ready again")
            assert answers(lambda: best_class(server, "lzh")) == {1}, "a worker that is restarted has the models too"
            client.unload_model("lzh")
            assert is_absent(server, "lzh")
            with pytest.raises(InferenceServerException, match="unknown model 'absent': did you mean"):
                client.load_model("absent")
        assert server.stop() == 0


def test_a_worker_that_starts_during_a_load_has_the_model(repository: Path, tmp_path: Path) -> None:
    arguments = ("--model-repository", repository, "--model-control", "explicit", "--workers", "2")

    async def load_often(server: ServerProcess) -> None:
        async with tritonclient.http.aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            for _ in range(3):
                await client.unload_model("lzh")
                await client.load_model("lzh")
                os.kill(server.workers()[-1].pid, 9)
                await asyncio.sleep(0.05)

    with run_server(tmp_path / "server", write_onnx(tmp_path / "given.onnx"), *arguments) as server:
        for _ in range(5):
            try:
                asyncio.run(load_often(server))
                break
            except (OSError, InferenceServerException, tritonclient.http.aio.aiohttp.ClientError):
                continue  # the worker that was killed had the connection
        wait_until(lambda: len(server.workers()) == 2)
        server.wait_for("is ready again")
        with InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=60) as client:
            client.load_model("lzh")
        assert answers(lambda: best_class(server, "lzh")) == {2}


def test_with_polling_the_server_follows_the_directory(repository: Path, tmp_path: Path) -> None:
    arguments = ("--model-repository", repository, "--model-control", "poll", "--workers", "2")
    with run_server(tmp_path / "server", *arguments) as server:
        assert server.err.startswith("serving cats, lzh@1, lzh@2 on ")
        assert answers(lambda: best_class(server, "lzh")) == {2}
        shutil.copytree(repository / "lzh" / "1", repository / "lzh" / "3")
        shutil.rmtree(repository / "lzh" / "2")
        (repository / "cats.onnx").unlink()
        (repository / "text.onnx").write_bytes(b"text")
        server.wait_for("unloaded lzh@2", count=2)
        assert answers(lambda: best_class(server, "lzh")) == {0}
        assert is_absent(server, "cats")
        assert "did not load text: " in server.err
        write_onnx(repository / "lzh/3/model.onnx", order=(1, 0, 2))
        server.wait_for("reloaded lzh@3", count=2)
        assert answers(lambda: best_class(server, "lzh")) == {1}
        response = server.request("POST", "/v2/repository/models/lzh/load")
        assert response.status == 400
        assert "the server was started with --model-control poll" in response.json["error"]


def test_without_control_all_models_are_loaded_at_the_start(repository: Path, tmp_path: Path) -> None:
    with run_server(tmp_path / "server", "--model-repository", repository, "--workers", "1") as server:
        assert best_class(server, "lzh") == 2
        response = server.request("POST", "/v2/repository/models/lzh/unload")
        assert (response.status, "--model-control none" in response.json["error"]) == (400, True)
        assert len(psutil.Process(server.process.pid).children()) == 1
