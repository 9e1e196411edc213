"""A shadow answers real requests in a process of its own, and no answer waits for it or depends on it."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from cifarx_serve.backends.registry import registered_backends
from cifarx_serve.errors import UsageError
from cifarx_serve.server.inference import shadow as shadow_module
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.inference.shadow import require_comparable
from cifarx_serve.server.settings import Limits, Settings
from tests.support.child_processes import running_children
from tests.support.color_model import SPEC, write_onnx
from tests.support.faulty_backend import register_faulty_backend, write_faulty_model
from tests.support.spec_model import GRAYSCALE, make_spec, write_model

RED, GREEN, BLUE = (np.full((1, 4, 6, 3), color, np.uint8) for color in ([255, 0, 0], [0, 255, 0], [0, 0, 255]))


class Server:
    """A model with a shadow, and its metrics."""

    def __init__(self, repository: ModelRepository, metrics: Metrics, events: list[str]) -> None:
        self.repository = repository
        self.events = events
        self._metrics = metrics

    async def infer(self, images: NDArray[np.uint8]) -> list[int]:
        with self.repository.get() as instance:
            result = await instance.infer(images, Deadline(time.perf_counter(), 30.0), lambda: False)
        return [int(best) for best in result.values.argmax(axis=1)]

    def value(self, name: str, outcome: str | None = None) -> float:
        return sum(
            sample.value
            for family in text_string_to_metric_families(self._metrics.render().decode())
            for sample in family.samples
            if sample.name == name and sample.labels.get("outcome") == outcome
        )

    def outcomes(self, outcome: str) -> float:
        return self.value("cifarx_shadow_requests_total", outcome)

    async def wait_for(self, name: str, value: float, outcome: str | None = None) -> None:
        async with asyncio.timeout(60):
            while self.value(name, outcome) < value:
                await asyncio.sleep(0.01)
        assert self.value(name, outcome) == value


def shadow_processes() -> list[psutil.Process]:
    """Return the running processes of shadows, because other tests of this process may leave children."""
    return running_children("shadow_process")


def run_with_shadow(model: Path, shadow: Path, test: Callable[[Server], Awaitable[None]], share: float = 1.0) -> None:
    async def run() -> None:
        settings = Settings(
            files={"colors": str(model)},
            shadows={"colors": str(shadow)},
            shadow_share=share,
            device="cpu",
            limits=Limits(max_batch=4),
            registered_backends=registered_backends(),
        )
        metrics, events = Metrics(), list[str]()
        repository = ModelRepository(settings, metrics)
        await repository.open(events.append)
        try:
            await test(Server(repository, metrics, events))
        finally:
            for path in (model, shadow):
                path.with_suffix(".slow").unlink(missing_ok=True)
            await repository.close()

    asyncio.run(run())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


def test_images_on_which_both_models_agree_are_counted(tmp_path: Path, model: Path) -> None:
    swapped = write_onnx(tmp_path / "swapped.onnx", order=(2, 1, 0))

    async def test(server: Server) -> None:
        assert await server.infer(np.concatenate([RED, GREEN, BLUE])) == [0, 1, 2]
        assert await server.infer(GREEN) == [1]
        await server.wait_for("cifarx_shadow_requests_total", 2, "answered")
        assert server.value("cifarx_shadow_images_total") == 4
        assert server.value("cifarx_shadow_agreeing_images_total") == 2
        assert server.value("cifarx_shadow_compute_seconds_count") == 2
        assert server.value("cifarx_shadow_compute_seconds_sum") > 0
        assert server.value("cifarx_batch_images_sum") == 4, "the shadow does not count as the model"
        assert not server.events

    run_with_shadow(model, swapped, test)


def test_a_share_of_the_requests_is_chosen(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(shadow_module, "random", random.Random(0))
    expected = random.Random(0)
    chosen = sum(expected.random() < 0.1 for _ in range(200))
    assert 10 <= chosen <= 30

    async def test(server: Server) -> None:
        for _ in range(200):
            await server.infer(RED)
        async with asyncio.timeout(60):
            while sum(map(server.outcomes, ("answered", "dropped"))) < chosen:
                await asyncio.sleep(0.01)
        assert sum(map(server.outcomes, ("answered", "dropped"))) == chosen

    run_with_shadow(model, model, test, share=0.1)


def test_requests_that_find_no_room_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    register_faulty_backend(monkeypatch)
    shadow = write_faulty_model(tmp_path / "shadow.faulty")

    async def test(server: Server) -> None:
        await server.infer(RED)
        await server.wait_for("cifarx_shadow_requests_total", 1, "answered")
        shadow.with_suffix(".slow").touch()
        started_at = time.perf_counter()
        for _ in range(20):
            assert await server.infer(RED) == [0]
        assert time.perf_counter() - started_at < 5
        await server.wait_for("cifarx_shadow_requests_total", 4, "dropped")
        shadow.with_suffix(".slow").unlink()
        await server.wait_for("cifarx_shadow_requests_total", 17, "answered")

    run_with_shadow(model, shadow, test)


def test_large_images_do_not_wait_for_the_shadow(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(shadow_module, "_MAX_WAITING_BYTES", 100)

    async def test(server: Server) -> None:
        await server.infer(np.concatenate([RED, RED]))
        assert server.value("cifarx_shadow_requests_total", "dropped") == 1

    run_with_shadow(model, model, test)


def test_a_shadow_runs_only_while_the_model_is_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_faulty_backend(monkeypatch)
    busy = write_faulty_model(tmp_path / "colors.faulty")

    async def test(server: Server) -> None:
        await server.infer(RED)
        await server.wait_for("cifarx_shadow_requests_total", 1, "answered")
        busy.with_suffix(".slow").touch()
        first = asyncio.ensure_future(server.infer(RED))
        await asyncio.sleep(0.05)
        shadow = server.repository.get().shadow
        assert shadow is not None
        shadow.offer(RED, np.zeros((1, 3), np.float32), SPEC)
        await asyncio.sleep(0.3)
        assert server.value("cifarx_shadow_requests_total", "answered") == 1
        busy.with_suffix(".slow").unlink()
        await first
        await server.wait_for("cifarx_shadow_requests_total", 3, "answered")

    run_with_shadow(busy, write_onnx(tmp_path / "shadow.onnx"), test)


def test_a_shadow_that_cannot_be_opened_changes_no_answer(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model.read_bytes()[:-20])

    async def test(server: Server) -> None:
        assert await server.infer(RED) == [0]
        async with asyncio.timeout(60):
            while not server.events:
                await asyncio.sleep(0.01)
        assert server.events[0].startswith("the shadow of colors has failed: ")
        assert "broken.onnx" in server.events[0]
        assert server.repository.state == "ready"

    run_with_shadow(model, broken, test)


def test_a_shadow_whose_process_ends_is_started_again(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(shadow_module, "_RESTART_DELAY_S", 0.01)

    async def test(server: Server) -> None:
        await server.infer(RED)
        await server.wait_for("cifarx_shadow_requests_total", 1, "answered")
        (process,) = shadow_processes()
        process.kill()
        assert await server.infer(RED) == [0]
        await server.wait_for("cifarx_shadow_requests_total", 1, "failed")
        await server.infer(RED)
        await server.wait_for("cifarx_shadow_requests_total", 2, "answered")
        assert server.events == ["the shadow of colors has failed: the worker exited with status -9"]

    run_with_shadow(model, model, test)


def test_a_reload_opens_the_file_of_the_shadow_again(tmp_path: Path, model: Path) -> None:
    shadow = write_onnx(tmp_path / "shadow.onnx", order=(2, 1, 0))

    async def test(server: Server) -> None:
        await server.infer(RED)
        await server.wait_for("cifarx_shadow_requests_total", 1, "answered")
        write_onnx(shadow)
        write_onnx(model, opset=18)
        await server.repository.reload(server.events.append)
        await server.infer(RED)
        await server.wait_for("cifarx_shadow_requests_total", 2, "answered")
        assert server.value("cifarx_shadow_agreeing_images_total") == 1

    run_with_shadow(model, shadow, test)
    assert not psutil.wait_procs(shadow_processes(), timeout=60)[1]


def test_a_model_that_has_got_other_classes_cannot_be_compared(tmp_path: Path, model: Path) -> None:
    async def test(server: Server) -> None:
        classes = (*SPEC.class_names, "brown")
        write_model(model, make_spec(class_names=classes))
        await server.repository.reload(server.events.append)
        await server.infer(RED)
        await server.wait_for("cifarx_shadow_requests_total", 1, "failed")
        assert server.value("cifarx_shadow_images_total") == 0

    run_with_shadow(model, write_onnx(tmp_path / "shadow.onnx"), test)


@pytest.mark.parametrize(
    ("shadow", "message"),
    [
        (make_spec(class_names=("red", "green", "brown")), "the shadow b.onnx has classes that a does not have"),
        (make_spec(GRAYSCALE), "the shadow b.onnx has an input that a does not have: give a model with the same"),
        (make_spec(activation="sigmoid"), "the shadow b.onnx has outputs that a does not have"),
        (make_spec(embedded_preprocessing=True), "the shadow b.onnx has an input that a does not have"),
    ],
)
def test_a_shadow_must_be_comparable(shadow: object, message: str) -> None:
    require_comparable("a", SPEC, "b.onnx", make_spec())
    with pytest.raises(UsageError, match=message):
        require_comparable("a", SPEC, "b.onnx", shadow)  # type: ignore[arg-type]
