"""These tests run on a session on the CPU that reports another provider, on simulated GPUs, and on a GPU if any."""

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cifarx_serve.backends.onnxruntime import cuda_timer, gpu_session
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY, OnnxRuntimeBackend, provider_error
from cifarx_serve.backends.onnxruntime.io_binding import BoundSession
from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError, DeviceError, DeviceMemoryError, FallbackWarning
from cifarx_serve.predictor import load
from cifarx_serve.server.inference.model import ServedModel
from cifarx_serve.spec import ModelSpec
from tests.support.color_model import SPEC, write_onnx
from tests.support.simulated_gpu.counters import changes, counters
from tests.support.simulated_gpu.process import SimulatedGpuProcess

CUDA = Device("cuda", 0)


def _batch(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, 3, SPEC.input.height, SPEC.input.width), np.float32)


class _FakeCudaSession:
    """A session on the CPU that reports the CUDA provider. It remembers the threads of its calls."""

    def __init__(self, path: Path) -> None:
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.threads = {threading.get_ident()}

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {"CUDAExecutionProvider": {"enable_cuda_graph": "1"}}

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run(self, *arguments: Any) -> Any:
        self.threads.add(threading.get_ident())
        return self._session.run(*arguments)

    def run_with_iobinding(self, *arguments: Any) -> None:
        self.threads.add(threading.get_ident())
        self._session.run_with_iobinding(*arguments)


class _CpuBoundSession(BoundSession):
    """Uses the memory of the CPU on any device."""

    def __init__(self, session: Any, device: str, index: int, spec: ModelSpec) -> None:
        super().__init__(session, "cpu", 0, spec)
        assert (device, index) in (("cuda", 0), ("cpu", 0))  # the latter for a second session


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[_FakeCudaSession]:
    """Replace CUDA by the CPU. Return the list of the sessions that are created."""
    sessions: list[_FakeCudaSession] = []

    def open_session(path: Path, *_: object) -> _FakeCudaSession:
        sessions.append(_FakeCudaSession(path))
        return sessions[-1]

    monkeypatch.setattr(gpu_session, "open_session", open_session)
    monkeypatch.setattr(gpu_session, "BoundSession", _CpuBoundSession)
    return sessions


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


def test_one_thread_creates_the_session_and_makes_all_of_its_calls(
    colors: Path, fake_cuda: list[_FakeCudaSession]
) -> None:
    with OnnxRuntimeBackend(colors, CUDA) as backend, ThreadPoolExecutor(4) as pool:
        batches = [_batch(1 + seed % 70, seed) for seed in range(100)]
        for batch, logits in zip(batches, pool.map(backend.run, batches), strict=True):
            assert logits == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
    [session] = fake_cuda
    assert len(session.threads) == 1
    assert threading.get_ident() not in session.threads


@pytest.mark.usefixtures("fake_cuda")
def test_the_thread_ends_when_the_session_is_closed(colors: Path) -> None:
    before = set(threading.enumerate())
    backend = OnnxRuntimeBackend(colors, CUDA)
    [thread] = set(threading.enumerate()) - before
    backend.close()
    backend.close()
    assert not thread.is_alive()


def test_the_thread_ends_when_the_session_cannot_be_created(colors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_session(*_: object) -> None:
        raise DeviceError("no device", "no remedy")

    monkeypatch.setattr(gpu_session, "open_session", open_session)
    before = set(threading.enumerate())
    with pytest.raises(DeviceError, match="no device"):
        OnnxRuntimeBackend(colors, CUDA)
    assert set(threading.enumerate()) == before


def test_the_cpu_has_no_thread_for_its_calls(colors: Path) -> None:
    before = set(threading.enumerate())
    with OnnxRuntimeBackend(colors, Device("cpu")) as backend:
        backend.run(_batch(1))
        assert set(threading.enumerate()) == before


@pytest.mark.usefixtures("fake_cuda")
def test_io_binding_is_used_up_to_the_maximum_batch_size(colors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    original_run = _CpuBoundSession.run

    def run(bound: _CpuBoundSession, batch: NDArray[Any]) -> NDArray[np.float32]:
        used.append(len(batch))
        return original_run(bound, batch)

    monkeypatch.setattr(_CpuBoundSession, "run", run)
    with OnnxRuntimeBackend(colors, CUDA) as backend:
        used.clear()
        for count in (1, BoundSession.max_batch_size, BoundSession.max_batch_size + 1):
            batch = _batch(count)
            assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
    assert used == [1, BoundSession.max_batch_size]


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_session_without_working_cuda_graphs_warns_and_still_runs(
    colors: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def run(_: BoundSession, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        if fault == "raises":
            raise RuntimeError("this graph cannot be captured")
        return np.zeros((len(batch), 3), np.float32)

    monkeypatch.setattr(_CpuBoundSession, "run", run)
    words = "cannot be captured" if fault == "raises" else "replayed"
    with pytest.warns(FallbackWarning, match=f"without CUDA graphs: .*{words}"):
        backend = OnnxRuntimeBackend(colors, CUDA)
    batch = _batch(2)
    assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
    assert backend.device_time(batch) is None
    backend.close()


class _FakeTimer:
    """Runs the work that it times, and records whether it was closed."""

    stream = 4096

    def __init__(self) -> None:
        self.closed = False

    def time(self, work: Callable[[], object]) -> float:
        work()
        return 12.5

    def close(self) -> None:
        self.closed = True


@pytest.mark.usefixtures("fake_cuda")
def test_a_second_session_on_the_timers_stream_is_timed(colors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[dict[str, str]] = []
    timer = _FakeTimer()

    def second(path: Path, index: int, extra_options: dict[str, str]) -> Any:
        assert index == 0
        created.append(extra_options)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(gpu_session, "_open_cuda_session", second)
    monkeypatch.setattr(cuda_timer, "open_cuda_timer", lambda index: timer if index == 0 else None)
    backend = OnnxRuntimeBackend(colors, CUDA)
    assert [backend.device_time(_batch(count)) for count in (1, 65)] == [12.5, 12.5]
    assert created == [{"user_compute_stream": "4096"}]
    backend.close()
    backend.close()
    assert timer.closed


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("fault", ["no device", "no memory", "no run"])
def test_a_session_that_cannot_be_timed_warns_and_still_runs(
    colors: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    timer = _FakeTimer()

    def open_cuda_timer(_: int) -> _FakeTimer:
        if fault == "no device":
            raise DeviceError(fault, "no remedy")
        return timer

    def second(path: Path, *_: object) -> Any:
        if fault == "no memory":
            raise DeviceMemoryError(fault, "no remedy")
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def time(_: object) -> float:
        raise RuntimeError(fault)

    monkeypatch.setattr(cuda_timer, "open_cuda_timer", open_cuda_timer)
    monkeypatch.setattr(gpu_session, "_open_cuda_session", second)
    monkeypatch.setattr(timer, "time", time)
    with OnnxRuntimeBackend(colors, CUDA) as backend:
        with pytest.warns(FallbackWarning, match=f"cannot measure the device time of .*{fault}"):
            assert backend.device_time(_batch(1)) is None
        assert backend.run(_batch(2)).shape == (2, 3)
    assert timer.closed == (fault != "no device")


@pytest.mark.usefixtures("fake_cuda")
def test_no_device_time_without_the_cuda_runtime(colors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timer, "open_cuda_timer", lambda _: None)
    with OnnxRuntimeBackend(colors, CUDA) as backend:
        assert backend.device_time(_batch(1)) is None


# ---- On simulated GPUs. The functions with leading underscores run in the process that has them.


def _open_and_run(path: Path, device: Device, batch_sizes: list[int]) -> dict[str, int]:
    """Return what running some batches changed on the device, after the same batches were run before."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = OnnxRuntimeBackend(path, device)
    with backend:
        assert backend.provider == "CUDAExecutionProvider"
        image = backend.spec.input
        batches = [np.zeros((size, 3, image.height, image.width), np.float32) for size in batch_sizes]
        for batch in batches:
            assert backend.run(batch).shape == (len(batch), len(backend.spec.class_names))
        before = counters(device.index)
        for batch in batches:
            backend.run(batch)
        return changes(before, device.index)


def test_a_batch_size_is_captured_once_and_then_replayed(gpu_process: SimulatedGpuProcess, colors: Path) -> None:
    changed = gpu_process.call(_open_and_run, colors, CUDA, [1, 2, 3, 64])
    assert changed["graph_launches"] == 4
    assert changed["copies_to_device"] == changed["copies_to_host"] == 4
    assert not {"captures", "kernels", "allocations", "handles_created", "streams_created"} & set(changed)


def test_a_batch_above_the_maximum_runs_without_a_graph(gpu_process: SimulatedGpuProcess, colors: Path) -> None:
    changed = gpu_process.call(_open_and_run, colors, CUDA, [65])
    assert changed["kernels"] > 0
    assert not {"captures", "graph_launches"} & set(changed)


def _run_in_new_threads(path: Path, threads: int) -> dict[str, int]:
    with OnnxRuntimeBackend(path, CUDA) as backend:
        backend.run(_batch(4))
        before = counters()
        for _ in range(threads):
            thread = threading.Thread(target=backend.run, args=(_batch(4),))
            thread.start()
            thread.join()
        return changes(before)


def test_new_threads_share_the_handles_and_graphs(gpu_process: SimulatedGpuProcess, colors: Path) -> None:
    changed = gpu_process.call(_run_in_new_threads, colors, 5)
    assert changed["graph_launches"] == 5
    assert not {"captures", "handles_created", "allocations"} & set(changed)


def _stream_images(path: Path, times: int) -> list[dict[str, int]]:
    """Return what each of several streams of images changed."""
    images = list(np.zeros((150, SPEC.input.height, SPEC.input.width, 3), np.uint8))
    found: list[dict[str, int]] = []
    with load(path, device="cuda") as predictor:
        for _ in range(times):
            before = counters()
            assert len(list(predictor.predict_stream(images))) == len(images)
            found.append(changes(before))
    return found


def test_streams_of_images_do_not_accumulate_handles_and_graphs(gpu_process: SimulatedGpuProcess, colors: Path) -> None:
    _, *following = gpu_process.call(_stream_images, colors, 3)
    for changed in following:
        assert changed["graph_launches"] == 3
        assert not {"captures", "handles_created", "allocations", "host_allocations"} & set(changed)


def _close(path: Path) -> dict[str, int]:
    before = counters()
    with OnnxRuntimeBackend(path, CUDA) as backend:
        backend.run(_batch(1))
        backend.device_time(_batch(1))
    return changes(before)


def test_closing_releases_all_handles(gpu_process: SimulatedGpuProcess, colors: Path) -> None:
    changed = gpu_process.call(_close, colors)
    assert changed["handles_created"] == changed["handles_destroyed"] > 0


def _use_second_gpu(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    before = counters(0), counters(1)
    _open_and_run(path, Device("cuda", 1), [1, 65])
    return changes(before[0], 0), changes(before[1], 1)


def test_a_session_on_the_second_gpu_leaves_the_first_one_alone(gpu_process: SimulatedGpuProcess, colors: Path) -> None:
    first, second = gpu_process.call(_use_second_gpu, colors)
    assert second["allocated_bytes"] > 0
    assert second["captures"] > 0
    assert not first


def _write_model(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]]) -> Path:
    """Write a model that maps images of the size in `SPEC` to logits."""
    height, width = SPEC.input.height, SPEC.input.width
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, height, width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    entry = model.metadata_props.add()
    entry.key, entry.value = SPEC_KEY, SPEC.to_json()
    onnx.save(model, path)
    return path


@pytest.fixture
def shape_arithmetic(tmp_path: Path) -> Path:
    """Write a model with a class token, whose shape depends on the batch size, and with rows in another order."""
    nodes = [
        helper.make_node("Slice", ["input", "1", "4", "2"], ["lower_rows"]),
        helper.make_node("Slice", ["input", "0", "1", "2"], ["first_row"]),
        helper.make_node("Concat", ["lower_rows", "first_row"], ["rolled"], axis=2),
        helper.make_node("GlobalAveragePool", ["rolled"], ["average"]),
        helper.make_node("Shape", ["input"], ["shape"]),
        helper.make_node("Slice", ["shape", "0", "1"], ["batch"]),
        helper.make_node("Concat", ["batch", "3x1x1"], ["target"], axis=0),
        helper.make_node("Expand", ["token", "target"], ["tokens"]),
        helper.make_node("Concat", ["average", "tokens"], ["both"], axis=1),
        helper.make_node("Reshape", ["both", "0x2x3"], ["rows"]),
        helper.make_node("ReduceMean", ["rows", "1"], ["logits"], keepdims=0),
    ]
    numbers = {"0": [0], "1": [1], "2": [2], "4": [4], "3x1x1": [3, 1, 1], "0x2x3": [0, 2, 3]}
    constants: dict[str, NDArray[Any]] = {name: np.array(values) for name, values in numbers.items()}
    constants["token"] = np.ones((1, 3, 1, 1), np.float32)
    return _write_model(tmp_path / "shapes.onnx", nodes, constants)


def _count_operators_on_cpu(path: Path) -> int:
    session = gpu_session.open_session(path, CUDA)
    parts = session.get_provider_graph_assignment_info()
    return sum(len(part.get_nodes()) for part in parts if part.ep_name == "CPUExecutionProvider")


def test_shape_arithmetic_may_run_on_the_cpu(gpu_process: SimulatedGpuProcess, shape_arithmetic: Path) -> None:
    assert gpu_process.call(_count_operators_on_cpu, shape_arithmetic) > 0
    changed = gpu_process.call(_open_and_run, shape_arithmetic, CUDA, [1, 2, 64])
    assert changed["graph_launches"] == 3


def _mix_replays_and_other_runs(path: Path) -> dict[str, int]:
    before = counters()
    with OnnxRuntimeBackend(path, CUDA) as backend:
        for size in (1, 65, 2, 65, 64, 1):
            backend.run(_batch(size))
    return changes(before)


def test_replays_read_no_host_memory_that_was_reused(gpu_process: SimulatedGpuProcess, shape_arithmetic: Path) -> None:
    """The addresses of the inputs of a Concat are copied to the GPU again in each replay."""
    changed = gpu_process.call(_mix_replays_and_other_runs, shape_arithmetic)
    assert changed["captured_copies"] > 0
    assert "reused_sources" not in changed


def _error(path: Path, device: Device) -> tuple[str, str, str]:
    try:
        OnnxRuntimeBackend(path, device).close()
    except CifarxError as error:
        return type(error).__name__, error.problem, error.remedy
    raise AssertionError("no error")


def test_a_model_with_other_operators_on_the_cpu_is_refused(gpu_process: SimulatedGpuProcess, tmp_path: Path) -> None:
    """CUDA has no kernel for the product of unsigned integers."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("Cast", ["means"], ["bytes"], to=TensorProto.UINT8),
        helper.make_node("MatMulInteger", ["bytes", "weights"], ["product"]),
        helper.make_node("Cast", ["product"], ["logits"], to=TensorProto.FLOAT),
    ]
    path = _write_model(tmp_path / "integers.onnx", nodes, {"weights": np.eye(3, dtype=np.uint8)})
    kind, problem, remedy = gpu_process.call(_error, path, CUDA)
    assert kind == "DeviceError"
    assert problem == f"cuda:0 cannot run all of {path}: ONNX Runtime has only CPU kernels for MatMulInteger"
    assert remedy == "use --device cpu"


def test_a_gpu_that_does_not_exist(gpu_process: SimulatedGpuProcess, colors: Path) -> None:
    kind, problem, _ = gpu_process.call(_error, colors, Device("cuda", 7))
    assert kind == "DeviceError"
    assert "cuda:7" in problem


@pytest.fixture(scope="module")
def small_gpu(simulated_gpu_libraries: list[Path]) -> Iterator[SimulatedGpuProcess]:
    """Start a process with a GPU of 16 MiB."""
    with SimulatedGpuProcess(simulated_gpu_libraries, mebibytes=16) as process:
        yield process


def _error_of_run(path: Path, batch_size: int) -> tuple[str, str, str]:
    with OnnxRuntimeBackend(path, CUDA) as backend:
        assert backend.run(_batch(1)).shape == (1, 3)
        try:
            backend.run(_batch(batch_size))
        except CifarxError as error:
            assert backend.run(_batch(1)).shape == (1, 3)
            return type(error).__name__, error.problem, error.remedy
    raise AssertionError("no error")


def test_a_batch_that_does_not_fit_into_the_memory(small_gpu: SimulatedGpuProcess, colors: Path) -> None:
    kind, problem, remedy = small_gpu.call(_error_of_run, colors, 100_000)
    assert kind == "DeviceMemoryError"
    assert re.fullmatch(
        r"cuda:0 is out of memory \(27.5 MiB requested, 1\d\.\d MiB free\) with a batch of 100,000 images", problem
    )
    assert remedy == "use a smaller batch size"


def test_a_model_that_does_not_fit_into_the_memory(small_gpu: SimulatedGpuProcess, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("MatMul", ["means", "wide"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "narrow"], ["logits"]),
    ]
    weights = {"wide": np.ones((3, 1 << 20), np.float32), "narrow": np.ones((1 << 20, 3), np.float32)}
    path = _write_model(tmp_path / "large.onnx", nodes, weights)
    kind, problem, remedy = small_gpu.call(_error, path, CUDA)
    assert kind == "DeviceMemoryError"
    assert problem.startswith("cuda:0 is out of memory (12.0 MiB requested, ")
    assert remedy == "end other programs that use its memory, or use another --device"


def _provider_with_auto(path: Path) -> tuple[str, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with OnnxRuntimeBackend(path, Device("auto")) as backend:
            return backend.provider, [str(warning.message) for warning in caught]


def test_auto_selects_the_gpu(gpu_process: SimulatedGpuProcess, colors: Path) -> None:
    assert gpu_process.call(_provider_with_auto, colors) == ("CUDAExecutionProvider", [])


def _served_model_changes(path: Path) -> list[dict[str, int]]:
    """Return what the warm-up of a served model changed, and then requests of all sizes from another thread."""
    before = counters()
    with ThreadPoolExecutor(1) as loading:
        model = loading.submit(ServedModel, "colors", str(path), None, "cuda", 64).result()
    found = [changes(before)]
    before = counters()
    for size in (1, 2, 3, 17, 64):
        model.run(model.gray_images(size))
    found.append(changes(before))
    model.close()
    return found


def test_requests_capture_nothing_after_the_warm_up_of_the_server(
    gpu_process: SimulatedGpuProcess, colors: Path
) -> None:
    warm_up, requests = gpu_process.call(_served_model_changes, colors)
    assert warm_up["captures"] == 7
    assert requests["graph_launches"] == 5
    assert not {"captures", "kernels", "handles_created", "allocations"} & set(requests)


def _model_time(path: Path) -> float | None:
    with OnnxRuntimeBackend(path, CUDA) as backend:
        return backend.device_time(_batch(8))


def test_the_device_time_is_measured_in_a_replay(gpu_process: SimulatedGpuProcess, colors: Path) -> None:
    assert (gpu_process.call(_model_time, colors) or 0) > 0


@pytest.mark.gpu
@pytest.mark.skipif(provider_error(CUDA) is not None, reason="ONNX Runtime cannot use CUDA")
def test_on_a_gpu_with_cuda_graphs(colors: Path) -> None:
    with OnnxRuntimeBackend(colors, CUDA) as backend:
        assert backend._gpu is not None
        assert backend._gpu._bound is not None
        for count in (1, 3, 64, 65, 3, 1):
            batch = _batch(count, count)
            assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
            assert 0 < (backend.device_time(batch) or 0) < 1e6
