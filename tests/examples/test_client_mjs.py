"""`examples/client.mjs` in Node with a running server."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.color_model import write_onnx
from tests.support.command_line import CommandResult, run_program
from tests.support.examples import EXAMPLES
from tests.support.server_process import ServerProcess, run_server
from tests.support.spec_model import make_spec, write_model

NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="no node on the PATH")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("client")
    with run_server(directory / "log", write_onnx(directory / "colors.onnx"), "--workers", 1) as running:
        yield running


def run_client(*arguments: object) -> CommandResult:
    return run_program(NODE, EXAMPLES / "client.mjs", *arguments)


def test_prints_the_best_classes(server: ServerProcess, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (90, 130, 100)).save(tmp_path / "leaf.png")
    result = run_client("leaf.png", f"http://127.0.0.1:{server.port}", 2)
    assert result.status == 0, result.err
    assert [line.partition(" 0.")[0] for line in result.out.splitlines()] == ["green", "blue"]


def test_prints_the_labels_that_apply(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (90, 130, 100)).save(tmp_path / "leaf.png")
    for thresholds, lines in (((0.5, 0.5, 0.4), ["green", "blue"]), ((1, 1, 1), ["no label"])):
        spec = make_spec(activation="sigmoid", thresholds=thresholds)
        with run_server(tmp_path / "log", write_model(tmp_path / "means.onnx", spec), "--workers", 1) as running:
            result = run_client("leaf.png", f"http://127.0.0.1:{running.port}", 1)
        assert [line.partition(" 0.")[0] for line in result.out.splitlines()] == lines


def test_the_error_of_the_server_is_printed(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    result = run_client("broken.png", f"http://127.0.0.1:{server.port}")
    assert result.status == 1
    assert result.error.startswith("error: 400: ")


def test_no_server(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "leaf.png")
    result = run_client("leaf.png", "http://127.0.0.1:2")
    assert result.status == 1
    assert "ECONNREFUSED" in result.error


def test_usage() -> None:
    result = run_client()
    assert result.status == 2
    assert result.err == "usage: node client.mjs IMAGE [URL] [TOP_K]\n"
