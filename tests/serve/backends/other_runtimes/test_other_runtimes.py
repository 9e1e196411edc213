"""Every runtime runs an ONNX file with known outputs, describes it, and reports errors on one line."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from cifarx_serve.backends.base import Backend, TensorInfo, require_interface
from cifarx_serve.backends.other_runtimes.registry import RUNTIMES, open_in_runtime, require_runtime
from cifarx_serve.backends.registry import backend_names
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, ModelFileError, UsageError
from cifarx_serve.files.checksum import write_checksum
from tests.support.color_model import SPEC, write_onnx

CPU = Device("cpu")
MODULES = {"opencv": "cv2", "openvino": "openvino", "tract": "tract"}


@pytest.fixture(params=MODULES)
def runtime(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(MODULES[name])
    return name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("written") / "colors.onnx")


@pytest.mark.parametrize("size", [1, 3, 64])
def test_logits(runtime: str, size: int, written: Path) -> None:
    batch = np.random.default_rng(0).random((size, 3, 4, 6), np.float32)
    with open_in_runtime(runtime, written, CPU) as backend:
        logits = backend.run(batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, 10 * batch.mean((2, 3)), rtol=1e-5)


def test_results_are_not_overwritten_by_the_next_run(runtime: str, written: Path) -> None:
    batch = np.full((2, 3, 4, 6), 0.5, np.float32)
    with open_in_runtime(runtime, written, CPU) as backend:
        first = backend.run(batch)
        kept = first.copy()
        backend.run(batch * 2)
        np.testing.assert_array_equal(first, kept)


def test_what_a_runtime_says_about_a_model(runtime: str, written: Path) -> None:
    with open_in_runtime(runtime, written, CPU) as backend:
        assert backend.spec == SPEC
        assert backend.name == runtime
        require_interface(backend, written.name)
        infos = backend.tensor_infos()
        assert backend.provider.lower().startswith(runtime)
    assert {info.dtype for info in infos} <= {"float32"}
    assert infos == () or infos[0][:2] == ("input", "float32")


def test_the_tensors_of_tract(written: Path) -> None:
    pytest.importorskip("tract")
    with open_in_runtime("tract", written, CPU) as backend:
        assert backend.tensor_infos() == (
            TensorInfo("input", "float32", ("batch", 3, "height", "width")),
            TensorInfo("logits", "float32", ("batch", 3)),
        )


def test_a_batch_of_another_shape_is_an_error_on_one_line(runtime: str, written: Path) -> None:
    problem = r"cannot run on float32 \(1, 5, 4, 6\) \(.+\): "
    with open_in_runtime(runtime, written, CPU) as backend, pytest.raises(ModelFileError, match=problem) as raised:
        backend.run(np.zeros((1, 5, 4, 6), np.float32))
    assert "\n" not in str(raised.value)


def test_an_operator_that_a_runtime_does_not_have_is_an_error_on_one_line(runtime: str, tmp_path: Path) -> None:
    model = onnx.load(write_onnx(tmp_path / "a.onnx"))
    model.graph.node[0].op_type, model.graph.node[0].domain = "Spin", "org.example"
    model.opset_import.append(onnx.helper.make_opsetid("org.example", 1))
    onnx.save(model, tmp_path / "a.onnx")
    # OpenCV finds it when it runs the model.
    with pytest.raises(ModelFileError) as raised, open_in_runtime(runtime, tmp_path / "a.onnx", CPU) as backend:
        backend.run(np.zeros((1, 3, 4, 6), np.float32))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\x08\x08hello", b"not an ONNX file at all"])
def test_what_is_not_an_onnx_file(runtime: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises((ModelFileError, UsageError)) as raised:
        open_in_runtime(runtime, path, CPU)
    assert "\n" not in str(raised.value)


def test_a_file_that_does_not_match_its_checksum(runtime: str, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "a.onnx")
    write_checksum(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="checksum"):
        open_in_runtime(runtime, path, CPU)


def test_a_file_without_a_spec(runtime: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="contains no model spec"):
        open_in_runtime(runtime, write_onnx(tmp_path / "a.onnx", None), CPU)


def test_another_device_than_the_cpu_is_refused(runtime: str, written: Path) -> None:
    with pytest.raises(DeviceError, match=r"runs on the CPU.*, but cuda"):
        open_in_runtime(runtime, written, Device("cuda", 0))


def test_the_missing_library_is_named(runtime: str, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[runtime], None)
    with pytest.raises(UsageError, match=rf'is not installed: pip install "cifarx\[{runtime}\]"'):
        open_in_runtime(runtime, written, CPU)


def test_openvino_computes_in_float32(tmp_path: Path) -> None:
    """Its own default is bfloat16 on CPUs with instructions for it."""
    pytest.importorskip("openvino")
    path = write_onnx(tmp_path / "a.onnx", msgspec.structs.replace(SPEC, precision="bf16").to_json())
    exact = np.full((1, 3, 4, 6), 1 + 2**-12, np.float32)
    with open_in_runtime("openvino", path, CPU) as backend:
        np.testing.assert_allclose(backend.run(exact), 10 * exact[:, :, 0, 0], rtol=1e-6)


def test_an_unknown_runtime(written: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown runtime 'opencl': did you mean 'opencv'\? choose from opencv, "):
        require_runtime("opencl", written)


def test_a_file_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"runtime tract does not open .*a\.pth, which is not an ONNX file"):
        require_runtime("tract", path)


def test_no_runtime_but_that_of_the_web_opens_files_by_itself() -> None:
    classes: list[Callable[..., Backend]] = []
    for target in RUNTIMES.values():
        module, _, name = target.partition(":")
        classes.append(getattr(import_module(module), name))
    opening: list[Any] = [backend for backend in classes if getattr(backend, "suffixes", ())]
    assert [backend.name for backend in opening] == ["web"]
    assert {"opencv", "tract"}.isdisjoint(backend_names())
