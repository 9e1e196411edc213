import hashlib
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.errors import DeviceError, ModelFileError, UsageError
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.server.inference.model import ServedModel, file_version
from tests.support.color_model import SPEC, write_onnx, write_openvino
from tests.support.faulty_backend import BOMB, POISON, FaultyBackend, register_faulty_backend, write_faulty_model


def load(path: Path, max_batch: int = 4, backend: str | None = None) -> ServedModel:
    return ServedModel("colors", str(path), backend, "cpu", max_batch)


@pytest.fixture
def faulty_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register_faulty_backend(monkeypatch)
    return write_faulty_model(tmp_path / "colors.faulty")


def test_info(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "colors.onnx")
    model = load(path)
    info = model.info()
    assert info.name == model.name == "colors"
    assert (
        info.version == model.version == hashlib.sha256(path.read_bytes()).hexdigest()[:12] == file_version(str(path))
    )
    assert (info.file, info.backend, info.provider) == ("colors.onnx", "onnxruntime", "CPUExecutionProvider")
    assert info.ready
    assert model.has_predictable_latency
    assert info.spec == model.spec == SPEC
    assert model.platform == "onnx_onnxruntime"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", info.loaded_at)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(info.loaded_at)) < timedelta(minutes=1)
    model.close()


def test_a_model_of_openvino_has_a_predictable_latency_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = load(write_openvino(tmp_path / "colors.openvino.zip"))
    assert model.has_predictable_latency
    model.close()


def test_pixels_and_preprocessed_input_have_the_same_logits(tmp_path: Path) -> None:
    model = load(write_onnx(tmp_path / "colors.onnx"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    logits = model.run(pixels)
    assert logits == pytest.approx(10 * pixels.mean((1, 2)) / 255, abs=1e-5)
    assert np.array_equal(model.run(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 255), logits)
    model.close()


def test_a_model_with_embedded_preprocessing_gets_the_pixels_unchanged(faulty_model: Path) -> None:
    model = load(write_faulty_model(faulty_model, embedded=True))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 7, 5, 3), np.uint8)
    assert model.run(pixels) == pytest.approx(pixels.mean((1, 2)) / 25.5, abs=1e-5)
    assert not model.has_predictable_latency


def test_warm_up_runs_all_batch_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = OnnxRuntimeBackend.run

    def record_size(backend: OnnxRuntimeBackend, batch: NDArray[Any]) -> NDArray[np.float32]:
        sizes.append(len(batch))
        return run(backend, batch)

    monkeypatch.setattr(OnnxRuntimeBackend, "run", record_size)
    load(write_onnx(tmp_path / "colors.onnx"), max_batch=20).close()
    assert sizes == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize(
    ("logits", "problem"),
    [
        (np.zeros((1, 2)), "returns logits of shape (1, 2) for a batch of 1, not (1, 3)"),
        (np.zeros((2, 3)), "returns logits of shape (2, 3) for a batch of 1, not (1, 3)"),
        (np.full((1, 3), np.nan), "returns logits that are not finite for a batch of 1"),
    ],
    ids=["classes", "batch", "nan"],
)
def test_a_model_with_invalid_logits_is_refused_and_closed(
    faulty_model: Path, monkeypatch: pytest.MonkeyPatch, logits: NDArray[Any], problem: str
) -> None:
    monkeypatch.setattr(FaultyBackend, "run", lambda *_: logits.astype(np.float32))
    with pytest.raises(ModelFileError) as refused:
        load(faulty_model)
    assert str(refused.value) == f"{faulty_model.name} {problem}: export it again"
    assert FaultyBackend.open_count == 0


def test_a_model_that_cannot_run_is_refused_and_closed(faulty_model: Path) -> None:
    faulty_model.with_suffix(".failing").touch()
    with pytest.raises(ModelFileError, match="cannot run"):
        load(faulty_model)
    assert FaultyBackend.open_count == 0


def test_a_file_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "colors.onnx")
    write_checksum(path)
    load(path).close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"the checksum of .*colors\.onnx does not match: get the file again"):
        load(path)


def test_files_and_devices_that_cannot_be_opened(tmp_path: Path, faulty_model: Path) -> None:
    with pytest.raises(ModelFileError, match=r"absent\.onnx"):
        load(tmp_path / "absent.onnx")
    with pytest.raises(ModelFileError, match="cannot read"):
        load(tmp_path)
    with pytest.raises(UsageError, match="backend onnxruntime does not open"):
        load(faulty_model, backend="onnxruntime")
    with pytest.raises((DeviceError, UsageError)):
        ServedModel("colors", str(write_onnx(tmp_path / "colors.onnx")), None, "cuda:77", 1)


def test_a_triton_model_repository_is_opened_as_its_model(tmp_path: Path) -> None:
    version = tmp_path / "repository" / "colors" / "1"
    version.mkdir(parents=True)
    path = write_onnx(version / "model.onnx")
    model = load(tmp_path / "repository")
    assert model.info().file == "model.onnx"
    assert model.version == file_version(str(path))
    model.close()


@pytest.mark.parametrize("color", [POISON, BOMB], ids=["error of the backend", "error of the library"])
def test_a_model_that_cannot_run_on_some_images_has_not_failed(faulty_model: Path, color: tuple[int, int, int]) -> None:
    model = load(faulty_model)
    with pytest.raises(ModelFileError, match="cannot run"):
        model.run(np.full((1, 4, 6, 3), color, np.uint8))
    assert not model.failed
    assert model.info().ready


def test_a_model_has_failed_if_its_library_fails_on_every_batch(
    faulty_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like PyTorch after its GPU was lost."""

    def raise_device_lost(*_: object) -> None:
        raise RuntimeError("device lost\nC++ stack")

    model = load(faulty_model)
    monkeypatch.setattr(FaultyBackend, "run", raise_device_lost)
    with pytest.raises(ModelFileError, match=r"colors\.faulty cannot run on float32 .* \(device lost\): export"):
        model.run(model.gray_images())
    assert model.failed
    with pytest.raises(ModelFileError, match="device lost"):
        load(faulty_model)
    assert FaultyBackend.open_count == 1


def test_a_failed_model_recovers(faulty_model: Path) -> None:
    model = load(faulty_model)
    faulty_model.with_suffix(".failing").touch()
    with pytest.raises(ModelFileError):
        model.run(model.gray_images())
    assert model.failed
    assert not model.info().ready
    faulty_model.with_suffix(".failing").unlink()
    assert model.run(model.gray_images(2)).shape == (2, 3)
    assert not model.failed
    model.close()
    assert FaultyBackend.open_count == 0
