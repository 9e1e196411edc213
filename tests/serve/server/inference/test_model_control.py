"""Requests of one worker to load and unload models; `test_model_updates` has the supervisor's side."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cifarx_serve.server.inference.errors import ModelControlError
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model_control import ModelControl
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.model_changes import ChangeReply, ChangeRequest
from cifarx_serve.server.settings import ModelControlMode, Settings
from tests.support.color_model import write_onnx


def run_with_control(
    test: Callable[[ModelControl, list[ChangeRequest]], Awaitable[None]],
    directory: Path | None,
    mode: ModelControlMode = "explicit",
    is_connected: bool = True,
) -> None:
    async def run() -> None:
        files: dict[str, str] = {}
        if directory:
            files = {"lzh@1": str(write_onnx(directory / "lzh@1.onnx"))}
        settings = Settings(files=files, model_repository=str(directory) if directory else None, model_control=mode)
        repository = ModelRepository(settings, Metrics())
        await repository.open()
        control, sent = ModelControl(repository), list[ChangeRequest]()
        if is_connected:
            control.connect(sent.append)
        try:
            async with asyncio.timeout(20):
                await test(control, sent)
        finally:
            await repository.close()

    asyncio.run(run())


async def until_sent(sent: list[ChangeRequest], count: int) -> None:
    while len(sent) < count:
        await asyncio.sleep(0)


def test_a_request_waits_for_its_own_reply(tmp_path: Path) -> None:
    async def test(control: ModelControl, sent: list[ChangeRequest]) -> None:
        loading = asyncio.create_task(control.change("load", "a"))
        unloading = asyncio.create_task(control.change("unload", "b"))
        await until_sent(sent, 2)
        assert [(request.action, request.model) for request in sent] == [("load", "a"), ("unload", "b")]
        control.on_reply(ChangeReply(sent[1].id, None))
        await unloading
        assert not loading.done()
        control.on_reply(ChangeReply(sent[0].id, ("it is broken", "export it again")))
        with pytest.raises(ModelControlError, match=r"^it is broken: export it again$"):
            await loading
        control.on_reply(ChangeReply(sent[0].id, None))  # a late reply has no effect

    run_with_control(test, tmp_path)


def test_a_request_that_is_given_up_is_forgotten(tmp_path: Path) -> None:
    async def test(control: ModelControl, sent: list[ChangeRequest]) -> None:
        loading = asyncio.create_task(control.change("load", "a"))
        await until_sent(sent, 1)
        loading.cancel()
        await asyncio.wait([loading])
        control.on_reply(ChangeReply(sent[0].id, None))

    run_with_control(test, tmp_path)


@pytest.mark.parametrize(
    ("has_directory", "mode", "is_connected", "message"),
    [
        (False, "none", True, "cannot load models: the server has no model repository: start it with"),
        (
            True,
            "none",
            True,
            "the server was started with --model-control none: start it with --model-",
        ),
        (True, "poll", True, "the server was started with --model-control poll"),
        (True, "explicit", False, "the server has no model repository"),
    ],
)
def test_models_are_changed_only_if_the_server_allows_it(
    tmp_path: Path, has_directory: bool, mode: ModelControlMode, is_connected: bool, message: str
) -> None:
    async def test(control: ModelControl, sent: list[ChangeRequest]) -> None:
        with pytest.raises(ModelControlError, match=message):
            await control.change("load", "a")
        assert not sent

    run_with_control(test, tmp_path if has_directory else None, mode, is_connected)


def test_a_long_name_is_not_sent(tmp_path: Path) -> None:
    async def test(control: ModelControl, sent: list[ChangeRequest]) -> None:
        with pytest.raises(ModelControlError, match=r"unknown model 'aaa.*names have at most 255 characters"):
            await control.change("load", "a" * 100_000)
        assert not sent

    run_with_control(test, tmp_path)


def test_the_index_has_models_that_are_not_loaded(tmp_path: Path) -> None:
    write_onnx(tmp_path / "other.onnx")
    (tmp_path / "lzh" / "2").mkdir(parents=True)

    async def test(control: ModelControl, _sent: list[ChangeRequest]) -> None:
        entries = await control.index()
        assert [(entry.name, entry.version, entry.state) for entry in entries] == [
            ("lzh", "1", "READY"),
            ("other", "", "UNAVAILABLE"),
        ]
        assert [entry.name for entry in await control.index(only_ready=True)] == ["lzh"]
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "1").mkdir()
        with pytest.raises(ModelControlError, match="have the same name: rename one of them"):
            await control.index()

    run_with_control(test, tmp_path)
