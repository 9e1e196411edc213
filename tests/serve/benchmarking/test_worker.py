import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_serve.backends.registry import open_backend
from cifarx_serve.benchmarking.worker import MeasureMemory, OpenModel, Reply, Request, measure_device_times, predict
from cifarx_serve.spec import InputSpec, ModelSpec
from tests.support.color_model import write_onnx
from tests.support.spec_model import make_spec, write_model

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 30, 10], [0, 90, 80]], np.uint8)
LABELS = [0, 1, 2, 0, 1]
CROPPED = InputSpec(height=4, width=4, resize="shorter_side", resize_to=6)
CROPPED_GRAYSCALE = InputSpec(height=4, width=4, channels=1, color="L", resize="shorter_side", resize_to=6)


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """Return five images of one color each."""
    return np.broadcast_to(COLORS[:, None, None, :], (5, 4, 6, 3)).copy()


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_predicts_the_classes_of_all_images(tmp_path: Path, images: NDArray[np.uint8], batch: int) -> None:
    with open_backend(write_onnx(tmp_path / "a.onnx"), device="cpu") as backend:
        predictions = predict(backend, images, batch)
    assert predictions.classes == LABELS
    assert predictions.labels == [[label] for label in LABELS]


def test_predicts_all_labels_that_apply(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    spec = make_spec(activation="sigmoid")
    with open_backend(write_model(tmp_path / "a.onnx", spec), device="cpu") as backend:
        predictions = predict(backend, images)
    assert predictions.classes == [0, 1, 2, 0, 2]
    assert predictions.labels == [[0, 1], [1, 2], [0, 2], [0, 1], [1, 2]]


@pytest.mark.parametrize("spec", [make_spec(CROPPED), make_spec(CROPPED_GRAYSCALE)], ids=["color", "grayscale"])
def test_embedded_preprocessing_gets_the_same_pixels(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that crops gets images that are larger than the input of the network."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, spec.input.channels), np.uint8)
    embedded = msgspec.structs.replace(spec, embedded_preprocessing=True)
    with open_backend(write_model(tmp_path / "a.onnx", embedded), device="cpu") as backend:
        shapes: list[tuple[int, ...]] = []
        run = backend.run

        def record(batch: NDArray[Any]) -> NDArray[np.float32]:
            shapes.append(batch.shape)
            return run(batch)

        monkeypatch.setattr(backend, "run", record)
        assert len(predict(backend, pixels).classes) == 5
    assert shapes == [(5, 6, 6, spec.input.channels)]


class TimedBackend:
    """A stand-in for a backend whose device reports the times 1, 2, 3 …, each after a delay."""

    def __init__(self, delay_s: float = 0, has_device: bool = True) -> None:
        self._delay_s = delay_s
        self._has_device = has_device
        self.runs = 0

    def device_time(self, _: NDArray[np.float32]) -> float | None:
        time.sleep(self._delay_s)
        self.runs += 1
        return float(self.runs) if self._has_device else None


def test_measures_fifty_runs_on_the_device_after_a_warm_up() -> None:
    backend: Any = TimedBackend()
    assert measure_device_times(backend, np.zeros(1)) == [float(number) for number in range(4, 54)]


def test_measures_at_least_one_of_long_runs_on_the_device() -> None:
    backend: Any = TimedBackend(delay_s=0.06)
    assert measure_device_times(backend, np.zeros(1)) == [4.0]


def test_a_backend_without_device_times_is_called_once() -> None:
    backend: Any = TimedBackend(has_device=False)
    assert measure_device_times(backend, np.zeros(1)) == []
    assert backend.runs == 1


def test_writes_one_reply_per_request_to_standard_output(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    """The program exits when its input is closed."""
    np.save(tmp_path / "images.npy", images)
    requests: list[Request] = [
        OpenModel(str(tmp_path / "absent.onnx"), "cpu", str(tmp_path / "images.npy"), ()),
        OpenModel(str(write_onnx(tmp_path / "a.onnx")), "cpu", str(tmp_path / "images.npy"), ()),
        MeasureMemory(),
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "cifarx_serve.benchmarking.worker"],
        input=b"".join(msgspec.json.encode(request) + b"\n" for request in requests),
        capture_output=True,
        check=True,
    )
    absent, opened, memory = (msgspec.json.decode(line, type=Reply) for line in ran.stdout.splitlines())
    assert absent.error == "ModelFileError"
    assert "absent.onnx" in absent.arguments[0]
    assert msgspec.json.decode(opened.value)["backend"] == "onnxruntime"
    assert msgspec.json.decode(memory.value)["peak_bytes"] > 2**20
