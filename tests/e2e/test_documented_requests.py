"""The requests in docs/serving.md, sent by curl and by Python as they are written to a running server."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifarx_serve.spec import InputSpec
from tests.support.color_model import write_onnx
from tests.support.server_process import run_server
from tests.support.spec_model import make_spec, write_model

GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"
ADDRESS = "http://127.0.0.1:8000"
GRPC_ADDRESS = "127.0.0.1:8001"
SOCKET = "/run/cifarx/cifarx.sock"
CLASSIFYING = re.compile(r"/v1/predict|:predict|/invocations")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, ("bash", "base64", "curl"))), reason="requires bash and curl"),
]


def all_commands() -> list[str]:
    """Return the commands of the guide, without the prompt."""
    blocks = re.findall(r"```console\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    return [
        command.replace("\\\n", " ")
        for block in blocks
        for command in re.findall(r"^\$ ((?:.*\\\n)*.*)", block, re.MULTILINE)
    ]


def documented_commands() -> list[str]:
    """Return the commands of the guide that send an image."""
    return [command for command in all_commands() if "curl" in command and CLASSIFYING.search(command)]


def documented_protocol_requests() -> list[str]:
    """Return the commands of the guide that send a request of the Open Inference Protocol or its extensions."""
    return [command for command in all_commands() if "curl" in command and f"{ADDRESS}/v2/" in command]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)


def test_the_guide_has_requests_of_every_kind() -> None:
    commands = "\n".join(documented_commands())
    for part in ("-F image=@", "--data-binary @dog.png", "application/json", ":predict", "/invocations"):
        assert part in commands


def test_every_documented_request_is_answered(tmp_path: Path) -> None:
    model = write_onnx(tmp_path / "colors.onnx")
    for name in ("dog.png", "horse.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    uds = tmp_path / "cifarx.sock"
    with (
        run_server(tmp_path / "server", f"lzh_9={model}", "--workers", 1) as server,
        run_server(tmp_path / "uds", f"lzh_9={model}", "--workers", 1, "--uds", uds),
    ):
        for command in documented_commands():
            assert ADDRESS in command or SOCKET in command
            local = command.replace(ADDRESS, f"http://127.0.0.1:{server.port}").replace(SOCKET, str(uds))
            ran = subprocess.run(["bash", "-c", local], cwd=tmp_path, capture_output=True, text=True, check=True)
            predictions = json.loads(ran.stdout)["predictions"]
            assert predictions, command
            assert all(entry["label"] == "red" for entry in predictions), command


def test_every_documented_request_of_the_protocol_is_answered(tmp_path: Path) -> None:
    """The commands are run in the order of the guide: a model is loaded, listed and unloaded."""
    model = write_model(tmp_path / "lzh_9.onnx", make_spec(InputSpec(height=32, width=32)))
    (tmp_path / "models" / "lzh" / "1").mkdir(parents=True)
    write_onnx(tmp_path / "models" / "lzh" / "1" / "model.onnx")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "dog.png")
    repository = ("--model-repository", tmp_path / "models", "--model-control", "explicit")
    commands = documented_protocol_requests()
    for part in ("/v2/models/lzh_9/infer", "/repository/index", "/load", "/unload"):
        assert any(part in command for command in commands)
    with run_server(tmp_path / "server", model, *repository, "--workers", 1) as server:
        for command in commands:
            local = command.replace(ADDRESS, f"http://127.0.0.1:{server.port}").replace("curl -s", "curl -s --fail")
            ran = subprocess.run(["bash", "-c", local], cwd=tmp_path, capture_output=True, text=True, check=True)
            answer = json.loads(ran.stdout)
            if "/infer" in command:
                assert int(np.argmax(answer["outputs"][0]["data"])) == 0, command
            elif "/index" in command:
                assert {"name": "lzh", "version": "1", "state": "READY", "reason": ""} in answer
            else:
                assert answer == {}, command


@pytest.mark.parametrize("number", range(len(python_blocks())))
def test_every_documented_program_runs(tmp_path: Path, number: int) -> None:
    program = python_blocks()[number]
    model = write_model(tmp_path / "lzh_9.onnx", make_spec(InputSpec(height=32, width=32)))
    for name in ("dog.png", "horse.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    options = ("--grpc-port", 0) if GRPC_ADDRESS in program else ()
    with run_server(tmp_path / "server", model, "--workers", 1, *options) as server:
        port = re.search(r"gRPC on 127\.0\.0\.1:(\d+)", server.err)
        local = program.replace(ADDRESS.removeprefix("http://"), f"127.0.0.1:{server.port}")
        if port:
            local = local.replace(GRPC_ADDRESS, f"127.0.0.1:{port[1]}")
        check = "\nassert int(np.argmax(np.reshape(logits, (-1, 3))[0])) == 0\n"
        code = local + (check if "logits =" in local else "")
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
