import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.backends.cuda_libraries import has_driver
from cifarx_serve.backends.onnxruntime import backend as backend_module
from cifarx_serve.backends.onnxruntime import gpu_session, tensorrt_libraries
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY, OnnxRuntimeBackend, provider_error
from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError, DeviceError, ModelFileError, SpecError
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import ModelSpec
from tests.support.color_model import SPEC, write_onnx
from tests.support.spec_model import GRAYSCALE, make_spec, write_model
from tests.support.trained_model import Trained

CPU, CUDA, MPS, AUTO, TENSORRT = (Device(kind) for kind in ("cpu", "cuda", "mps", "auto", "tensorrt"))

needs_no_driver = pytest.mark.skipif(has_driver(), reason="an NVIDIA driver is installed")


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


@pytest.fixture(autouse=True)
def _no_output(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Check that the library writes neither to standard output nor to standard error in any test."""
    yield
    assert capfd.readouterr() == ("", "")


def test_logits(colors: Path) -> None:
    batch = np.zeros((2, 3, 4, 6), np.float32)
    batch[0, 1] = 0.5
    batch[1, 2, 0, 0] = 1
    with OnnxRuntimeBackend(colors, CPU) as backend:
        logits = backend.run(batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.array([[0, 5, 0], [0, 0, 10 / 24]]), rtol=1e-6)


def test_a_row_does_not_depend_on_its_batch(trained: Trained) -> None:
    with OnnxRuntimeBackend(trained.onnx, CPU) as backend:
        images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
        inputs = normalize(images, backend.spec.input)
        alone = np.concatenate([backend.run(inputs[[row]]) for row in range(64)])
        assert alone.shape == (64, len(backend.spec.class_names))
        for size in (3, 64):
            np.testing.assert_allclose(backend.run(inputs[:size]), alone[:size], rtol=0, atol=1e-5)


def test_the_spec_is_the_one_in_the_file(trained: Trained) -> None:
    expected = {entry.key: entry.value for entry in onnx.load(trained.onnx).metadata_props}[SPEC_KEY]
    spec = OnnxRuntimeBackend.read_spec(trained.onnx)
    assert spec.to_json() == expected
    with OnnxRuntimeBackend(trained.onnx, CPU) as backend:
        assert backend.spec == spec


def test_the_provider_is_the_one_that_the_session_reports(colors: Path) -> None:
    with OnnxRuntimeBackend(colors, CPU) as backend:
        assert backend.provider == "CPUExecutionProvider"
    assert "CPUExecutionProvider" in onnxruntime.get_available_providers()


@needs_no_driver
def test_auto_selects_the_cpu_without_a_driver(colors: Path) -> None:
    with OnnxRuntimeBackend(colors, AUTO) as backend:
        assert backend.provider == "CPUExecutionProvider"


@needs_no_driver
@pytest.mark.parametrize("device", [CUDA, Device("cuda", 3), TENSORRT], ids=str)
def test_a_gpu_without_a_driver_is_an_error(colors: Path, device: Device) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("the installed ONNX Runtime is a CPU build")
    for error in (provider_error(device), opening_error(colors, device)):
        assert isinstance(error, DeviceError)
        assert "no NVIDIA driver" in error.problem
        assert error.remedy == "use --device cpu"
        assert "\n" not in str(error)


def test_a_device_that_the_library_does_not_support(colors: Path) -> None:
    error = opening_error(colors, MPS)
    assert isinstance(error, DeviceError)
    assert "mps" in error.problem
    assert isinstance(provider_error(MPS), DeviceError)


def test_the_cpu_is_available() -> None:
    assert provider_error(CPU) is None


@pytest.mark.skipif(not has_driver(), reason="no NVIDIA driver")
def test_cuda_never_falls_back_to_the_cpu(colors: Path) -> None:
    try:
        backend = OnnxRuntimeBackend(colors, CUDA)
    except DeviceError as error:
        assert "\n" not in str(error)
    else:
        with backend:
            assert backend.provider == "CUDAExecutionProvider"


class _FakeSession:
    """A CPU session that reports the requested providers, or others."""

    def __init__(self, path: Path, requested: dict[str, dict[str, str]], reported: list[str] | None) -> None:
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.requested = requested
        self._reported = reported
        self.batches: list[int] = []

    def get_providers(self) -> list[str]:
        return [*(self._reported or self.requested), "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return []

    def run(self, names: list[str], inputs: dict[str, Any], options: Any = None) -> Any:
        self.batches.append(len(inputs["input"]))
        return self._session.run(names, inputs, options)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[_FakeSession]]:
    """Simulate the TensorRT libraries: `tensorrt(reported=[...])` returns the list of the sessions that are created.

    With `reason`, creating a session fails.
    """

    def simulate(reported: list[str] | None = None, reason: str | None = None) -> list[_FakeSession]:
        sessions: list[_FakeSession] = []

        def session(path: Path, providers: list[tuple[str, dict[str, str]]], config: dict[str, str]) -> _FakeSession:
            assert config["session.record_ep_graph_assignment_info"] == "1"
            if reason:
                raise ModelFileError(reason, "export it again")
            sessions.append(_FakeSession(path, dict(providers), reported))
            return sessions[-1]

        monkeypatch.setattr(gpu_session, "create_session", session)
        monkeypatch.setattr(cuda_libraries, "has_driver", lambda: True)
        monkeypatch.setattr(tensorrt_libraries, "preload", lambda: None)
        monkeypatch.setattr(tensorrt_libraries, "version", lambda: 101601)
        monkeypatch.setattr(tensorrt_libraries, "availability_error", lambda: None)
        return sessions

    return simulate


def test_tensorrt_comes_first_and_cuda_second(colors: Path, tensorrt: Callable[..., list[_FakeSession]]) -> None:
    sessions = tensorrt()
    with OnnxRuntimeBackend(colors, Device("tensorrt", 2)) as backend:
        assert backend.provider == "TensorrtExecutionProvider"
        assert backend.device_time(np.zeros((1, 3, 4, 6), np.float32)) is None
    [session] = sessions
    assert list(session.requested) == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    first, second = session.requested.values()
    assert (first["device_id"], second["device_id"]) == ("2", "2")
    assert (first["trt_fp16_enable"], first["trt_cuda_graph_enable"], second["use_tf32"]) == ("0", "0", "0")
    shapes = [first[f"trt_profile_{name}_shapes"] for name in ("min", "opt", "max")]
    assert shapes == ["input:1x3x4x6", "input:8x3x4x6", "input:64x3x4x6"]
    assert "enable_cuda_graph" not in second


def test_tensorrt_gets_the_shapes_of_the_spec(tmp_path: Path, tensorrt: Callable[..., list[_FakeSession]]) -> None:
    grayscale = make_spec(msgspec.structs.replace(GRAYSCALE, layout="NHWC"))
    sessions = tensorrt()
    OnnxRuntimeBackend(write_model(tmp_path / "means.onnx", grayscale), TENSORRT).close()
    options = sessions[0].requested["TensorrtExecutionProvider"]
    assert options["trt_profile_opt_shapes"] == "input:8x4x6x1"


def test_tensorrt_caches_the_engine_of_a_file(
    colors: Path, tensorrt: Callable[..., list[_FakeSession]], tmp_path: Path
) -> None:
    sessions = tensorrt()
    OnnxRuntimeBackend(colors, TENSORRT).close()
    options = sessions[0].requested["TensorrtExecutionProvider"]
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_engine_cache_prefix"] == hashlib.sha256(colors.read_bytes()).hexdigest()
    assert Path(options["trt_engine_cache_path"]).is_relative_to(tmp_path.with_name(f"{tmp_path.name}-cache"))


def test_tensorrt_uses_fp16_for_fp16_files(tmp_path: Path, tensorrt: Callable[..., list[_FakeSession]]) -> None:
    sessions = tensorrt()
    spec = msgspec.structs.replace(SPEC, precision="fp16")
    OnnxRuntimeBackend(write_onnx(tmp_path / "half.onnx", spec.to_json()), TENSORRT).close()
    assert sessions[0].requested["TensorrtExecutionProvider"]["trt_fp16_enable"] == "1"


@pytest.mark.parametrize("changed", [{"precision": "int8"}, {"embedded_preprocessing": True}])
def test_models_that_tensorrt_runs_in_parts_have_no_shapes_and_no_cached_engine(
    tmp_path: Path, tensorrt: Callable[..., list[_FakeSession]], changed: dict[str, Any]
) -> None:
    sessions = tensorrt()
    spec = msgspec.structs.replace(SPEC, **changed)
    OnnxRuntimeBackend(write_onnx(tmp_path / "parts.onnx", spec.to_json()), TENSORRT).close()
    options = sessions[0].requested["TensorrtExecutionProvider"]
    assert not [name for name in options if "profile" in name or "cache" in name]


def test_a_batch_above_the_maximum_of_the_engine_is_split(
    colors: Path, tensorrt: Callable[..., list[_FakeSession]]
) -> None:
    sessions = tensorrt()
    batch = np.random.default_rng(0).random((130, 3, 4, 6), np.float32)
    with OnnxRuntimeBackend(colors, TENSORRT) as backend:
        assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
    assert sessions[0].batches == [64, 64, 2]


@pytest.mark.parametrize(
    ("reported", "reason", "problem"),
    [
        (["CUDAExecutionProvider"], None, "tensorrt:0 was requested, but ONNX Runtime uses CUDAExecutionProvider"),
        (None, "no kernel", "ONNX Runtime cannot use tensorrt:0 (no kernel)"),
    ],
)
def test_tensorrt_never_falls_back_to_cuda(
    colors: Path,
    tensorrt: Callable[..., list[_FakeSession]],
    reported: list[str] | None,
    reason: str | None,
    problem: str,
) -> None:
    tensorrt(reported, reason)
    error = opening_error(colors, TENSORRT)
    assert isinstance(error, DeviceError)
    assert error.problem == problem


def test_a_missing_tensorrt_library_is_reported(
    colors: Path, tensorrt: Callable[..., list[_FakeSession]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt(["CUDAExecutionProvider"])
    monkeypatch.setattr(tensorrt_libraries, "version", lambda: None)
    monkeypatch.setattr(
        tensorrt_libraries, "availability_error", lambda: DeviceError("no libnvinfer.so.10", "pip install it")
    )
    assert opening_error(colors, TENSORRT).problem == "no libnvinfer.so.10"


def test_the_cpu_has_no_device_time(colors: Path) -> None:
    with OnnxRuntimeBackend(colors, CPU) as backend:
        assert backend.device_time(np.zeros((1, 3, 4, 6), np.float32)) is None


@pytest.mark.gpu
@pytest.mark.skipif(provider_error(TENSORRT) is not None, reason="ONNX Runtime cannot use TensorRT here")
def test_on_tensorrt(colors: Path) -> None:
    batch = np.random.default_rng(0).random((65, 3, 4, 6), np.float32)
    for _ in ("built", "cached"):
        with OnnxRuntimeBackend(colors, TENSORRT) as backend:
            assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)


def test_the_test_model_is_the_one_that_the_onnx_library_serializes() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    onnx.checker.check_model(model)
    assert model.SerializeToString() == backend_module._TEST_MODEL


def opening_error(path: Path, device: Device = CPU) -> CifarxError:
    with pytest.raises(CifarxError) as raised:
        OnnxRuntimeBackend(path, device)
    return raised.value


def reading_error(path: Path) -> CifarxError:
    with pytest.raises(CifarxError) as raised:
        OnnxRuntimeBackend.read_spec(path)
    return raised.value


def refused(path: Path) -> str:
    """Return the problem with a file, which must be the same for opening it and for reading its spec."""
    opening, reading = opening_error(path), reading_error(path)
    assert isinstance(opening, ModelFileError)
    assert str(opening) == str(reading)
    assert path.name in opening.problem
    assert "\n" not in str(opening)
    return opening.problem


@pytest.mark.parametrize("content", [b"", b"this is not a model", b"\0" * 1000, b"PK\x03\x04" + b"x" * 100])
def test_files_that_are_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert "is not a valid ONNX model" in refused(path)


def test_a_truncated_file(tmp_path: Path, trained: Trained) -> None:
    path = tmp_path / "half.onnx"
    whole = trained.onnx.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a valid ONNX model" in refused(path)


def test_operators_newer_than_the_runtime(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "new.onnx", opset=999)
    error = opening_error(path)
    assert isinstance(error, ModelFileError)
    assert "opset" in error.problem.lower()
    assert OnnxRuntimeBackend.read_spec(path) == SPEC


@pytest.mark.parametrize("required", ["999.0", "999.1.2", f"{onnxruntime.__version__.partition('.')[0]}.999"])
def test_a_file_that_requires_a_newer_runtime_is_refused_before_a_session_is_created(
    tmp_path: Path, required: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = requiring(tmp_path, required)
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    error = opening_error(path)
    assert isinstance(error, ModelFileError)
    assert error.problem == f"{path} requires ONNX Runtime >= {required}, but {onnxruntime.__version__} is installed"
    assert f'pip install "onnxruntime>={required}"' in error.remedy
    assert OnnxRuntimeBackend.read_spec(path).minimum_onnxruntime == required


@pytest.mark.parametrize("required", ["0.1", "1.18", "1.2.3", onnxruntime.__version__])
def test_a_file_that_requires_no_newer_runtime(tmp_path: Path, required: str) -> None:
    OnnxRuntimeBackend(requiring(tmp_path, required), CPU).close()


@pytest.mark.parametrize("required", ["", "new", "1", "1.18.0.0", "1.-5", "9" * 100 + ".0", "1.18\n"])
def test_a_required_runtime_that_is_not_a_version(tmp_path: Path, required: str) -> None:
    error = opening_error(requiring(tmp_path, required))
    assert isinstance(error, ModelFileError)
    assert "which is not a version" in error.problem
    assert "\n" not in str(error)


def requiring(folder: Path, version: str) -> Path:
    spec = msgspec.structs.replace(SPEC, minimum_onnxruntime=version)
    return write_onnx(folder / "requiring.onnx", spec.to_json())


def test_a_batch_of_the_wrong_shape(colors: Path) -> None:
    with OnnxRuntimeBackend(colors, CPU) as backend, pytest.raises(ModelFileError) as raised:
        backend.run(np.zeros((1, 4, 4, 6), np.float32))
    assert raised.value.problem.startswith(f"{colors} cannot run on float32 (1, 4, 4, 6) (")
    assert "\n" not in str(raised.value)


def test_a_model_of_another_program(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "theirs.onnx", document=None)
    assert refused(path) == f"{path} contains no model spec"


def test_a_spec_that_is_not_utf_8(tmp_path: Path, colors: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(colors.read_bytes().replace(b'"green"', b'"gr\xff\xffn"'))
    for error in (opening_error(path), reading_error(path)):
        assert isinstance(error, SpecError)
        assert "malformed model spec" in error.problem


@pytest.mark.parametrize("document", ["", "{}", SPEC.to_json()[:-5], SPEC.to_json().replace(":2,", ":3,", 1)])
def test_a_spec_that_cannot_be_read(tmp_path: Path, document: str) -> None:
    path = write_onnx(tmp_path / "x.onnx", document)
    for error in (opening_error(path), reading_error(path)):
        assert isinstance(error, SpecError)
        assert error.problem.startswith(str(path))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(damage=[(9, 128)], cut=None)  # the library gives no reason
@given(
    damage=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), max_size=4), cut=st.none() | st.integers(0)
)
def test_a_damaged_file_is_read_or_raises_our_own_exceptions(
    colors: Path, damage: list[tuple[int, int]], cut: int | None
) -> None:
    whole = bytearray(write_onnx(colors).read_bytes())
    for place, byte in damage:
        whole[place % len(whole)] = byte
    colors.write_bytes(whole[:cut])
    try:
        assert isinstance(OnnxRuntimeBackend.read_spec(colors), ModelSpec)
    except (ModelFileError, SpecError) as error:
        assert "\n" not in str(error)


def test_warnings_of_the_library_are_not_printed(colors: Path) -> None:
    """The model declares 61 classes and has three, which the library would log when it is opened and in every run."""
    model = onnx.load(colors)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 61
    onnx.save(model, colors)
    with OnnxRuntimeBackend(colors, CPU) as backend:
        assert backend.run(np.ones((1, 3, 4, 6), np.float32)).shape == (1, 3)


def test_closing_twice(colors: Path) -> None:
    backend = OnnxRuntimeBackend(colors, CPU)
    backend.close()
    backend.close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks on this system")
def test_no_threads_are_started_for_cpus_outside_the_affinity_mask(
    colors: Path, fresh_python: Callable[..., str]
) -> None:
    """By default, the library starts a thread for every CPU of the machine and cannot pin all of them."""
    code = (
        "import os, sys; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
        "import numpy as np, onnxruntime; from cifarx_serve.backends.registry import open_backend\n"
        "before = os.listdir('/proc/self/task')\n"
        "with open_backend(sys.argv[1], device='cpu') as backend:\n"
        "    print(backend.run(np.ones((1, 3, 4, 6), np.float32)).tolist())\n"
        "    print(len(os.listdir('/proc/self/task')) - len(before))"
    )
    assert fresh_python(code, colors).split("\n") == ["[[10.0, 10.0, 10.0]]", "0"]
