"""On the CPU, where memory is bound as on a GPU and nothing is recorded; with CUDA graphs where there is a GPU."""

from collections.abc import Callable, Iterator
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
from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend, provider_problem
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
@given(st.lists(st.integers(1, BoundSession.largest), min_size=1, max_size=6))
def test_any_batches_in_any_order_are_answered_as_without(session: Any, counts: list[int]) -> None:
    bound = BoundSession(session, "cpu", 0, SHAPE, len(SPEC.class_names))
    for seed, count in enumerate(counts):
        batch = _batch(count, seed)
        assert np.array_equal(bound.run(batch), session.run(["logits"], {"input": batch})[0])


def test_memory_is_made_once_a_power_of_two(bound: BoundSession) -> None:
    for count in range(1, BoundSession.largest + 1):
        bound.run(_batch(count))
    assert sorted(bound._sizes) == [1, 2, 4, 8, 16, 32, 64]


def test_a_result_is_the_callers_to_keep(bound: BoundSession) -> None:
    first = bound.run(_batch(3))
    kept = first.copy()
    bound.run(_batch(3, seed=1))
    assert np.array_equal(first, kept)
    first[:] = 0
    assert np.array_equal(bound.run(_batch(3)), kept)


def test_threads_do_not_mix_their_images(session: Any, bound: BoundSession) -> None:
    batches = [_batch(1 + seed % 5, seed) for seed in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for batch, found in zip(batches, pool.map(bound.run, batches), strict=True):
            assert np.array_equal(found, session.run(["logits"], {"input": batch})[0])


def test_no_problem_where_both_agree(bound: BoundSession) -> None:
    assert bound.problem() is None


def test_a_replay_that_answers_otherwise_is_a_problem(bound: BoundSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a graph that was recorded with another input's address: it gives the first answer again."""
    first = bound.run(_batch(2))
    monkeypatch.setattr(bound, "run", lambda _: first)
    assert "replayed" in (bound.problem() or "")


class _Clock:
    """In place of a GPU's: it notes what was run between its events."""

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
def test_between_the_events_is_one_run_that_does_not_wait(bound: BoundSession, count: int) -> None:
    """The input is copied before, by a whole run; a batch above the largest is neither padded nor recorded."""
    noted: list[Any] = []
    session, clock = bound._session, _Clock()

    def run(binding: Any, options: Any) -> None:
        noted.append(options)
        session.run_with_iobinding(binding, options)

    noting = SimpleNamespace(io_binding=session.io_binding, run_with_iobinding=run)
    timed = TimedSession(bound.on(noting), clock)  # type: ignore[arg-type]
    assert timed.device_time(_batch(count)) == 12.5
    graph = {1: "1", 3: "4", 64: "64", 65: "-1"}[count]
    assert [options.get_run_config_entry("gpu_graph_id") for options in noted] == [graph, graph]
    assert noted[1].get_run_config_entry("disable_synchronize_execution_providers") == "1"
    with pytest.raises(RuntimeError, match="does not have"):
        noted[0].get_run_config_entry("disable_synchronize_execution_providers")
    assert len(clock.between) == 1
    timed.close()
    assert clock.closed
    assert timed.device_time(_batch(count)) is None


class _OnTheCpu(BoundSession):
    """Bound to the CPU whatever is asked for: the only memory that is here."""

    def __init__(self, session: Any, device: str, number: int, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(session, "cpu", 0, shape, classes)
        assert (device, number) in (("cuda", 0), ("cpu", 0))  # the latter of a second session


@pytest.fixture
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's provider taken for CUDA's, so that a backend binds its session."""
    monkeypatch.setattr(backend_module, "_CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(io_binding, "BoundSession", _OnTheCpu)
    return


@pytest.mark.usefixtures("as_if_cuda")
def test_a_backend_uses_it_up_to_the_largest_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    run = _OnTheCpu.run
    monkeypatch.setattr(_OnTheCpu, "run", lambda bound, batch: used.append(len(batch)) or run(bound, batch))
    with OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu")) as backend:
        used.clear()
        for count in (1, BoundSession.largest, BoundSession.largest + 1):
            batch = _batch(count)
            assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
    assert used == [1, BoundSession.largest]


@pytest.mark.usefixtures("as_if_cuda")
def test_a_backend_times_a_second_session_on_the_clocks_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, str]] = []
    clock = _Clock()

    def second(path: Path, number: int, further: dict[str, str]) -> Any:
        assert number == 0
        made.append(further)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(backend_module, "_cuda_session", second)
    monkeypatch.setattr(cuda_timer, "open_clock", lambda number: clock if number == 0 else None)
    backend = OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu"))
    assert [backend.device_time(_batch(count)) for count in (1, 65)] == [12.5, 12.5]
    assert made == [{"user_compute_stream": "4096"}]
    backend.close()
    backend.close()
    assert clock.closed


@pytest.mark.usefixtures("as_if_cuda")
@pytest.mark.parametrize("fault", ["no device", "no memory", "no run"])
def test_a_backend_that_cannot_time_says_why_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    clock = _Clock()

    def open_clock(_: int) -> _Clock:
        if fault == "no device":
            raise DeviceError(fault, "no remedy")
        return clock

    def second(path: Path, *_: object) -> Any:
        if fault == "no memory":
            raise DeviceError(fault, "no remedy")
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def time(_: object) -> float:
        raise RuntimeError(fault)

    monkeypatch.setattr(cuda_timer, "open_clock", open_clock)
    monkeypatch.setattr(backend_module, "_cuda_session", second)
    monkeypatch.setattr(clock, "time", time)
    with OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu")) as backend:
        with pytest.warns(FallbackWarning, match=f"no time on the device of .*{fault}"):
            assert backend.device_time(_batch(1)) is None
        assert backend.run(_batch(2)).shape == (2, 3)
    assert clock.closed == (fault != "no device")


@pytest.mark.usefixtures("as_if_cuda")
def test_no_time_without_cudas_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timer, "open_clock", lambda _: None)
    with OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu")) as backend:
        assert backend.device_time(_batch(1)) is None


@pytest.mark.usefixtures("as_if_cuda")
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_backend_goes_without_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def run(_: BoundSession, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        if fault == "raises":
            raise RuntimeError("this graph cannot be captured")
        return np.zeros((len(batch), 3), np.float32)

    monkeypatch.setattr(_OnTheCpu, "run", run)
    words = "cannot be captured" if fault == "raises" else "replayed"
    with pytest.warns(FallbackWarning, match=f"without CUDA graphs: .*{words}"):
        backend = OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), Device("cpu"))
    batch = _batch(2)
    assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
    backend.close()


@pytest.mark.skipif(provider_problem(CUDA) is not None, reason="ONNX Runtime cannot use CUDA here")
def test_on_a_gpu_with_cuda_graphs(tmp_path: Path) -> None:
    with OnnxRuntimeBackend(write_onnx(tmp_path / "a.onnx"), CUDA) as backend:
        assert backend._bound is not None
        for count in (1, 3, 64, 65, 3, 1):
            batch = _batch(count, count)
            assert backend.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-4)
            assert 0 < (backend.device_time(batch) or 0) < 1e6
