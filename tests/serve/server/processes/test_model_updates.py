"""Changes of the model files of all workers, with workers that the test plays itself."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cifarx_serve.server.model_changes import Action, ChangeReply, ChangeRequest
from cifarx_serve.server.processes.messages import Update, Updated
from cifarx_serve.server.processes.model_updates import ModelUpdates
from cifarx_serve.server.settings import ModelControlMode, Settings


class Workers:
    """Workers 0 and 1, which record messages; `broken` is the file that worker 1 cannot load."""

    def __init__(self, directory: Path, mode: ModelControlMode = "explicit") -> None:
        self.directory = directory
        for name in ("lzh/1/model.onnx", "lzh/2/model.onnx", "cats.onnx"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).touch()
        settings = Settings(files={"given": "/given.onnx"}, model_repository=str(directory), model_control=mode)
        self.updates = ModelUpdates(settings, self.receive, lambda: {0, 1})
        self.broken = ""
        self.silent: set[int] = set()
        self.files: dict[int, list[str]] = {0: ["given"], 1: ["given"]}
        self.replies: list[ChangeReply] = []

    def receive(self, worker: int, message: Update | ChangeReply) -> None:
        if isinstance(message, ChangeReply):
            assert worker == 1
            self.replies.append(message)
            return
        errors = {self.broken: "it is broken: export it again"} if worker == 1 and self.broken in message.files else {}
        self.files[worker] = [key for key in message.files if key not in errors]
        if worker not in self.silent:
            updated = Updated(message.number, errors)
            asyncio.get_running_loop().call_soon(self.updates.on_updated, worker, updated)

    async def change(self, action: Action, model: str) -> str | None:
        """Request a change as worker 1, and return the error of the reply."""
        await self.updates.handle(1, ChangeRequest(len(self.replies), action, model))
        reply = self.replies[-1]
        assert reply.id == len(self.replies) - 1
        return reply.error and ": ".join(reply.error)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(within_time())


def test_a_model_is_loaded_and_unloaded_with_all_versions_by_every_worker(tmp_path: Path) -> None:
    async def test() -> None:
        workers = Workers(tmp_path)
        assert await workers.change("load", "lzh") is None
        assert workers.files == {0: ["given", "lzh@1", "lzh@2"], 1: ["given", "lzh@1", "lzh@2"]}
        assert workers.updates.files["lzh@2"] == str(tmp_path / "lzh/2/model.onnx")
        assert await workers.change("load", "cats") is None
        (tmp_path / "lzh/1/model.onnx").unlink()
        assert await workers.change("load", "lzh") is None
        assert sorted(workers.files[0]) == ["cats", "given", "lzh@2"], "a version that was removed is unloaded"
        assert await workers.change("unload", "lzh") is None
        assert await workers.change("unload", "lzh") is None
        assert await workers.change("unload", "given") is None
        assert workers.files == {0: ["cats"], 1: ["cats"]}
        assert await workers.change("load", "given") is None
        assert list(workers.updates.files) == workers.files[0] == ["cats", "given"]

    run(test)


@pytest.mark.parametrize("action", ["load", "unload"])
@pytest.mark.parametrize("name", ["absent", "../lzh", "lzh@1", "/etc/passwd", ""])
def test_only_models_of_the_repository_are_loaded(tmp_path: Path, action: Action, name: str) -> None:
    async def test() -> None:
        workers = Workers(tmp_path)
        assert (await workers.change(action, name) or "").startswith(f"unknown model {name!r}")
        assert workers.files == {0: ["given"], 1: ["given"]}

    run(test)


def test_a_model_that_one_worker_cannot_load_is_unloaded_by_the_others(tmp_path: Path) -> None:
    async def test() -> None:
        workers = Workers(tmp_path)
        workers.broken = "lzh@2"
        assert await workers.change("load", "lzh") == "cannot load lzh@2: it is broken: export it again"
        assert workers.files == {0: ["given", "lzh@1"], 1: ["given", "lzh@1"]}
        assert list(workers.updates.files) == ["given", "lzh@1"], "a worker that is started later does not fail"

    run(test)


def test_a_worker_that_exits_is_not_waited_for(tmp_path: Path) -> None:
    async def test() -> None:
        workers = Workers(tmp_path)
        workers.silent = {0}
        change = asyncio.create_task(workers.change("load", "cats"))
        await asyncio.sleep(0.05)
        assert not change.done()
        assert "cats" in workers.updates.files, "the worker that replaces it loads the model at its start"
        workers.updates.on_updated(0, Updated(0, {}))
        await asyncio.sleep(0.05)
        assert not change.done(), "an earlier update does not count"
        workers.updates.on_exit(0)
        assert await change is None

    run(test)


def test_with_polling_all_files_of_the_repository_are_wanted(tmp_path: Path) -> None:
    async def test() -> None:
        workers = Workers(tmp_path / "models", "poll")
        wanted = workers.updates.wanted_files()
        assert list(wanted) == ["given", "cats", "lzh@1", "lzh@2"]
        workers.broken = "cats"
        await workers.updates.serve(wanted)
        assert workers.files == {0: ["given", "lzh@1", "lzh@2"], 1: ["given", "lzh@1", "lzh@2"]}
        workers.directory.rename(tmp_path / "moved")
        assert workers.updates.wanted_files() == workers.updates.files, "a directory that is missing changes nothing"

    run(test)
    assert list(Workers(tmp_path / "other").updates.wanted_files()) == ["given"]
