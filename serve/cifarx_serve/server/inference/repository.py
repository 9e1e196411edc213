"""The models that a worker serves, each with its queue; opened, replaced and closed while requests come."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, Final, Literal, Self, TypeAlias

from numpy.typing import NDArray

from cifarx_serve.errors import CifarxError, unknown
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.request import Request
from cifarx_serve.server.inference.batcher import Answer, Batcher
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model import ServedModel, file_version
from cifarx_serve.server.settings import Settings

State: TypeAlias = Literal["starting", "ready", "draining", "failed"]

_LOOK_S: Final = 0.02

_AT_ONCE_S: Final = 5e-3
"""Other requests are not read for so long; by default Python lets a thread have the interpreter for as long."""


class ModelInstance:
    """One version of a model, and the requests that wait for it; a context manager around what asks it.

    It is not given back while something is inside: a body that takes its time to arrive is still answered.
    """

    def __init__(self, model: ServedModel, settings: Settings, metrics: Metrics) -> None:
        limits = settings.limits
        self.model = model
        self._users = 0
        self._batcher = Batcher(
            model.run,
            limits.max_batch,
            limits.max_delay_us / 1e6,
            limits.max_queue,
            limits.deadline_s,
            metrics.of_model(model.name),
            _AT_ONCE_S if model.is_steady and settings.threads == 1 else 0.0,
        )

    def __enter__(self) -> Self:
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1

    def require_room(self, count: int) -> None:
        """Raises RequestError (503) where so many images could not be queued now."""
        self._batcher.require_room(count)

    async def answer(self, images: NDArray[Any], request: Request) -> Answer:
        """The logits of a request's images.

        Raises:
            RequestError: the queue is full, the deadline has passed, or the model cannot run on them.
            ClientDisconnect: nobody waits for them any more.
        """
        try:
            return await self._batcher.submit(images, request.arrived, request.is_disconnected)
        except RequestError:
            raise
        except CifarxError as error:
            if self.model.failed:
                problem = f"model {self.model.name} has failed"
                raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, problem, "try again in a second") from error
            # Not the error's own words: they name the file, and are for who runs the server.
            problem = f"model {self.model.name} does not run on {images.dtype} {images.shape}"
            raise RequestError(HTTPStatus.BAD_REQUEST, problem, "send other images") from error

    async def probe(self) -> None:
        """Try a model that has failed once more; what it answers is kept by the model."""
        try:
            await self._batcher.submit(self.model.grey_image(), time.perf_counter(), lambda: False)
        except CifarxError:
            return

    async def retire(self) -> None:
        """Once who asked it is answered, give back what it holds."""
        while self._users or not self._batcher.idle:
            await asyncio.sleep(_LOOK_S)
        self._batcher.close()
        self.model.close()


class ModelRepository:
    """All models of a worker.

    `awaits_others` says that the server is not whole yet: another worker, which a client may meet next, is not ready.

    Args:
        settings: the files and their limits.
        metrics: counts what the models do.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.draining = False
        self.awaits_others = False
        self._metrics = metrics
        self._servings: dict[str, ModelInstance] = {}
        self._swapping = asyncio.Lock()

    @property
    def state(self) -> State:
        """What `/readyz` says."""
        if self.draining:
            return "draining"
        if self.awaits_others or len(self._servings) < len(self.settings.files):
            return "starting"
        return "failed" if any(serving.model.failed for serving in self._servings.values()) else "ready"

    @property
    def servings(self) -> list[ModelInstance]:
        """In the order of the files; fewer while the models are being opened."""
        return [self._servings[name] for name in self.settings.files if name in self._servings]

    def serving(self, name: str | None) -> ModelInstance:
        """The model of that name, or the first.

        Raises:
            RequestError: there is none (404), or it is not yet open (503).
        """
        files = self.settings.files
        name = next(iter(files)) if name is None else name
        if serving := self._servings.get(name):
            return serving
        if name in files:
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, f"model {name} is being opened", "try again in a second")
        error = unknown("model", name[:80], files)
        raise RequestError(HTTPStatus.NOT_FOUND, error.problem, error.remedy)

    async def open(self) -> None:
        """Open every model, one after the other, while the loop goes on.

        Raises:
            CifarxError: one cannot be opened.
        """
        async with self._swapping:  # who asks for new versions meanwhile gets them after
            for name in self.settings.files:
                self._servings[name] = await self._open(name)

    async def swap(self, told: Callable[[str], None]) -> None:
        """Take new versions of the files into service, those that open, check and answer; the others stay as they are.

        Requests that wait are answered by the version that they came to.
        """
        async with self._swapping:
            for name in self.settings.files:
                try:
                    if await asyncio.to_thread(file_version, self.settings.files[name]) == self._version(name):
                        continue
                    new = await self._open(name)
                except CifarxError as error:
                    told(f"kept {name} {self._version(name)}: {error}")
                    continue
                old, self._servings[name] = self._servings[name], new
                told(f"swapped {name} from {old.model.version} to {new.model.version}")
                await old.retire()

    async def probe(self) -> bool:
        """Try those that have failed once more; whether none is left."""
        for serving in self.servings:
            if serving.model.failed:
                await serving.probe()
        return not any(serving.model.failed for serving in self.servings)

    async def close(self) -> None:
        """Give back what the models hold."""
        for serving in self.servings:
            await serving.retire()
        self._servings.clear()

    def _version(self, name: str) -> str:
        return self._servings[name].model.version

    async def _open(self, name: str) -> ModelInstance:
        settings = self.settings
        # A thread that ends with the model's opening: a library may leave some of its memory to the thread.
        pool = ThreadPoolExecutor(1, "open")
        try:
            model = await asyncio.get_running_loop().run_in_executor(
                pool,
                ServedModel,
                name,
                settings.files[name],
                settings.backend,
                settings.device,
                settings.limits.max_batch,
            )
        finally:
            pool.shutdown(wait=False)  # a server that is told to end meanwhile does not wait for the model
        return ModelInstance(model, settings, self._metrics)
