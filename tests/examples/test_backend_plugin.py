"""`examples/backend_plugin`, installed as a package and used by the command line."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.color_model import write_onnx
from tests.support.command_line import CommandResult, run_program
from tests.support.examples import EXAMPLES
from tests.support.server_process import PROGRAM


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the package is installed, without access to a package index."""
    target = tmp_path_factory.mktemp("plugin")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--disable-pip-version-check")
    result = run_program(
        sys.executable, "-m", "pip", "install", *options, "--target", target, EXAMPLES / "backend_plugin"
    )
    assert result.status == 0, result.err
    return target


@pytest.fixture
def model(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 48), (90, 130, 100)).save(tmp_path / "leaf.png")
    Image.new("RGB", (6, 4), (200, 0, 0)).save(tmp_path / "rose.png")
    return write_onnx(tmp_path / "colors.onnx")


def cifarx(installed: Path, *arguments: object) -> CommandResult:
    path = os.pathsep.join((str(installed), os.environ.get("PYTHONPATH", "")))
    return run_program(PROGRAM, *arguments, PYTHONPATH=path)


@pytest.mark.usefixtures("model")
def test_infer_runs_the_backend(installed: Path) -> None:
    """Its predictions are those of ONNX Runtime."""
    images = ("leaf.png", "rose.png", "--top-k", 3, "--json")
    result = cifarx(installed, "infer", *images, "--backend", "onnx_reference")
    assert result.status == 0, result.err
    assert "colors.onnx (colors) with onnx_reference on onnx " in result.err
    predictions = result.json
    assert [prediction["label"] for prediction in predictions] == ["green", "red"]
    for prediction, expected in zip(predictions, cifarx(installed, "infer", *images).json, strict=True):
        assert [row["label"] for row in prediction["top"]] == [row["label"] for row in expected["top"]]
        assert prediction["score"] == pytest.approx(expected["score"], abs=1e-5)


def test_other_backends_keep_their_files(installed: Path, model: Path) -> None:
    result = cifarx(installed, "infer", "rose.png", "--model", model)
    assert result.status == 0
    assert "with onnxruntime on " in result.err


def test_refuses_other_devices(installed: Path, model: Path) -> None:
    result = cifarx(installed, "infer", "rose.png", "--model", model, "--backend", "onnx_reference", "--device", "cuda")
    assert result.status == 2
    assert result.error == "error: backend onnx_reference does not support device cuda:0: use --device cpu"


def test_a_damaged_file(installed: Path, tmp_path: Path, model: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(model.read_bytes()[:-40])
    result = cifarx(installed, "infer", "rose.png", "--model", damaged, "--backend", "onnx_reference")
    assert result.status == 2
    assert result.error.startswith(f"error: {damaged} is not a valid ONNX model ")


def test_describes_its_tensors(installed: Path, model: Path) -> None:
    code = (
        "import sys; from cifarx_serve.backends.registry import open_backend\n"
        "for tensor in open_backend(sys.argv[1], 'onnx_reference').tensor_infos(): print(*tensor)"
    )
    result = run_program(sys.executable, "-c", code, model, PYTHONPATH=str(installed))
    assert result.out.splitlines() == [
        "input float32 ('batch', 3, 'height', 'width')",
        "logits float32 ('batch', 3)",
    ], result.err
