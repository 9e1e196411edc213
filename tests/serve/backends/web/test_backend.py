import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifarx_serve.backends.base import TensorInfo
from cifarx_serve.backends.registry import find_model, open_backend
from cifarx_serve.backends.web.backend import WebBackend
from cifarx_serve.backends.web.directory import MODEL_FILE, SPEC_FILE, write_checksums
from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError, DeviceError, ModelFileError, UsageError
from cifarx_serve.files.checksum import write_checksum
from tests.support.color_model import SPEC, write_onnx
from tests.support.web import install_runtime, requires_web, write_web_directory

CPU = Device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_web_directory(tmp_path_factory.mktemp("web") / "colors.web")


@pytest.fixture
def directory(written: Path, tmp_path: Path) -> Path:
    """A directory of its own with the installed runtime."""
    copy = shutil.copytree(written, tmp_path / "colors.web")
    install_runtime(copy)
    return copy


def test_another_device_than_the_cpu_is_refused(written: Path) -> None:
    with pytest.raises(DeviceError, match="runs on the CPU, but cuda was requested: use --device cpu"):
        open_backend(written, device="cuda")


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.web").mkdir()
    with pytest.raises(ModelFileError, match="is a directory: give the path of a model file"):
        open_backend(tmp_path / "empty.web")


def test_the_newest_directory_is_found(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "colors.web")
    (tmp_path / "empty.web").mkdir()
    assert find_model(tmp_path, "web") == tmp_path / "colors.web"
    with pytest.raises(ModelFileError, match=r"no file for backend web \(\*\.web\.onnx, \*\.web\)"):
        find_model(tmp_path / "empty.web", "web")


def test_the_same_model_runs_with_onnx_runtime(written: Path) -> None:
    with open_backend(written, "onnxruntime", "cpu") as backend:
        assert backend.name == "onnxruntime"
        np.testing.assert_allclose(backend.run(np.full((1, 3, 4, 6), 0.5, np.float32)), [[5, 5, 5]])


@requires_web
def test_a_directory_runs(directory: Path) -> None:
    batch = np.zeros((2, 3, 4, 6), np.float32)
    batch[0, 1] = 0.5
    batch[1, 2, 0, 0] = 1
    with open_backend(directory) as backend:
        outputs = backend.run(batch)
        assert backend.name == "web"
        assert backend.provider.startswith("ONNX Runtime Web 1.")
        assert backend.single_threaded() is backend
        assert backend.tensor_infos() == (
            TensorInfo("input", "float32", ("batch", 3, "height", "width")),
            TensorInfo("logits", "float32", ("batch", 3)),
        )
        for wrong in (batch.astype(np.uint8), batch[:, :2], batch[0]):
            with pytest.raises(ModelFileError, match=r"cannot run on .* \(.*\): export it again") as raised:
                backend.run(wrong)
            assert "\n" not in str(raised.value)
        np.testing.assert_array_equal(backend.run(batch), outputs)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, np.array([[0, 5, 0], [0, 0, 10 / 24]]), rtol=1e-6)


@requires_web
def test_any_onnx_file_can_be_opened(tmp_path: Path) -> None:
    """Commands that compare runtimes construct the backend themselves."""
    path = write_onnx(tmp_path / "colors.onnx")
    with WebBackend(path, CPU) as backend:
        np.testing.assert_allclose(backend.run(np.ones((1, 3, 4, 6), np.float32)), [[10, 10, 10]])
    with pytest.raises(UsageError, match=r"backend web does not open .*: give a file that ends with \.web\.onnx"):
        open_backend(path, "web")


@requires_web
def test_a_directory_with_another_runtime_is_refused(written: Path, tmp_path: Path) -> None:
    """Its scripts would run in Node.js, and nobody knows who wrote them."""
    with pytest.raises(
        ModelFileError, match=r"runtime/ort\.js is not that of onnxruntime-web 1\.\d+\.\d+.*: export it"
    ):
        open_backend(written)
    other = msgspec.structs.replace(SPEC, exporter={"onnxruntime-web": "1.29.0"})
    older = write_web_directory(tmp_path / "older.web", other.to_json())
    with pytest.raises(ModelFileError, match=r"older\.web was made with onnxruntime-web 1\.29\.0, but .*@1\.29\.0, or"):
        open_backend(older)


@requires_web
def test_a_spec_that_is_not_that_of_the_model_is_refused(directory: Path) -> None:
    other = msgspec.structs.replace(SPEC, class_names=("green", "red", "blue"))
    (directory / SPEC_FILE).write_text(other.to_json())
    write_checksums(directory)
    with pytest.raises(ModelFileError, match=rf"{SPEC_FILE} is not the spec of {MODEL_FILE}: export it again"):
        open_backend(directory)


@requires_web
@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_any_byte_of_a_model_leads_to_a_model_or_to_one_line(position: float, value: int, directory: Path) -> None:
    """Also with checksums that match: whoever changes a model on purpose writes those too."""
    path = directory / MODEL_FILE
    before = path.read_bytes()
    content = bytearray(before[:-100])
    content[int(position * len(content))] = value
    path.write_bytes(content)
    write_checksum(path)
    write_checksums(directory)
    try:
        with open_backend(directory) as backend:
            backend.run(np.ones((1, 3, 4, 6), np.float32))
    except CifarxError as error:
        assert "\n" not in str(error)
    path.write_bytes(before)
    write_checksums(directory)
