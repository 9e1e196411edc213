"""`examples/client.py` with a running server."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from cifarx_serve.spec import InputSpec, ModelSpec
from tests.support.color_model import write_onnx
from tests.support.examples import run_example
from tests.support.server_process import ServerProcess, run_server
from tests.support.spec_model import BGR, GRAYSCALE, make_spec, write_model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("client")
    with run_server(directory / "log", write_onnx(directory / "colors.onnx"), "--workers", 1) as running:
        yield running


def url(server: ServerProcess) -> str:
    return f"http://127.0.0.1:{server.port}"


def test_the_three_ways_return_the_same_classes(server: ServerProcess, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (90, 130, 100)).save(tmp_path / "leaf.png")
    Image.new("RGB", (10, 30), (20, 20, 200)).save(tmp_path / "sea.jpg")
    result = run_example("client.py", "leaf.png", "sea.jpg", "--url", url(server), "--top-k", 2)
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "as a form:",
        "as one file:",
        "as a batch of tensors:",
    ]
    form, one_file, tensors = lines[1:3], lines[4:5], lines[6:]
    assert form[0].startswith("  leaf.png: green 0.")
    assert ", blue 0." in form[0]
    assert form[1].startswith("  sea.jpg: blue 0.")
    assert one_file == form[:1]
    assert tensors == ["  leaf.png: green", "  sea.jpg: blue"]


@pytest.mark.parametrize(
    ("spec", "labels"),
    [
        (make_spec(GRAYSCALE), ["red", "red"]),
        (make_spec(msgspec.structs.replace(BGR, layout="NHWC"), output="probabilities"), ["green", "green"]),
        (make_spec(activation="sigmoid", thresholds=(0.5, 0.5, 0.95)), ["green", "no label"]),
        (make_spec(class_names=("no", "yes"), activation="sigmoid", outputs=1), ["no", "no"]),
    ],
    ids=["grayscale", "BGR, NHWC, probabilities", "labels", "one output"],
)
def test_models_of_every_kind(tmp_path: Path, spec: ModelSpec, labels: list[str]) -> None:
    """All three ways name the same labels. The colors are such that no score is close to a threshold."""
    images = {"leaf.png": (90, 130, 100), "sea.png": (20, 60, 80)}
    for name, color in images.items():
        Image.new("RGB", (6, 4), color).save(tmp_path / name)
    with run_server(tmp_path / "log", write_model(tmp_path / "means.onnx", spec), "--workers", 1) as running:
        result = run_example("client.py", *images, "--url", url(running))
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[6:] == [f"  {name}: {label}" for name, label in zip(images, labels, strict=True)]
    for name, label, form in zip(images, labels, lines[1:3], strict=True):
        assert form.startswith(f"  {name}: {label}")


def test_a_model_that_crops_is_not_sent_tensors(tmp_path: Path) -> None:
    spec = make_spec(InputSpec(height=4, width=4, resize="shorter_side", resize_to=6))
    Image.new("RGB", (6, 4)).save(tmp_path / "leaf.png")
    with run_server(tmp_path / "log", write_model(tmp_path / "means.onnx", spec), "--workers", 1) as running:
        result = run_example("client.py", "leaf.png", "--url", url(running))
    assert result.status == 1
    assert "the model crops or pads its images, which this example does not do" in result.error
    assert "  leaf.png: red 0." in result.out


def test_the_error_of_the_server_is_printed(server: ServerProcess, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "leaf.png")
    result = run_example("client.py", "leaf.png", "--url", url(server), "--top-k", 4)
    assert result.status == 1
    assert result.error == "error: 400: top_k is '4': send a number from 1 to 3"


def test_an_image_that_cannot_be_read_has_an_error_of_its_own(server: ServerProcess, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (0, 255, 0)).save(tmp_path / "leaf.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    result = run_example("client.py", "leaf.png", "broken.png", "--url", url(server))
    assert "  leaf.png: green 0." in result.out
    assert "  broken.png: error: " in result.out


def test_no_server(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "leaf.png")
    result = run_example("client.py", "leaf.png", "--url", "http://127.0.0.1:1")
    assert result.status == 1
    assert "Connection refused" in result.error
