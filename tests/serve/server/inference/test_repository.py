import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_serve.backends.registry import registered_backends
from cifarx_serve.errors import DeviceMemoryError, ModelFileError
from cifarx_serve.server.inference import loading
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
)
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model import ServedModel
from cifarx_serve.server.inference.repository import ModelInstance, ModelRepository
from cifarx_serve.server.settings import Limits, Settings
from tests.support.child_processes import running_children
from tests.support.color_model import write_onnx
from tests.support.faulty_backend import BOMB, LARGE, POISON, FaultyBackend, register_faulty_backend, write_faulty_model


@pytest.fixture(autouse=True)
def _faulty_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    register_faulty_backend(monkeypatch)


def image(color: tuple[int, int, int] = (255, 0, 0)) -> NDArray[np.uint8]:
    return np.full((1, 4, 6, 3), color, np.uint8)


def run_with_repository(
    test: Callable[[ModelRepository], Awaitable[None]], *paths: Path, is_open: bool = True, **limits: Any
) -> None:
    """Run a test with a repository of these files, and close it at the end."""

    async def run() -> None:
        files = {path.stem: str(path) for path in paths}
        settings = Settings(
            files=files, device="cpu", limits=Limits(max_batch=2, **limits), registered_backends=registered_backends()
        )
        repository = ModelRepository(settings, Metrics())
        if is_open:
            await repository.open()
        try:
            await test(repository)
        finally:
            await repository.close()

    asyncio.run(run())
    assert FaultyBackend.open_count == 0


async def best_class(instance: ModelInstance, color: tuple[int, int, int] = (255, 0, 0)) -> int:
    result = await instance.infer(image(color), Deadline(time.perf_counter(), 10.0), lambda: False)
    return int(result.values[0].argmax())


def test_models_are_loaded_in_order_and_found_by_name(tmp_path: Path) -> None:
    async def test(repository: ModelRepository) -> None:
        assert repository.state == "ready"
        assert [instance.model.name for instance in repository.instances] == ["b", "a"]
        assert repository.get().model.name == "b"
        assert repository.get("a").model.name == "a"
        assert await best_class(repository.get("a"), (0, 255, 0)) == 1
        with pytest.raises(ModelNotFound, match=r"unknown model 'aa': did you mean 'a'\? choose from a, b"):
            repository.get("aa")

    run_with_repository(test, write_onnx(tmp_path / "b.onnx"), write_faulty_model(tmp_path / "a.faulty"))


def test_a_model_is_found_by_its_version(tmp_path: Path) -> None:
    async def test(repository: ModelRepository) -> None:
        version = repository.get("a").model.version
        assert repository.get("a", version) is repository.get("a")
        assert repository.get("a", "1") is repository.get("a"), "clients of Triton ask for version 1 by habit"
        with pytest.raises(ModelNotFound) as not_found:
            repository.get("a", "2")
        assert str(not_found.value) == f"model a has no version '2': its version is {version}"

    run_with_repository(test, write_faulty_model(tmp_path / "a.faulty"))


def test_the_latest_of_several_versions_is_the_default(tmp_path: Path) -> None:
    async def test(repository: ModelRepository) -> None:
        latest = repository.get("a")
        assert repository.get() is latest
        assert (latest.model.key, latest.model.name, latest.model.number) == ("a@10", "a", 10)
        assert [instance.model.protocol_version for instance in repository.versions("a")] == ["2", "10"]
        older = repository.get("a", "2")
        assert older is repository.get("a@2") is repository.get("a", older.model.version)
        assert repository.get("a@2", "2") is older
        assert await best_class(latest) != await best_class(older)
        assert repository.get("b").model.protocol_version == repository.get("b").model.version
        for name, version, message in [
            ("a", "1", "model a has no version '1': its versions are 2, 10"),
            ("a@2", "10", "model a@2 has no version '10': its version is 2"),
            ("a@3", None, "unknown model 'a@3': did you mean 'a'"),
        ]:
            with pytest.raises(ModelNotFound) as not_found:
                repository.get(name, version)
            assert str(not_found.value).startswith(message)

    paths = [write_onnx(tmp_path / "a@10.onnx"), write_onnx(tmp_path / "a@2.onnx", order=(2, 1, 0))]
    run_with_repository(test, *paths, write_onnx(tmp_path / "b.onnx", opset=18))


def test_an_update_loads_and_unloads_models(tmp_path: Path) -> None:
    a, b, broken = write_onnx(tmp_path / "a.onnx"), write_onnx(tmp_path / "b.onnx"), tmp_path / "broken.onnx"
    broken.write_bytes(b"text")

    async def test(repository: ModelRepository) -> None:
        events: list[str] = []
        used = repository.get("a")
        with used:
            updating = asyncio.create_task(
                repository.update({"b": str(b), "broken": str(broken), "b@2": str(a)}, events.append)
            )
            while "unloaded a" not in events:
                await asyncio.sleep(0.01)
            with pytest.raises(ModelNotFound, match="unknown model 'a': choose from b"):
                repository.get("a")
            assert await best_class(used) == 0, "a request that came before is answered"
            assert not updating.done()
        errors = await updating
        assert list(errors) == ["broken"]
        version = repository.get("b", "1").model.version
        assert events[0] == f"loaded b at version {version}"
        assert events[1].startswith("did not load broken: ")
        assert list(repository.settings.files) == ["b", "b@2"]
        assert repository.get("b").model.key == "b@2"
        assert repository.state == "ready"
        await repository.update({}, events.append)
        with pytest.raises(ModelNotFound, match="no model is loaded: load one of the model repository"):
            repository.get()
        assert repository.state == "ready"

    run_with_repository(test, a)


def test_the_state_is_starting_until_all_models_are_loaded(tmp_path: Path) -> None:
    async def test(repository: ModelRepository) -> None:
        assert repository.state == "starting"
        with pytest.raises(ModelNotReady, match="model a is still loading: try again in a second"):
            repository.get("a")
        slow = tmp_path / "b.slow"
        slow.touch()
        opening = asyncio.create_task(repository.open())
        async with asyncio.timeout(20):
            while not repository.instances:
                await asyncio.sleep(0.005)
        assert repository.state == "starting"
        assert await best_class(repository.get("a")) == 0
        slow.unlink()
        await opening
        assert repository.state == "ready"

    run_with_repository(
        test, write_faulty_model(tmp_path / "a.faulty"), write_faulty_model(tmp_path / "b.faulty"), is_open=False
    )


def test_a_file_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    path = write_faulty_model(tmp_path / "a.faulty")
    path.write_text("{}")

    async def test(repository: ModelRepository) -> None:
        with pytest.raises(Exception, match="malformed model spec"):
            await repository.open()

    run_with_repository(test, path, is_open=False)


def test_the_state_is_draining_during_shutdown(tmp_path: Path) -> None:
    async def test(repository: ModelRepository) -> None:
        repository.draining = True
        assert repository.state == "draining"

    run_with_repository(test, write_faulty_model(tmp_path / "a.faulty"))


def test_reload_replaces_a_model_whose_file_changed(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "a.onnx")

    async def test(repository: ModelRepository) -> None:
        before = repository.get("a").model.version
        events: list[str] = []
        write_onnx(path, order=(2, 1, 0))
        assert await best_class(repository.get("a")) == 0
        await repository.reload(events.append)
        after = repository.get("a").model.version
        assert events == [f"reloaded a from version {before} to {after}"]
        assert before != after
        assert await best_class(repository.get("a")) == 2
        await repository.reload(events.append)
        assert len(events) == 1

    run_with_repository(test, path)


@pytest.mark.parametrize("kind", ["broken", "foreign", "empty", "absent", "failing"])
def test_reload_keeps_the_old_version_of_a_file_that_does_not_load(tmp_path: Path, kind: str) -> None:
    path = write_faulty_model(tmp_path / "a.faulty")
    other = write_faulty_model(tmp_path / "b.faulty")
    contents = {"broken": path.read_bytes()[:-9], "foreign": b"\x89PNG\r\n\x1a\n", "empty": b""}

    async def test(repository: ModelRepository) -> None:
        version = repository.get("a").model.version
        events: list[str] = []
        if kind == "absent":
            path.unlink()
        elif kind == "failing":
            write_faulty_model(path, "new")
            path.with_suffix(".failing").touch()
        else:
            path.write_bytes(contents[kind])
        write_faulty_model(other, "new")
        await repository.reload(events.append)
        path.with_suffix(".failing").unlink(missing_ok=True)
        assert events[0].startswith(f"kept a at version {version}: ")
        assert events[1].startswith("reloaded b from version ")
        assert repository.get("a").model.version == version
        assert repository.state == "ready"
        assert await best_class(repository.get("a")) == 0
        assert FaultyBackend.open_count == 2

    run_with_repository(test, path, other)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("an error of the library")])
def test_reload_keeps_the_old_version_if_there_is_no_room_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The process that tries the new version has the memory for it, but this one holds the old version too."""
    path, other = (write_faulty_model(tmp_path / f"{name}.faulty") for name in "ab")

    def load(name: str, *arguments: Any) -> ServedModel:
        if name == "a":
            raise error
        return ServedModel(name, *arguments)

    async def test(repository: ModelRepository) -> None:
        events: list[str] = []
        for changed in (path, other):
            write_faulty_model(changed, "new")
        monkeypatch.setattr(loading, "ServedModel", load)
        await repository.reload(events.append)
        assert f"a.faulty cannot be loaded ({str(error) or 'MemoryError'})" in events[0]
        assert events[1].startswith("reloaded b from version ")
        assert repository.state == "ready"

    run_with_repository(test, path, other)


@pytest.mark.parametrize("kind", ["opening", "running"])
def test_reload_goes_on_after_a_model_that_never_returns(tmp_path: Path, kind: str) -> None:
    path = write_faulty_model(tmp_path / "a.faulty")
    other = write_faulty_model(tmp_path / "b.faulty")

    async def test(repository: ModelRepository) -> None:
        version = repository.get("a").model.version
        events: list[str] = []
        write_faulty_model(path, "endless" if kind == "opening" else "new")
        path.with_suffix(".slow").touch()
        write_faulty_model(other, "new")
        reloading = asyncio.create_task(repository.reload(events.append))
        async with asyncio.timeout(60):
            while not events:
                await asyncio.sleep(0.01)
        what = "was not opened" if kind == "opening" else "has not run a batch of its warm-up"
        assert events[0] == f"kept a at version {version}: {path} {what} within 1 s: raise --load-timeout-s"
        path.with_suffix(".slow").unlink()
        assert await best_class(repository.get("a")) == 0
        await reloading
        assert events[1].startswith("reloaded b from version ")
        assert FaultyBackend.open_count == 2
        write_faulty_model(path, "newer")
        await repository.reload(events.append)
        assert events[2].startswith("reloaded a from version ")

    run_with_repository(test, path, other, load_timeout_s=1.0)
    assert not running_children("trial_process")


def test_a_model_that_never_returns_is_an_error_at_the_start(tmp_path: Path) -> None:
    path = write_faulty_model(tmp_path / "a.faulty")
    path.with_suffix(".slow").touch()

    async def test(repository: ModelRepository) -> None:
        with pytest.raises(ModelFileError, match=r"has not run a batch of its warm-up within 0\.3 s"):
            await repository.open()
        path.with_suffix(".slow").unlink()
        async with asyncio.timeout(20):
            while FaultyBackend.open_count:  # the model is released when it returns
                await asyncio.sleep(0.01)

    run_with_repository(test, path, is_open=False, load_timeout_s=0.3)


def test_a_batch_that_never_returns_makes_the_model_fail(tmp_path: Path) -> None:
    path = write_faulty_model(tmp_path / "a.faulty")

    async def test(repository: ModelRepository) -> None:
        path.with_suffix(".slow").touch()
        with pytest.raises(DeadlineExceeded):
            await repository.get("a").infer(image(), Deadline(time.perf_counter(), 0.1), lambda: False)
        async with asyncio.timeout(20):
            while repository.state == "ready":
                await asyncio.sleep(0.01)
        assert repository.state == "failed"
        assert not await repository.recheck_failed()
        path.with_suffix(".slow").unlink()
        async with asyncio.timeout(20):
            while repository.state == "failed":
                await asyncio.sleep(0.01)
        assert await best_class(repository.get("a")) == 0

    run_with_repository(test, path, deadline_s=0.2)


def test_requests_of_the_old_version_are_answered_by_it(tmp_path: Path) -> None:
    """Both those in its queue and those whose body is still being received."""
    path = write_faulty_model(tmp_path / "a.faulty")

    async def test(repository: ModelRepository) -> None:
        old = repository.get("a")
        events: list[str] = []
        with old:
            waiting = asyncio.create_task(best_class(old))
            write_faulty_model(path, "new")
            reloading = asyncio.create_task(repository.reload(events.append))
            async with asyncio.timeout(20):
                while not events:
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            assert await waiting == 0
            assert repository.get("a") is not old
            assert not reloading.done()
            assert FaultyBackend.open_count == 2
            assert await best_class(old, (0, 0, 255)) == 2
        await reloading
        assert FaultyBackend.open_count == 1

    run_with_repository(test, path, deadline_s=5.0)


def test_a_reload_while_models_are_loading_follows(tmp_path: Path) -> None:
    path = write_faulty_model(tmp_path / "a.faulty")
    path.with_suffix(".slow").touch()

    async def test(repository: ModelRepository) -> None:
        events: list[str] = []
        opening = asyncio.create_task(repository.open())
        async with asyncio.timeout(20):
            while not FaultyBackend.open_count:
                await asyncio.sleep(0.005)
        reloading = asyncio.create_task(repository.reload(events.append))
        await asyncio.sleep(0.02)
        write_faulty_model(path, "new")
        path.with_suffix(".slow").unlink()
        await opening
        await reloading
        assert repository.get("a").model.spec.model == "new"
        assert len(events) == 1

    run_with_repository(test, path, is_open=False)


def test_a_failed_model_is_reported_and_recovers(tmp_path: Path) -> None:
    path = write_faulty_model(tmp_path / "a.faulty")
    failing = path.with_suffix(".failing")

    async def test(repository: ModelRepository) -> None:
        assert await repository.recheck_failed()
        failing.touch()
        with pytest.raises(ModelFailed, match="model a has failed: try again in a second"):
            await best_class(repository.get("a"))
        assert repository.state == "failed"
        assert not await repository.recheck_failed()
        assert repository.state == "failed"
        failing.unlink()
        assert await repository.recheck_failed()
        assert repository.state == "ready"
        assert await best_class(repository.get("a")) == 0

    run_with_repository(test, path, write_faulty_model(tmp_path / "b.faulty"))


def test_reload_replaces_a_failed_model(tmp_path: Path) -> None:
    path = write_faulty_model(tmp_path / "a.faulty")

    async def test(repository: ModelRepository) -> None:
        path.with_suffix(".failing").touch()
        with pytest.raises(ModelFailed, match="model a has failed"):
            await best_class(repository.get("a"))
        path.with_suffix(".failing").unlink()
        write_faulty_model(path, "new")
        await repository.reload(lambda _: None)
        assert repository.state == "ready"

    run_with_repository(test, path)


def test_images_that_the_model_cannot_run_on_are_invalid_input(tmp_path: Path) -> None:
    async def test(repository: ModelRepository) -> None:
        problem = r"^model a cannot run on uint8 \(1, 4, 6, 3\): send images of the shape in /v1/models$"
        for color in (POISON, BOMB):
            with pytest.raises(InvalidInput, match=problem) as invalid:
                await best_class(repository.get("a"), color)
            assert isinstance(invalid.value.__cause__, ModelFileError)
            assert repository.state == "ready"

    run_with_repository(test, write_faulty_model(tmp_path / "a.faulty"))


def test_images_that_do_not_fit_into_the_memory_are_not_invalid(tmp_path: Path) -> None:
    async def test(repository: ModelRepository) -> None:
        with pytest.raises(DeviceMemoryError, match=r"^cuda:0 is out of memory \(3.0 MiB requested\)"):
            await best_class(repository.get("a"), LARGE)
        assert repository.state == "ready"

    run_with_repository(test, write_faulty_model(tmp_path / "a.faulty"))


def test_close_answers_queued_requests(tmp_path: Path) -> None:
    path = write_faulty_model(tmp_path / "a.faulty")

    async def run() -> None:
        repository = ModelRepository(Settings(files={"a": str(path)}, device="cpu"), Metrics())
        await repository.open()
        path.with_suffix(".slow").touch()
        waiting = asyncio.create_task(best_class(repository.get("a")))
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(repository.close())
        await asyncio.sleep(0.02)
        path.with_suffix(".slow").unlink()
        assert await waiting == 0
        await closing
        assert repository.instances == []

    asyncio.run(run())
    assert FaultyBackend.open_count == 0
