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
from cifarx_serve.benchmarking.worker import Open, Peak, Reply, Request, device_times, predicted_labels
from tests.support.color_model import write_onnx

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 30, 10], [0, 90, 80]], np.uint8)
LABELS = [0, 1, 2, 0, 1]


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """Five images of one colour each."""
    return np.broadcast_to(COLOURS[:, None, None, :], (5, 4, 6, 3)).copy()


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_predicted_labels(tmp_path: Path, images: NDArray[np.uint8], batch: int) -> None:
    with open_backend(write_onnx(tmp_path / "a.onnx"), device="cpu") as backend:
        assert predicted_labels(backend, images, batch).tolist() == LABELS


class Timed:
    """Stands for a backend whose device tells times: 1, 2, 3 …, each after so many seconds."""

    def __init__(self, seconds: float = 0, tells: bool = True) -> None:
        self._seconds = seconds
        self._tells = tells
        self.runs = 0

    def device_time(self, _: NDArray[np.float32]) -> float | None:
        time.sleep(self._seconds)
        self.runs += 1
        return float(self.runs) if self._tells else None


def test_device_times_are_of_fifty_runs_the_first_ones_left_out() -> None:
    backend: Any = Timed()
    assert device_times(backend, np.zeros(1)) == [float(number) for number in range(4, 54)]


def test_device_times_of_long_runs_are_fewer_and_at_least_one() -> None:
    backend: Any = Timed(seconds=0.06)
    assert device_times(backend, np.zeros(1)) == [4.0]


def test_a_backend_without_a_device_is_asked_once() -> None:
    backend: Any = Timed(tells=False)
    assert device_times(backend, np.zeros(1)) == []
    assert backend.runs == 1


def test_a_reply_a_request_and_no_more_on_standard_output(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    """The end of the requests ends the program; Ctrl-C, which reaches every process of a terminal, does not."""
    np.save(tmp_path / "images.npy", images)
    requests: list[Request] = [
        Open(str(tmp_path / "absent.onnx"), "cpu", str(tmp_path / "images.npy"), ()),
        Open(str(write_onnx(tmp_path / "a.onnx")), "cpu", str(tmp_path / "images.npy"), ()),
        Peak(),
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "cifarx_serve.benchmarking.worker"],
        input=b"".join(msgspec.json.encode(request) + b"\n" for request in requests),
        capture_output=True,
        check=True,
    )
    absent, opened, peak = (msgspec.json.decode(line, type=Reply) for line in ran.stdout.splitlines())
    assert absent.error == "ModelFileError"
    assert "absent.onnx" in absent.arguments[0]
    assert msgspec.json.decode(opened.value)["backend"] == "onnxruntime"
    assert msgspec.json.decode(peak.value) > 2**20
