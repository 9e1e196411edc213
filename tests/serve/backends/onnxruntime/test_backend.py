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
from cifarx_serve.backends.onnxruntime import tensorrt_libraries
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY, OnnxRuntimeBackend, provider_problem
from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError, DeviceError, ModelFileError, SpecError
from cifarx_serve.images.preprocess import scale
from cifarx_serve.spec import ModelSpec
from tests.support.color_model import SPEC, write_onnx
from tests.support.trained_model import Trained

CPU, CUDA, MPS, AUTO, TENSORRT = (Device(kind) for kind in ("cpu", "cuda", "mps", "auto", "tensorrt"))

needs_no_driver = pytest.mark.skipif(has_driver(), reason="there is an NVIDIA driver here")


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colours.onnx")


@pytest.fixture(autouse=True)
def _prints_nothing(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever happens, the library says nothing on its own: not on standard output, not beside the one error line."""
    yield
    assert capfd.readouterr() == ("", "")


def test_answers(colours: Path) -> None:
    batch = np.zeros((2, 3, 4, 6), np.float32)
    batch[0, 1] = 0.5
    batch[1, 2, 0, 0] = 1
    with OnnxRuntimeBackend(colours, CPU) as backend:
        logits = backend.run(batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.array([[0, 5, 0], [0, 0, 10 / 24]]), rtol=1e-6)


def test_a_row_does_not_depend_on_its_batch(trained: Trained) -> None:
    with OnnxRuntimeBackend(trained.onnx, CPU) as backend:
        images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
        inputs = scale(images, backend.spec.input)
        alone = np.concatenate([backend.run(inputs[[row]]) for row in range(64)])
        assert alone.shape == (64, len(backend.spec.class_names))
        for size in (3, 64):
            np.testing.assert_allclose(backend.run(inputs[:size]), alone[:size], rtol=0, atol=1e-5)


def test_says_what_the_file_says(trained: Trained) -> None:
    expected = {entry.key: entry.value for entry in onnx.load(trained.onnx).metadata_props}[SPEC_KEY]
    spec = OnnxRuntimeBackend.read_spec(trained.onnx)
    assert spec.to_json() == expected
    with OnnxRuntimeBackend(trained.onnx, CPU) as backend:
        assert backend.spec == spec


def test_the_provider_is_the_sessions_own(colours: Path) -> None:
    with OnnxRuntimeBackend(colours, CPU) as backend:
        assert backend.provider == "CPUExecutionProvider"
    assert "CPUExecutionProvider" in onnxruntime.get_available_providers()


@needs_no_driver
def test_auto_is_the_cpu_where_there_is_no_driver(colours: Path) -> None:
    with OnnxRuntimeBackend(colours, AUTO) as backend:
        assert backend.provider == "CPUExecutionProvider"


@needs_no_driver
@pytest.mark.parametrize("device", [CUDA, Device("cuda", 3), TENSORRT], ids=str)
def test_a_gpu_without_a_driver_is_an_error_that_says_so(colours: Path, device: Device) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is a CPU build")
    for error in (provider_problem(device), opening_error(colours, device)):
        assert isinstance(error, DeviceError)
        assert "no NVIDIA driver" in error.problem
        assert error.remedy == "use --device cpu"
        assert "\n" not in str(error)


def test_a_device_that_the_library_does_not_have(colours: Path) -> None:
    error = opening_error(colours, MPS)
    assert isinstance(error, DeviceError)
    assert "mps" in error.problem
    assert isinstance(provider_problem(MPS), DeviceError)


def test_no_problem_with_the_cpu() -> None:
    assert provider_problem(CPU) is None


@pytest.mark.skipif(not has_driver(), reason="there is no NVIDIA driver here")
def test_cuda_is_given_or_refused_and_never_the_cpu(colours: Path) -> None:
    try:
        backend = OnnxRuntimeBackend(colours, CUDA)
    except DeviceError as error:
        assert "\n" not in str(error)
    else:
        with backend:
            assert backend.provider == "CUDAExecutionProvider"


class _Given:
    """A session that says it has the providers it was asked for, or others, and answers as on the CPU."""

    def __init__(self, path: Path, asked: dict[str, dict[str, str]], given: list[str] | None) -> None:
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.asked = asked
        self._given = given
        self.batches: list[int] = []

    def get_providers(self) -> list[str]:
        return [*(self._given or self.asked), "CPUExecutionProvider"]

    def run(self, names: list[str], inputs: dict[str, Any], options: Any = None) -> Any:
        self.batches.append(len(inputs["input"]))
        return self._session.run(names, inputs, options)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[_Given]]:
    """`tensorrt(given=[...])`: as if its libraries were there; the list fills with the sessions that are made."""

    def make(given: list[str] | None = None, reason: str | None = None) -> list[_Given]:
        made: list[_Given] = []

        def session(path: Path, providers: list[tuple[str, dict[str, str]]], config: dict[str, str]) -> _Given:
            assert config == {"session.disable_cpu_ep_fallback": "1"}
            if reason:
                raise ModelFileError(reason, "export it again")
            made.append(_Given(path, dict(providers), given))
            return made[-1]

        monkeypatch.setattr(backend_module, "_session", session)
        monkeypatch.setattr(cuda_libraries, "has_driver", lambda: True)
        monkeypatch.setattr(tensorrt_libraries, "preload", lambda: None)
        monkeypatch.setattr(tensorrt_libraries, "version", lambda: 101601)
        monkeypatch.setattr(tensorrt_libraries, "missing", lambda: None)
        return made

    return make


def test_tensorrt_comes_first_and_cuda_second(colours: Path, tensorrt: Callable[..., list[_Given]]) -> None:
    made = tensorrt()
    with OnnxRuntimeBackend(colours, Device("tensorrt", 2)) as backend:
        assert backend.provider == "TensorrtExecutionProvider"
        assert backend.device_time(np.zeros((1, 3, 4, 6), np.float32)) is None
    [session] = made
    assert list(session.asked) == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    first, second = session.asked.values()
    assert (first["device_id"], second["device_id"]) == ("2", "2")
    assert (first["trt_fp16_enable"], first["trt_cuda_graph_enable"], second["use_tf32"]) == ("0", "0", "0")
    shapes = [first[f"trt_profile_{name}_shapes"] for name in ("min", "opt", "max")]
    assert shapes == ["input:1x3x4x6", "input:8x3x4x6", "input:64x3x4x6"]
    assert "enable_cuda_graph" not in second


def test_tensorrt_keeps_the_engine_of_a_file(
    colours: Path, tensorrt: Callable[..., list[_Given]], tmp_path: Path
) -> None:
    made = tensorrt()
    OnnxRuntimeBackend(colours, TENSORRT).close()
    options = made[0].asked["TensorrtExecutionProvider"]
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_engine_cache_prefix"] == hashlib.sha256(colours.read_bytes()).hexdigest()
    assert Path(options["trt_engine_cache_path"]).is_relative_to(tmp_path.with_name(f"{tmp_path.name}-cache"))


def test_tensorrt_takes_fp16_for_fp16_files(tmp_path: Path, tensorrt: Callable[..., list[_Given]]) -> None:
    made = tensorrt()
    spec = msgspec.structs.replace(SPEC, precision="fp16")
    OnnxRuntimeBackend(write_onnx(tmp_path / "half.onnx", spec.to_json()), TENSORRT).close()
    assert made[0].asked["TensorrtExecutionProvider"]["trt_fp16_enable"] == "1"


@pytest.mark.parametrize("changed", [{"precision": "int8"}, {"embedded_preprocessing": True}])
def test_what_tensorrt_takes_in_parts_has_no_shapes_and_no_kept_engine(
    tmp_path: Path, tensorrt: Callable[..., list[_Given]], changed: dict[str, Any]
) -> None:
    made = tensorrt()
    spec = msgspec.structs.replace(SPEC, **changed)
    OnnxRuntimeBackend(write_onnx(tmp_path / "parts.onnx", spec.to_json()), TENSORRT).close()
    options = made[0].asked["TensorrtExecutionProvider"]
    assert not [name for name in options if "profile" in name or "cache" in name]


def test_a_batch_above_the_engines_largest_is_run_in_parts(
    colours: Path, tensorrt: Callable[..., list[_Given]]
) -> None:
    made = tensorrt()
    batch = np.random.default_rng(0).random((130, 3, 4, 6), np.float32)
    with OnnxRuntimeBackend(colours, TENSORRT) as backend:
        assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
    assert made[0].batches == [64, 64, 2]


@pytest.mark.parametrize(
    ("given", "reason", "problem"),
    [
        (["CUDAExecutionProvider"], None, "tensorrt:0 was asked for and ONNX Runtime gave CUDAExecutionProvider"),
        (None, "no kernel", "ONNX Runtime cannot use tensorrt:0 (no kernel)"),
    ],
)
def test_tensorrt_is_given_or_refused(
    colours: Path, tensorrt: Callable[..., list[_Given]], given: list[str] | None, reason: str | None, problem: str
) -> None:
    tensorrt(given, reason)
    error = opening_error(colours, TENSORRT)
    assert isinstance(error, DeviceError)
    assert error.problem == problem


def test_tensorrt_without_its_libraries_names_them(
    colours: Path, tensorrt: Callable[..., list[_Given]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt(["CUDAExecutionProvider"])
    monkeypatch.setattr(tensorrt_libraries, "version", lambda: None)
    monkeypatch.setattr(tensorrt_libraries, "missing", lambda: DeviceError("no libnvinfer.so.10", "pip install it"))
    assert opening_error(colours, TENSORRT).problem == "no libnvinfer.so.10"


def test_no_time_on_a_device_on_the_cpu(colours: Path) -> None:
    with OnnxRuntimeBackend(colours, CPU) as backend:
        assert backend.device_time(np.zeros((1, 3, 4, 6), np.float32)) is None


@pytest.mark.skipif(provider_problem(TENSORRT) is not None, reason="ONNX Runtime cannot use TensorRT here")
def test_on_tensorrt(colours: Path) -> None:
    batch = np.random.default_rng(0).random((65, 3, 4, 6), np.float32)
    for _ in ("built", "kept"):
        with OnnxRuntimeBackend(colours, TENSORRT) as backend:
            assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)


def test_the_probe_is_what_the_onnx_library_makes() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    onnx.checker.check_model(model)
    assert model.SerializeToString() == backend_module._PROBE


def opening_error(path: Path, device: Device = CPU) -> CifarxError:
    with pytest.raises(CifarxError) as raised:
        OnnxRuntimeBackend(path, device)
    return raised.value


def reading_error(path: Path) -> CifarxError:
    with pytest.raises(CifarxError) as raised:
        OnnxRuntimeBackend.read_spec(path)
    return raised.value


def refused(path: Path) -> str:
    """The problem with a file, the same on opening it and on reading its spec."""
    opening, reading = opening_error(path), reading_error(path)
    assert isinstance(opening, ModelFileError)
    assert str(opening) == str(reading)
    assert path.name in opening.problem
    assert "\n" not in str(opening)
    return opening.problem


@pytest.mark.parametrize("content", [b"", b"this is no model", b"\0" * 1000, b"PK\x03\x04" + b"x" * 100])
def test_what_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert "is not an ONNX model" in refused(path)


def test_half_a_file(tmp_path: Path, trained: Trained) -> None:
    path = tmp_path / "half.onnx"
    whole = trained.onnx.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not an ONNX model" in refused(path)


def test_operators_newer_than_the_runtime(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "new.onnx", opset=999)
    error = opening_error(path)
    assert isinstance(error, ModelFileError)
    assert "opset" in error.problem.lower()
    assert OnnxRuntimeBackend.read_spec(path) == SPEC


@pytest.mark.parametrize("needed", ["999.0", "999.1.2", f"{onnxruntime.__version__.partition('.')[0]}.999"])
def test_a_file_that_needs_a_newer_runtime_says_so_before_a_session_is_made(
    tmp_path: Path, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = needing(tmp_path, needed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    error = opening_error(path)
    assert isinstance(error, ModelFileError)
    assert error.problem == f"{path} needs ONNX Runtime >= {needed}, and {onnxruntime.__version__} is installed"
    assert f'pip install "onnxruntime>={needed}"' in error.remedy
    assert OnnxRuntimeBackend.read_spec(path).minimum_onnxruntime == needed


@pytest.mark.parametrize("needed", ["0.1", "1.18", "1.2.3", onnxruntime.__version__])
def test_a_file_that_needs_no_newer_runtime(tmp_path: Path, needed: str) -> None:
    OnnxRuntimeBackend(needing(tmp_path, needed), CPU).close()


@pytest.mark.parametrize("needed", ["", "new", "1", "1.18.0.0", "1.-5", "9" * 100 + ".0", "1.18\n"])
def test_a_runtime_that_is_no_version(tmp_path: Path, needed: str) -> None:
    error = opening_error(needing(tmp_path, needed))
    assert isinstance(error, ModelFileError)
    assert "which is no version" in error.problem
    assert "\n" not in str(error)


def needing(folder: Path, version: str) -> Path:
    spec = msgspec.structs.replace(SPEC, minimum_onnxruntime=version)
    return write_onnx(folder / "needing.onnx", spec.to_json())


def test_a_batch_that_the_model_cannot_take(colours: Path) -> None:
    with OnnxRuntimeBackend(colours, CPU) as backend, pytest.raises(ModelFileError) as raised:
        backend.run(np.zeros((1, 4, 4, 6), np.float32))
    assert raised.value.problem.startswith(f"{colours} does not run on float32 (1, 4, 4, 6) (")
    assert "\n" not in str(raised.value)


def test_a_model_of_somebody_elses(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "theirs.onnx", document=None)
    assert refused(path) == f"{path} carries no model spec"


def test_a_spec_that_is_no_text(tmp_path: Path, colours: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(colours.read_bytes().replace(b'"green"', b'"gr\xff\xffn"'))
    for error in (opening_error(path), reading_error(path)):
        assert isinstance(error, SpecError)
        assert "malformed model spec" in error.problem


@pytest.mark.parametrize("document", ["", "{}", SPEC.to_json()[:-5], SPEC.to_json().replace(":1,", ":2,", 1)])
def test_a_spec_that_cannot_be_read(tmp_path: Path, document: str) -> None:
    path = write_onnx(tmp_path / "x.onnx", document)
    for error in (opening_error(path), reading_error(path)):
        assert isinstance(error, SpecError)
        assert error.problem.startswith(str(path))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(damage=[(9, 128)], cut=None)  # refused without a word of why
@given(
    damage=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), max_size=4), cut=st.none() | st.integers(0)
)
def test_a_damaged_file_is_an_error_of_ours_or_still_a_model(
    colours: Path, damage: list[tuple[int, int]], cut: int | None
) -> None:
    whole = bytearray(write_onnx(colours).read_bytes())
    for place, byte in damage:
        whole[place % len(whole)] = byte
    colours.write_bytes(whole[:cut])
    try:
        assert isinstance(OnnxRuntimeBackend.read_spec(colours), ModelSpec)
    except (ModelFileError, SpecError) as error:
        assert "\n" not in str(error)


def test_what_the_library_would_warn_of_is_not_printed(colours: Path) -> None:
    """A model that promises sixty-one classes and has three: a line of log at the opening, and one at every run."""
    model = onnx.load(colours)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 61
    onnx.save(model, colours)
    with OnnxRuntimeBackend(colours, CPU) as backend:
        assert backend.run(np.ones((1, 3, 4, 6), np.float32)).shape == (1, 3)


def test_closing_twice(colours: Path) -> None:
    backend = OnnxRuntimeBackend(colours, CPU)
    backend.close()
    backend.close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_starts_no_threads_for_cpus_it_may_not_use(colours: Path, fresh_python: Callable[..., str]) -> None:
    """A container's share of a machine: the library counts the CPUs of all of it, and cannot pin threads to them."""
    code = (
        "import os, sys; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
        "import numpy as np, onnxruntime; from cifarx_serve.backends.registry import open_backend\n"
        "before = os.listdir('/proc/self/task')\n"
        "with open_backend(sys.argv[1], device='cpu') as backend:\n"
        "    print(backend.run(np.ones((1, 3, 4, 6), np.float32)).tolist())\n"
        "    print(len(os.listdir('/proc/self/task')) - len(before))"
    )
    assert fresh_python(code, colours).split("\n") == ["[[10.0, 10.0, 10.0]]", "0"]
