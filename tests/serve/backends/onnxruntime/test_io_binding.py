"""These tests run on the CPU, where IO binding works as on a GPU but no CUDA graph is captured, and on a GPU if any."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cifarx_serve.backends.onnxruntime import backend as backend_module
from cifarx_serve.backends.onnxruntime import cuda_timer, io_binding
from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend, provider_error
from cifarx_serve.backends.onnxruntime.io_binding import BoundSession, TimedSession
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, FallbackWarning
from tests.support.color_model import SPEC, write_onnx

SHAPE = (3, SPEC.input.height, SPEC.input.width)
CUDA = Device("cuda", 0)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_onnx(tmp_path_factory.mktemp("model") / "a.onnx")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture
def bound(session: Any) -> BoundSession:
    return BoundSession(session, "cpu", 0, SHAPE, len(SPEC.class_names))


def _batch(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, BoundSession.max_batch_size), min_size=1, max_size=6))
def test_any_sequence_of_batches_gives_the_logits_of_plain_runs(session: Any, counts: list[int]) -> None:
    bound = BoundSession(session, "cpu", 0, SHAPE, len(SPEC.class_names))
    for seed, count in enumerate(counts):
        batch = _batch(count, seed)
        assert np.array_equal(bound.run(batch), session.run(["logits"], {"input": batch})[0])


def test_memory_is_allocated_once_per_power_of_two(bound: BoundSession) -> None:
    for count in range(1, BoundSession.max_batch_size + 1):
        bound.run(_batch(count))
    assert sorted(bound._bindings) == [1, 2, 4, 8, 16, 32, 64]


def test_a_result_is_not_overwritten_by_the_next_run(bound: BoundSession) -> None:
    first = bound.run(_batch(3))
    kept = first.copy()
    bound.run(_batch(3, seed=1))
    assert np.array_equal(first, kept)
    first[:] = 0
    assert np.array_equal(bound.run(_batch(3)), kept)


def test_concurrent_runs_do_not_mix_their_images(session: Any, bound: BoundSession) -> None:
    batches = [_batch(1 + seed % 5, seed) for seed in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for batch, found in zip(batches, pool.map(bound.run, batches), strict=True):
            assert np.array_equal(found, session.run(["logits"], {"input": batch})[0])


def test_no_mismatch_if_the_logits_agree(bound: BoundSession) -> None:
    assert bound.find_mismatch() is None


def test_a_replay_with_other_logits_is_a_mismatch(bound: BoundSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph captured with the address of another input would return the first logits again."""
    first = bound.run(_batch(2))
    monkeypatch.setattr(bound, "run", lambda _: first)
    assert "replayed" in (bound.find_mismatch() or "")


class _FakeTimer:
    """Records what was run between its events."""

    stream = 4096

    def __init__(self) -> None:
        self.between: list[object] = []
        self.closed = False

    def time(self, work: Callable[[], object]) -> float:
        self.between.append(work())
        return 12.5

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("count", [1, 3, 64, 65])
def test_the_timed_run_is_asynchronous_and_has_its_input_on_the_device(bound: BoundSession, count: int) -> None:
    """A first run copies the input. A batch above the maximum is neither padded nor captured."""
    recorded: list[Any] = []
    session, timer = bound._session, _FakeTimer()

    def run(binding: Any, options: Any) -> None:
        recorded.append(options)
        session.run_with_iobinding(binding, options)

    recording = SimpleNamespace(io_binding=session.io_binding, run_with_iobinding=run)
    timed = TimedSession(bound.with_session(recording), timer)  # type: ignore[arg-type]
    assert timed.device_time(_batch(count)) == 12.5
    graph = {1: "1", 3: "4", 64: "64", 65: "-1"}[count]
    assert [options.get_run_config_entry("gpu_graph_id") for options in recorded] == [graph, graph]
    assert recorded[1].get_run_config_entry("disable_synchronize_execution_providers") == "1"
    with pytest.raises(RuntimeError, match="does not have"):
        recorded[0].get_run_config_entry("disable_synchronize_execution_providers")
    assert len(timer.between) == 1
    timed.close()
    assert timer.closed
    assert timed.device_time(_batch(count)) is None


class _CpuBoundSession(BoundSession):
    """Always uses the memory of the CPU."""

    def __init__(self, session: Any, device: str, index: int, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(session, "cpu", 0, shape, classes)
        assert (device, index) in (("cuda", 0), ("cpu", 0))  # the latter for a second session


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU provider as the CUDA provider, so that a backend uses IO binding."""
    monkeypatch.setattr(backend_module, "_CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(io_binding, "BoundSession", _CpuBoundSession)


@pytest.mark.usefixtures("fake_cuda")
def test_a_backend_uses_io_binding_up_to_the_maximum_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    original_run = _CpuBoundSession.run

    def run(bound: _CpuBoundSession, batch: NDArray[Any]) -> NDArray[np.float32]:
        used.append(len(batch))
        return original_run(bound, batch)

    monkeypatch.setattr(_CpuBoundSession, "run", run)
    with OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu")) as backend:
        used.clear()
        for count in (1, BoundSession.max_batch_size, BoundSession.max_batch_size + 1):
            batch = _batch(count)
            assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
    assert used == [1, BoundSession.max_batch_size]


@pytest.mark.usefixtures("fake_cuda")
def test_a_backend_times_a_second_session_on_the_timers_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[dict[str, str]] = []
    timer = _FakeTimer()

    def second(path: Path, index: int, extra_options: dict[str, str]) -> Any:
        assert index == 0
        created.append(extra_options)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(backend_module, "_cuda_session", second)
    monkeypatch.setattr(cuda_timer, "open_cuda_timer", lambda index: timer if index == 0 else None)
    backend = OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu"))
    assert [backend.device_time(_batch(count)) for count in (1, 65)] == [12.5, 12.5]
    assert created == [{"user_compute_stream": "4096"}]
    backend.close()
    backend.close()
    assert timer.closed


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("fault", ["no device", "no memory", "no run"])
def test_a_backend_that_cannot_be_timed_warns_and_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    timer = _FakeTimer()

    def open_cuda_timer(_: int) -> _FakeTimer:
        if fault == "no device":
            raise DeviceError(fault, "no remedy")
        return timer

    def second(path: Path, *_: object) -> Any:
        if fault == "no memory":
            raise DeviceError(fault, "no remedy")
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def time(_: object) -> float:
        raise RuntimeError(fault)

    monkeypatch.setattr(cuda_timer, "open_cuda_timer", open_cuda_timer)
    monkeypatch.setattr(backend_module, "_cuda_session", second)
    monkeypatch.setattr(timer, "time", time)
    with OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu")) as backend:
        with pytest.warns(FallbackWarning, match=f"cannot measure the device time of .*{fault}"):
            assert backend.device_time(_batch(1)) is None
        assert backend.run(_batch(2)).shape == (2, 3)
    assert timer.closed == (fault != "no device")


@pytest.mark.usefixtures("fake_cuda")
def test_no_device_time_without_the_cuda_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timer, "open_cuda_timer", lambda _: None)
    with OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu")) as backend:
        assert backend.device_time(_batch(1)) is None


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_backend_without_working_cuda_graphs_warns_and_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def run(_: BoundSession, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        if fault == "raises":
            raise RuntimeError("this graph cannot be captured")
        return np.zeros((len(batch), 3), np.float32)

    monkeypatch.setattr(_CpuBoundSession, "run", run)
    words = "cannot be captured" if fault == "raises" else "replayed"
    with pytest.warns(FallbackWarning, match=f"without CUDA graphs: .*{words}"):
        backend = OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu"))
    batch = _batch(2)
    assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
    backend.close()


@pytest.mark.skipif(provider_error(CUDA) is not None, reason="ONNX Runtime cannot use CUDA")
def test_on_a_gpu_with_cuda_graphs(tmp_path: Path) -> None:
    with OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), CUDA) as backend:
        assert backend._bound is not None
        for count in (1, 3, 64, 65, 3, 1):
            batch = _batch(count, count)
            assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
            assert 0 < (backend.device_time(batch) or 0) < 1e6
