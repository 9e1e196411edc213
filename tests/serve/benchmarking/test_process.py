import os
import signal
import time
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from cifarx_serve.backends import registry
from cifarx_serve.benchmarking.process import BenchmarkProcess
from cifarx_serve.errors import DeviceError, FallbackWarning, ModelFileError, UsageError
from tests.support.child_processes import running_children
from tests.support.color_model import SPEC, write_onnx

IMAGES = np.zeros((7, SPEC.input.height, SPEC.input.width, 3), np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write seven black images to a file."""
    np.save(tmp_path / "images.npy", IMAGES)
    return tmp_path / "images.npy"


def _children() -> list[psutil.Process]:
    return running_children("benchmarking.worker")


def test_the_process_ends_when_it_is_closed(tmp_path: Path, images: Path) -> None:
    before = _children()
    with closing(BenchmarkProcess(write_onnx(tmp_path / "a.onnx"), "cpu", images)) as process:
        [child] = [child for child in _children() if child not in before]
        assert process.opened.provider == "CPUExecutionProvider"
        assert len(process.predict().classes) == len(IMAGES)
    assert not child.is_running()
    process.close()


def test_measures_windows_after_a_warm_up(tmp_path: Path, images: Path) -> None:
    with closing(BenchmarkProcess(write_onnx(tmp_path / "a.onnx"), "cpu", images)) as process:
        process.warm_up(3)
        assert (process.measure_window() > 0).all()


def test_a_cpu_reports_no_device_times(tmp_path: Path, images: Path) -> None:
    with closing(BenchmarkProcess(write_onnx(tmp_path / "a.onnx"), "cpu", images)) as process:
        assert process.device_times(3).tolist() == []


@pytest.mark.parametrize(
    ("name", "device", "error"),
    [("absent.onnx", "cpu", ModelFileError), ("a.onnx", "tpu", UsageError), ("a.onnx", "mps", DeviceError)],
)
def test_errors_of_opening_are_raised_and_end_the_process(
    tmp_path: Path, images: Path, name: str, device: str, error: type[Exception]
) -> None:
    write_onnx(tmp_path / "a.onnx")
    before = _children()
    with pytest.raises(error):
        BenchmarkProcess(tmp_path / name, device, images)
    assert _children() == before


def test_a_killed_process_is_a_model_file_error(tmp_path: Path, images: Path) -> None:
    with closing(BenchmarkProcess(write_onnx(tmp_path / "a.onnx"), "cpu", images)) as process:
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(
            ModelFileError,
            match=rf"a\.onnx ended with status -{signal.SIGKILL.value}: check whether there is enough memory",
        ):
            process.warm_up(1)


def test_the_process_ignores_ctrl_c(tmp_path: Path, images: Path) -> None:
    with closing(BenchmarkProcess(write_onnx(tmp_path / "a.onnx"), "cpu", images)) as process:
        os.kill(process._process.pid, signal.SIGINT)
        time.sleep(0.1)
        assert process.memory_use().peak_bytes > 0
        assert process.memory_use().gpu_bytes is None


_BACKEND = """
import warnings
from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.errors import FallbackWarning

class Backend(OnnxRuntimeBackend):
    name = "mine"
    suffixes = (".mine",)

    def __init__(self, path, device):
        print("a library prints")
        warnings.warn("running slowly", FallbackWarning)
        import missing_module
"""


def test_registered_backends_are_available_in_the_process(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has the same import path, a backend can print, and a missing package is reported by name."""
    (tmp_path / "my_backend.py").write_text(_BACKEND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register_backend("mine", "my_backend:Backend", (".mine",))
    model = write_onnx(tmp_path / "a.mine")
    with pytest.raises(ModuleNotFoundError) as raised:
        BenchmarkProcess(model, "cpu", images)
    assert raised.value.name == "missing_module"
    (tmp_path / "my_backend.py").write_text(_BACKEND.replace("import missing_module", "super().__init__(path, device)"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with closing(BenchmarkProcess(model, "cpu", images)) as process:
            assert process.opened.backend == "mine"
    assert [str(warning.message) for warning in caught if warning.category is FallbackWarning] == ["running slowly"]


_ONE_THREAD = """
from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.system.cpus import available_cpus

class Backend(OnnxRuntimeBackend):
    name = "mine"

    def __init__(self, path, device):
        super().__init__(path, device)
        self.opened_for = available_cpus()

    def single_threaded(self):
        other = super().single_threaded()
        other.provider = f"one thread, opened for {self.opened_for} CPU"
        return other
"""


def test_a_file_can_be_run_in_one_thread(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_thread_backend.py").write_text(_ONE_THREAD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register_backend("mine", "one_thread_backend:Backend", (".mine",))
    model = write_onnx(tmp_path / "a.mine")
    with closing(BenchmarkProcess(model, "cpu", images, single_threaded=True)) as process:
        assert process.opened.provider == "one thread, opened for 1 CPU"
        process.warm_up(3)
        assert (process.measure_window() > 0).all()
