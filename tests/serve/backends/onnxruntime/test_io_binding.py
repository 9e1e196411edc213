"""These tests run on the CPU, where IO binding works as on a GPU but no CUDA graph is captured."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cifarx_serve.backends.onnxruntime.io_binding import BoundSession, TimedSession
from cifarx_serve.spec import ModelSpec
from tests.support.color_model import SPEC, write_onnx
from tests.support.spec_model import GRAYSCALE, RGB, make_spec, write_model

SHAPE = SPEC.input.shape


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_onnx(tmp_path_factory.mktemp("model") / "a.onnx")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture
def bound(session: Any) -> BoundSession:
    return BoundSession(session, "cpu", 0, SPEC)


def _batch(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, BoundSession.max_batch_size), min_size=1, max_size=6))
def test_any_sequence_of_batches_gives_the_logits_of_plain_runs(session: Any, counts: list[int]) -> None:
    bound = BoundSession(session, "cpu", 0, SPEC)
    for seed, count in enumerate(counts):
        batch = _batch(count, seed)
        assert np.array_equal(bound.run(batch), session.run(["logits"], {"input": batch})[0])


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(GRAYSCALE),
        make_spec(msgspec.structs.replace(RGB, layout="NHWC"), output="probabilities"),
        make_spec(class_names=("no", "yes"), activation="sigmoid", outputs=1),
    ],
    ids=["grayscale", "NHWC, probabilities", "one output"],
)
def test_the_shapes_and_names_are_those_of_the_spec(tmp_path: Path, spec: ModelSpec) -> None:
    session = onnxruntime.InferenceSession(write_model(tmp_path / "a.onnx", spec), providers=["CPUExecutionProvider"])
    bound = BoundSession(session, "cpu", 0, spec)
    assert bound.find_mismatch() is None
    batch = np.random.default_rng(0).random((3, *spec.input.shape), np.float32)
    found = bound.run(batch)
    assert found.shape == (3, spec.output_size)
    assert np.array_equal(found, session.run([spec.output], {"input": batch})[0])


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
