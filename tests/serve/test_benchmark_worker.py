import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from colour_model import write_onnx
from numpy.typing import NDArray

from cifarx_serve.backends.registry import open_backend
from cifarx_serve.benchmark_worker import Open, Peak, Reply, Request, predicted_labels

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


def test_a_reply_a_request_and_no_more_on_standard_output(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    """The end of the requests ends the program; Ctrl-C, which reaches every process of a terminal, does not."""
    np.save(tmp_path / "images.npy", images)
    requests: list[Request] = [
        Open(str(tmp_path / "absent.onnx"), "cpu", str(tmp_path / "images.npy"), ()),
        Open(str(write_onnx(tmp_path / "a.onnx")), "cpu", str(tmp_path / "images.npy"), ()),
        Peak(),
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "cifarx_serve.benchmark_worker"],
        input=b"".join(msgspec.json.encode(request) + b"\n" for request in requests),
        capture_output=True,
        check=True,
    )
    absent, opened, peak = (msgspec.json.decode(line, type=Reply) for line in ran.stdout.splitlines())
    assert absent.error == "ModelFileError"
    assert "absent.onnx" in absent.arguments[0]
    assert msgspec.json.decode(opened.value)["backend"] == "onnxruntime"
    assert msgspec.json.decode(peak.value) > 2**20
