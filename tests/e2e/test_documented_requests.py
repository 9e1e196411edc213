"""The requests in docs/serving.md, sent by curl as they are written to a running server."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.support.color_model import write_onnx
from tests.support.server_process import run_server

GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"
ADDRESS = "http://127.0.0.1:8000"
SOCKET = "/run/cifarx/cifarx.sock"
CLASSIFYING = re.compile(r"/v1/predict|:predict|/invocations")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, ("bash", "base64", "curl"))), reason="requires bash and curl"),
]


def documented_commands() -> list[str]:
    """Return the commands of the guide that send an image, without the prompt."""
    blocks = re.findall(r"```console\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    commands = [
        command.replace("\\\n", " ")
        for block in blocks
        for command in re.findall(r"^\$ ((?:.*\\\n)*.*)", block, re.MULTILINE)
    ]
    return [command for command in commands if "curl" in command and CLASSIFYING.search(command)]


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
