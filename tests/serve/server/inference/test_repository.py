import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_serve.errors import ModelFileError
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.request import Message, Request
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.repository import ModelInstance, ModelRepository
from cifarx_serve.server.settings import Limits, Settings
from tests.support.asked import application
from tests.support.color_model import write_onnx
from tests.support.planted_backend import BOMB, POISON, PlantedBackend, plant, write_planted


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)


def request() -> Request:
    async def receive() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    return Request(scope, receive, Limits(), BodyBudget(1 << 20))


def image(colour: tuple[int, int, int] = (255, 0, 0)) -> NDArray[np.uint8]:
    return np.full((1, 4, 6, 3), colour, np.uint8)


def with_service(
    test: Callable[[ModelRepository], Awaitable[None]], *paths: Path, is_open: bool = True, **limits: Any
) -> None:
    """Run a test with a service of these files; what it opened is closed at the end."""

    async def run() -> None:
        files = {path.stem: path for path in paths}
        async with application(files, Limits(max_batch=2, **limits), open_models=is_open) as client:
            await test(client.service)

    asyncio.run(run())
    assert PlantedBackend.opened == 0


async def best(serving: ModelInstance, colour: tuple[int, int, int] = (255, 0, 0)) -> int:
    answer = await serving.answer(image(colour), request())
    return int(answer.logits[0].argmax())


def test_models_are_opened_in_order_and_found_by_name(tmp_path: Path) -> None:
    async def test(service: ModelRepository) -> None:
        assert service.state == "ready"
        assert [serving.model.name for serving in service.servings] == ["b", "a"]
        assert service.serving(None).model.name == "b"
        assert service.serving("a").model.name == "a"
        assert await best(service.serving("a"), (0, 255, 0)) == 1
        with pytest.raises(RequestError, match=r"unknown model 'aa': did you mean 'a'\? known are a, b") as absent:
            service.serving("aa")
        assert absent.value.status == HTTPStatus.NOT_FOUND

    with_service(test, write_onnx(tmp_path / "b.onnx"), write_planted(tmp_path / "a.planted"))


def test_before_its_models_are_open_it_is_starting(tmp_path: Path) -> None:
    async def test(service: ModelRepository) -> None:
        assert service.state == "starting"
        with pytest.raises(RequestError, match="model a is being opened: try again in a second") as early:
            service.serving("a")
        assert early.value.status == HTTPStatus.SERVICE_UNAVAILABLE
        slow = tmp_path / "b.slow"
        slow.touch()
        opening = asyncio.create_task(service.open())
        async with asyncio.timeout(20):
            while not service.servings:
                await asyncio.sleep(0.005)
        assert service.state == "starting"
        assert await best(service.serving("a")) == 0
        slow.unlink()
        await opening
        assert service.state == "ready"

    with_service(test, write_planted(tmp_path / "a.planted"), write_planted(tmp_path / "b.planted"), is_open=False)


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    path = write_planted(tmp_path / "a.planted")
    path.write_text("{}")

    async def test(service: ModelRepository) -> None:
        with pytest.raises(Exception, match="malformed model spec"):
            await service.open()

    with_service(test, path, is_open=False)


def test_while_it_drains_it_says_so(tmp_path: Path) -> None:
    async def test(service: ModelRepository) -> None:
        service.draining = True
        assert service.state == "draining"

    with_service(test, write_planted(tmp_path / "a.planted"))


def test_a_new_version_is_taken_into_service(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "a.onnx")

    async def test(service: ModelRepository) -> None:
        before = service.serving("a").model.version
        told: list[str] = []
        write_onnx(path, order=(2, 1, 0))
        assert await best(service.serving("a")) == 0
        await service.swap(told.append)
        after = service.serving("a").model.version
        assert told == [f"swapped a from {before} to {after}"]
        assert before != after
        assert await best(service.serving("a")) == 2
        await service.swap(told.append)
        assert len(told) == 1

    with_service(test, path)


@pytest.mark.parametrize("kind", ["broken", "foreign", "empty", "absent", "failing"])
def test_a_file_that_does_not_open_leaves_the_old_in_service(tmp_path: Path, kind: str) -> None:
    path = write_planted(tmp_path / "a.planted")
    other = write_planted(tmp_path / "b.planted")
    contents = {"broken": path.read_bytes()[:-9], "foreign": b"\x89PNG\r\n\x1a\n", "empty": b""}

    async def test(service: ModelRepository) -> None:
        version = service.serving("a").model.version
        told: list[str] = []
        if kind == "absent":
            path.unlink()
        elif kind == "failing":
            write_planted(path, "new")
            path.with_suffix(".failing").touch()
        else:
            path.write_bytes(contents[kind])
        write_planted(other, "new")
        await service.swap(told.append)
        path.with_suffix(".failing").unlink(missing_ok=True)
        assert told[0].startswith(f"kept a {version}: ")
        assert told[1].startswith("swapped b from ")
        assert service.serving("a").model.version == version
        assert service.state == "ready"
        assert await best(service.serving("a")) == 0
        assert PlantedBackend.opened == 2

    with_service(test, path, other)


def test_who_came_to_the_old_version_is_answered_by_it(tmp_path: Path) -> None:
    """Whether the images wait for the model, or are still being sent."""
    path = write_planted(tmp_path / "a.planted")

    async def test(service: ModelRepository) -> None:
        old = service.serving("a")
        told: list[str] = []
        with old:
            waiting = asyncio.create_task(best(old))
            write_planted(path, "new")
            swapping = asyncio.create_task(service.swap(told.append))
            async with asyncio.timeout(20):
                while not told:
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            assert await waiting == 0
            assert service.serving("a") is not old
            assert not swapping.done()
            assert PlantedBackend.opened == 2
            assert await best(old, (0, 0, 255)) == 2
        await swapping
        assert PlantedBackend.opened == 1

    with_service(test, path, deadline_s=5.0)


def test_versions_asked_for_while_the_models_are_opened_are_taken_after(tmp_path: Path) -> None:
    path = write_planted(tmp_path / "a.planted")
    path.with_suffix(".slow").touch()

    async def test(service: ModelRepository) -> None:
        told: list[str] = []
        opening = asyncio.create_task(service.open())
        async with asyncio.timeout(20):
            while not PlantedBackend.opened:
                await asyncio.sleep(0.005)
        swapping = asyncio.create_task(service.swap(told.append))
        await asyncio.sleep(0.02)
        write_planted(path, "new")
        path.with_suffix(".slow").unlink()
        await opening
        await swapping
        assert service.serving("a").model.spec.model == "new"
        assert len(told) == 1

    with_service(test, path, is_open=False)


def test_a_model_that_fails_is_told_and_found_well_again(tmp_path: Path) -> None:
    path = write_planted(tmp_path / "a.planted")
    failing = path.with_suffix(".failing")

    async def test(service: ModelRepository) -> None:
        assert await service.probe()
        failing.touch()
        with pytest.raises(RequestError, match="model a has failed: try again in a second") as failed:
            await best(service.serving("a"))
        assert failed.value.status == HTTPStatus.SERVICE_UNAVAILABLE
        assert service.state == "failed"
        assert not await service.probe()
        assert service.state == "failed"
        failing.unlink()
        assert await service.probe()
        assert service.state == "ready"
        assert await best(service.serving("a")) == 0

    with_service(test, path, write_planted(tmp_path / "b.planted"))


def test_a_new_version_replaces_one_that_failed(tmp_path: Path) -> None:
    path = write_planted(tmp_path / "a.planted")

    async def test(service: ModelRepository) -> None:
        path.with_suffix(".failing").touch()
        with pytest.raises(RequestError, match="has failed"):
            await best(service.serving("a"))
        path.with_suffix(".failing").unlink()
        write_planted(path, "new")
        await service.swap(lambda _: None)
        assert service.state == "ready"

    with_service(test, path)


def test_images_that_the_model_does_not_take_are_the_clients_to_mend(tmp_path: Path) -> None:
    async def test(service: ModelRepository) -> None:
        problem = r"^model a does not run on uint8 \(1, 4, 6, 3\): send other images$"
        for colour in (POISON, BOMB):
            with pytest.raises(RequestError, match=problem) as refused:
                await best(service.serving("a"), colour)
            assert refused.value.status == HTTPStatus.BAD_REQUEST
            assert isinstance(refused.value.__cause__, ModelFileError)
            assert service.state == "ready"

    with_service(test, write_planted(tmp_path / "a.planted"))


def test_closing_answers_what_waits(tmp_path: Path) -> None:
    path = write_planted(tmp_path / "a.planted")

    async def run() -> None:
        service = ModelRepository(Settings(files={"a": str(path)}, device="cpu"), Metrics())
        await service.open()
        path.with_suffix(".slow").touch()
        waiting = asyncio.create_task(best(service.serving("a")))
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(service.close())
        await asyncio.sleep(0.02)
        path.with_suffix(".slow").unlink()
        assert await waiting == 0
        await closing
        assert service.servings == []

    asyncio.run(run())
    assert PlantedBackend.opened == 0
