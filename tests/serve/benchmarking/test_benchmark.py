from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_serve.backends import registry
from cifarx_serve.benchmarking.benchmark import BenchmarkReport, benchmark
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.predictor import load
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.environment import current_environment
from tests.support.color_model import SPEC, write_onnx, write_torchscript
from tests.support.simulated_gpu.process import SimulatedGpuProcess
from tests.support.spec_model import GRAYSCALE, make_spec, write_model

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 30, 10], [0, 90, 80]], np.uint8)


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """Return five images of one color each."""
    return np.broadcast_to(COLORS[:, None, None, :], (5, 4, 6, 3)).copy()


@pytest.mark.slow
def test_rows_are_sorted_by_batch_size_and_then_by_file(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    files = [write_onnx(tmp_path / "a.onnx"), write_torchscript(tmp_path / "b.torchscript.pt")]
    messages: list[str] = []
    report = benchmark(files, images, "colors", batch_sizes=(1, 4), device="cpu", seconds=0.1, progress=messages.append)
    assert [(row.batch, row.file, row.backend) for row in report.rows] == [
        (1, "a.onnx", "onnxruntime"),
        (1, "b.torchscript.pt", "torchscript"),
        (4, "a.onnx", "onnxruntime"),
        (4, "b.torchscript.pt", "torchscript"),
    ]
    assert {row.provider for row in report.rows} == {"CPUExecutionProvider", "cpu"}
    for row, file in zip(report.rows, files * 2, strict=True):
        assert 0 < row.p50_us <= row.p90_us <= row.p99_us
        assert len(row.percentiles_us) == 101
        assert row.percentiles_us[0] <= row.batch / row.images_per_s * 1e6 <= row.percentiles_us[100]
        assert row.samples >= 3
        assert row.stable == (row.spread <= 0.1)
        assert row.agreement == 1
        assert row.accuracy is None
        assert row.load_ms > 0
        assert row.first_call_ms > 0
        assert row.peak_bytes > 2**24
        assert row.size_bytes == file.stat().st_size
        assert row.precision == "fp32"
        assert row.device_us is None
    assert (report.data, report.images) == ("colors", 5)
    now = current_environment()
    assert msgspec.structs.replace(report.environment, clock_mhz=now.clock_mhz) == now
    assert all(any(file.name in line for line in messages) for file in files)
    assert msgspec.json.decode(msgspec.json.encode(report), type=BenchmarkReport) == report


_DEVICE_BACKEND = """
from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend

class Backend(OnnxRuntimeBackend):
    name = "device"
    suffixes = (".device",)

    def device_time(self, batch):
        return 100.0 * len(batch)
"""


def test_reports_device_times(tmp_path: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "device_backend.py").write_text(_DEVICE_BACKEND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register_backend("device", "device_backend:Backend", (".device",))
    files = [write_onnx(tmp_path / "a.onnx"), write_onnx(tmp_path / "b.device")]
    report = benchmark(files, images, "colors", batch_sizes=(1, 4), device="cpu", seconds=0.1)
    assert [(row.batch, row.device_us) for row in report.rows] == [(1, None), (1, 100), (4, None), (4, 400)]


def test_agreement_is_measured_against_the_first_file(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    """A model that confuses red and green agrees only on the blue one of five images."""
    right = write_onnx(tmp_path / "right.onnx")
    wrong = write_onnx(tmp_path / "wrong.onnx", order=(1, 0, 2))
    report = benchmark([right, wrong, right], images, "colors", batch_sizes=(2,), device="cpu", seconds=0.1)
    assert [row.agreement for row in report.rows] == [1, 0.2, 1]


def test_the_agreement_of_a_model_with_several_labels_is_that_of_all_labels(
    tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    """Both files have the same best classes, but the second one applies fewer labels."""
    files = [
        write_model(tmp_path / "all.onnx", make_spec(activation="sigmoid")),
        write_model(tmp_path / "few.onnx", make_spec(activation="sigmoid", thresholds=(0.5, 0.5, 0.6))),
    ]
    report = benchmark(
        files, images, "colors", batch_sizes=(2,), device="cpu", seconds=0.1, labels=np.array([0, 1, 2, 0, 1])
    )
    assert report.multi_label
    assert [row.agreement for row in report.rows] == [1, 0.8]
    assert [row.accuracy for row in report.rows] == [0.8, 0.8]


def test_grayscale_images_are_measured(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    files = [write_model(tmp_path / "a.onnx", make_spec(GRAYSCALE))]
    report = benchmark(files, images[..., :1], "grays", batch_sizes=(2,), device="cpu", seconds=0.1)
    assert [row.agreement for row in report.rows] == [1]
    assert not report.multi_label
    with pytest.raises(UsageError, match=r"a\.onnx takes grayscale images of 4x6, but the first file images of 4x6"):
        benchmark(files, images, "colors", batch_sizes=(2,), device="cpu")


def test_accuracy_is_measured_against_the_labels(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    files = [write_onnx(tmp_path / "right.onnx"), write_onnx(tmp_path / "wrong.onnx", order=(1, 0, 2))]
    labels = np.array([0, 1, 2, 2, 2])
    report = benchmark(files, images, "colors", batch_sizes=(2,), device="cpu", seconds=0.1, labels=labels)
    assert [row.accuracy for row in report.rows] == [0.6, 0.2]


def test_two_files_of_the_same_name_are_listed_by_path(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    (tmp_path / "b").mkdir()
    files = [write_onnx(tmp_path / "a.onnx"), write_onnx(tmp_path / "b" / "a.onnx")]
    report = benchmark(files, images, "colors", batch_sizes=(1,), device="cpu", seconds=0.1)
    assert [row.file for row in report.rows] == [str(file) for file in files]


@pytest.mark.parametrize("batch", [0, -1, 1025])
def test_an_invalid_batch_size_is_a_usage_error(tmp_path: Path, images: NDArray[np.uint8], batch: int) -> None:
    with pytest.raises(UsageError, match=f"batch size {batch} is out of range: give 1 to 1024, for 5 images"):
        benchmark([write_onnx(tmp_path / "a.onnx")], images, "colors", batch_sizes=(1, batch), device="cpu")


def test_a_batch_may_be_larger_than_the_images_and_accuracy_is_that_of_the_test_images(
    tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    with load(write_onnx(tmp_path / "a.onnx"), device="cpu") as predictor:
        labels = np.array([predictor.predict(image).index for image in images])
    labels[3:] = (labels[3:] + 1) % 3
    files = [tmp_path / "a.onnx"]
    report = benchmark(
        files, images, "colors", (64,), "cpu", 0.1, labels=labels, test_images=3, warnings=("only 5 images",)
    )
    assert [row.accuracy for row in report.rows] == [1.0]
    assert (report.images, report.test_images, report.warnings) == (5, 3, ("only 5 images",))


def test_no_files_are_a_usage_error(images: NDArray[np.uint8]) -> None:
    with pytest.raises(UsageError, match="no file"):
        benchmark([], images, "colors")


def test_models_of_different_input_sizes_are_a_usage_error(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    other = msgspec.structs.replace(SPEC, input=InputSpec(height=6, width=4))
    files = [write_onnx(tmp_path / "a.onnx"), write_onnx(tmp_path / "b.onnx", other.to_json())]
    with pytest.raises(UsageError) as raised:
        benchmark(files, images, "colors", device="cpu", batch_sizes=(1,))
    assert raised.value.problem == f"{files[1]} takes images of 6x4, but the first file images of 4x6"


def test_a_missing_file_is_a_model_file_error(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    with pytest.raises(ModelFileError, match=r"b\.onnx"):
        benchmark([write_onnx(tmp_path / "a.onnx"), Path("b.onnx")], images, "colors", batch_sizes=(1,))


def _benchmark_on_gpu(files: list[Path], images: NDArray[np.uint8]) -> list[tuple[str, int | None, float | None]]:
    report = benchmark(files, images, "colors", batch_sizes=(1, 4), device="cuda", seconds=0.1)
    assert report.environment.gpus[0] == "Simulated GPU"
    return [(row.provider, row.gpu_bytes, row.device_us) for row in report.rows]


def test_reports_the_memory_on_a_gpu(
    gpu_process: SimulatedGpuProcess, tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    rows = gpu_process.call(_benchmark_on_gpu, [write_onnx(tmp_path / "a.onnx")], images)
    assert [provider for provider, _, _ in rows] == ["CUDAExecutionProvider"] * 2
    for _, gpu_bytes, device_us in rows:
        assert gpu_bytes is not None
        assert gpu_bytes >= 1 << 20
        assert device_us is not None
