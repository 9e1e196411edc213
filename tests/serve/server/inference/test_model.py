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
from cifarx_serve.files.checksum import seal
from cifarx_serve.server.inference.model import ServedModel, file_version
from tests.support.color_model import SPEC, write_onnx
from tests.support.planted_backend import BOMB, POISON, PlantedBackend, plant, write_planted


def opened(path: Path, max_batch: int = 4, backend: str | None = None) -> ServedModel:
    return ServedModel("colours", str(path), backend, "cpu", max_batch)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    plant(monkeypatch)
    return write_planted(tmp_path / "colours.planted")


def test_what_is_said_of_a_model(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "colours.onnx")
    model = opened(path)
    record = model.record()
    assert record.name == model.name == "colours"
    assert (
        record.version == model.version == hashlib.sha256(path.read_bytes()).hexdigest()[:12] == file_version(str(path))
    )
    assert (record.file, record.backend, record.provider) == ("colours.onnx", "onnxruntime", "CPUExecutionProvider")
    assert record.ready
    assert model.is_steady
    assert record.spec == model.spec == SPEC
    assert model.platform == "onnx_onnxruntime"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record.loaded_at)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(record.loaded_at)) < timedelta(minutes=1)
    model.close()


def test_pixels_and_the_networks_input_have_the_same_answer(tmp_path: Path) -> None:
    model = opened(write_onnx(tmp_path / "colours.onnx"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    logits = model.run(pixels)
    assert logits == pytest.approx(10 * pixels.mean((1, 2)) / 255, abs=1e-5)
    assert np.array_equal(model.run(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 255), logits)
    model.close()


def test_a_model_that_resizes_gets_pixels_as_they_are(planted: Path) -> None:
    model = opened(write_planted(planted, embedded=True))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 7, 5, 3), np.uint8)
    assert model.run(pixels) == pytest.approx(pixels.mean((1, 2)) / 25.5, abs=1e-5)
    assert not model.is_steady


def test_it_is_warmed_at_the_sizes_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = OnnxRuntimeBackend.run

    def counted(backend: OnnxRuntimeBackend, batch: NDArray[Any]) -> NDArray[np.float32]:
        sizes.append(len(batch))
        return run(backend, batch)

    monkeypatch.setattr(OnnxRuntimeBackend, "run", counted)
    opened(write_onnx(tmp_path / "colours.onnx"), max_batch=20).close()
    assert sizes == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize(
    "logits", [np.zeros((1, 2)), np.zeros((2, 3)), np.full((1, 3), np.nan)], ids=["few", "many", "nan"]
)
def test_one_that_does_not_answer_as_it_should_is_refused_and_closed(
    planted: Path, monkeypatch: pytest.MonkeyPatch, logits: NDArray[Any]
) -> None:
    monkeypatch.setattr(PlantedBackend, "run", lambda *_: logits.astype(np.float32))
    with pytest.raises(ModelFileError, match=r"colours\.planted answers 1 grey images with float32"):
        opened(planted)
    assert PlantedBackend.opened == 0


def test_one_that_fails_at_once_is_refused_and_closed(planted: Path) -> None:
    planted.with_suffix(".failing").touch()
    with pytest.raises(ModelFileError, match="does not run"):
        opened(planted)
    assert PlantedBackend.opened == 0


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "colours.onnx")
    seal(path)
    opened(path).close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="its seal is broken: copy or export it again"):
        opened(path)


def test_what_cannot_be_opened(tmp_path: Path, planted: Path) -> None:
    with pytest.raises(ModelFileError, match=r"absent\.onnx"):
        opened(tmp_path / "absent.onnx")
    with pytest.raises(ModelFileError, match="cannot read"):
        opened(tmp_path)
    with pytest.raises(UsageError, match="backend onnxruntime does not open"):
        opened(planted, backend="onnxruntime")
    with pytest.raises((DeviceError, UsageError)):
        ServedModel("colours", str(write_onnx(tmp_path / "colours.onnx")), None, "cuda:77", 1)


def test_a_model_repository_is_served_as_its_model(tmp_path: Path) -> None:
    place = tmp_path / "repository" / "colours" / "1"
    place.mkdir(parents=True)
    path = write_onnx(place / "model.onnx")
    model = opened(tmp_path / "repository")
    assert model.record().file == "model.onnx"
    assert model.version == file_version(str(path))
    model.close()


@pytest.mark.parametrize("colour", [POISON, BOMB], ids=["the backend's error", "a library's error"])
def test_images_on_which_it_does_not_run_do_not_make_it_failed(planted: Path, colour: tuple[int, int, int]) -> None:
    model = opened(planted)
    with pytest.raises(ModelFileError, match="does not run"):
        model.run(np.full((1, 4, 6, 3), colour, np.uint8))
    assert not model.failed
    assert model.record().ready


def test_one_whose_library_fails_has_failed(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of PyTorch on a GPU that is lost."""

    def lost(*_: object) -> None:
        raise RuntimeError("device lost\nC++ stack")

    model = opened(planted)
    monkeypatch.setattr(PlantedBackend, "run", lost)
    with pytest.raises(ModelFileError, match=r"colours\.planted does not run on float32 .* \(device lost\): export"):
        model.run(model.grey_image())
    assert model.failed
    with pytest.raises(ModelFileError, match="device lost"):
        opened(planted)
    assert PlantedBackend.opened == 1


def test_it_has_failed_while_it_answers_nothing(planted: Path) -> None:
    model = opened(planted)
    planted.with_suffix(".failing").touch()
    with pytest.raises(ModelFileError):
        model.run(model.grey_image())
    assert model.failed
    assert not model.record().ready
    planted.with_suffix(".failing").unlink()
    assert model.run(model.grey_image(2)).shape == (2, 3)
    assert not model.failed
    model.close()
    assert PlantedBackend.opened == 0
