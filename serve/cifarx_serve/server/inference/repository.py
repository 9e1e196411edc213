"""The models that a worker serves, each with its queue; loaded, reloaded and closed while requests arrive."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Literal, Self, TypeAlias

from numpy.typing import NDArray

from cifarx_serve.errors import CifarxError, DeviceMemoryError, unknown_name_error
from cifarx_serve.server.inference.batcher import Batcher, InferenceResult
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.errors import (
    InferenceError,
    InvalidInput,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
)
from cifarx_serve.server.inference.loading import load_model, try_model
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model import ServedModel, file_version
from cifarx_serve.server.settings import Settings

ModelState: TypeAlias = Literal["starting", "ready", "draining", "failed"]

_DRAIN_POLL_S: Final = 0.02

_STUCK_FACTOR: Final = 2
"""A batch that has run for this many deadlines may never end: no request waits for it any more."""

_INLINE_LIMIT_S: Final = 5e-3
"""How long the event loop may run a model itself: as long as a Python thread may hold the interpreter by default."""


class ModelInstance:
    """One version of a model with its queue.

    It is a context manager for the handlers of requests: while any of them is inside it is not closed, so a request
    that came before a reload is answered even if its body is slow to arrive.
    """

    def __init__(self, model: ServedModel, settings: Settings, metrics: Metrics) -> None:
        limits = settings.limits
        self.model = model
        self._users = 0
        self._limits = limits
        self._batcher = Batcher(
            model.run,
            limits.max_batch,
            limits.max_delay_us / 1e6,
            limits.max_queue,
            metrics.batch_observer(model.name),
            _INLINE_LIMIT_S if model.has_predictable_latency and settings.threads == 1 else 0.0,
        )

    def __enter__(self) -> Self:
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1

    def require_capacity(self, count: int) -> None:
        """Raise QueueFull if `count` more images do not fit into the queue now."""
        self._batcher.require_capacity(count)

    async def infer(
        self, images: NDArray[Any], deadline: Deadline, is_disconnected: Callable[[], bool]
    ) -> InferenceResult:
        """Run the model on the images of one request, batched with those of other requests.

        Args:
            images: (N, ...), as `ServedModel.run` takes them.
            deadline: when the request must be answered.
            is_disconnected: returns whether the client has disconnected.

        Raises:
            QueueFull: the queue has no capacity for the images.
            DeadlineExceeded: the deadline has passed.
            InvalidInput: the model cannot run on these images.
            ModelFailed: the model cannot run on any images.
            DeviceMemoryError: the device does not have enough memory for these images.
            BatcherClosed: the server is shutting down.
            RequestCancelled: the client has disconnected.
        """
        try:
            return await self._batcher.submit(images, deadline, is_disconnected)
        except InferenceError:
            raise
        except CifarxError as error:
            if self.model.failed:
                raise ModelFailed(f"model {self.model.name} has failed", "try again in a second") from error
            if isinstance(error, DeviceMemoryError):
                raise
            # Not the message of the error: it names the file, which clients should not see.
            problem = f"model {self.model.name} cannot run on {images.dtype} {images.shape}"
            raise InvalidInput(problem, "send images of the shape in /v1/models") from error

    async def recheck(self) -> None:
        """Run the model on a gray image, which clears `model.failed` if it succeeds."""
        deadline = Deadline(time.perf_counter(), self._limits.deadline_s)
        try:
            await self._batcher.submit(self.model.gray_images(), deadline, lambda: False)
        except CifarxError:
            return

    @property
    def failed(self) -> bool:
        """Whether the model fails on every input, or has run one batch for longer than any request can wait."""
        return self.model.failed or self._batcher.running_s() > _STUCK_FACTOR * self._limits.deadline_s

    async def drain(self) -> None:
        """Wait until all its requests are answered, then close the model; a model that never returns is left alone."""
        limits = self._limits
        end = time.perf_counter() + limits.body_timeout_s + _STUCK_FACTOR * limits.deadline_s
        while (self._users or not self._batcher.is_idle) and time.perf_counter() < end:
            await asyncio.sleep(_DRAIN_POLL_S)
        self._batcher.close()
        if self._batcher.is_idle:
            self.model.close()


class ModelRepository:
    """All models of a worker.

    Args:
        settings: the model files and the limits.
        metrics: counts the batches.

    Attributes:
        draining: whether the worker is shutting down and should get no more requests.
        peers_starting: whether another worker, which may get a client's next request, is not ready yet.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.draining = False
        self.peers_starting = False
        self._metrics = metrics
        self._instances: dict[str, ModelInstance] = {}
        self._lock = asyncio.Lock()

    @property
    def state(self) -> ModelState:
        """The state of all models."""
        if self.draining:
            return "draining"
        if self.peers_starting or len(self._instances) < len(self.settings.files):
            return "starting"
        return "failed" if any(instance.failed for instance in self._instances.values()) else "ready"

    @property
    def instances(self) -> list[ModelInstance]:
        """The loaded models, in the order of the files."""
        return [self._instances[name] for name in self.settings.files if name in self._instances]

    def get(self, name: str | None = None, version: str | None = None) -> ModelInstance:
        """Return a model.

        Args:
            name: the name it is served under; by default the first one.
            version: the version that it must have; by default any.

        Raises:
            ModelNotFound: there is no such model, or it has another version.
            ModelNotReady: it is not loaded yet.
        """
        files = self.settings.files
        if name is None:
            name = next(iter(files))
        instance = self._instances.get(name)
        if instance is None:
            if name in files:
                raise ModelNotReady(f"model {name} is still loading", "try again in a second")
            error = unknown_name_error("model", name[:80], files)
            raise ModelNotFound(error.problem, error.remedy)
        if version is not None and version != instance.model.version:
            problem = f"model {name} has no version {version[:80]!r}"
            raise ModelNotFound(problem, f"its version is {instance.model.version}")
        return instance

    async def open(self) -> None:
        """Load the models, one after the other, without blocking the event loop.

        Raises:
            CifarxError: a model cannot be loaded.
        """
        async with self._lock:  # a reload that is requested meanwhile follows
            for name in self.settings.files:
                self._instances[name] = await self._load(name)

    async def reload(self, on_event: Callable[[str], None]) -> None:
        """Replace each model whose file has changed, if the new version loads, verifies and runs; keep it otherwise.

        Requests that are queued for the old version are answered by it.

        Args:
            on_event: called with a line of text for each model that was reloaded or had to be kept.
        """
        async with self._lock:
            for name in self.settings.files:
                try:
                    if await asyncio.to_thread(file_version, self.settings.files[name]) == self._version(name):
                        continue
                    await try_model(name, self.settings)
                    new = await self._load(name)
                except CifarxError as error:
                    on_event(f"kept {name} at version {self._version(name)}: {error}")
                    continue
                old, self._instances[name] = self._instances[name], new
                on_event(f"reloaded {name} from version {old.model.version} to {new.model.version}")
                await old.drain()

    async def recheck_failed(self) -> bool:
        """Run the models that have failed once more, and return whether all models work."""
        for instance in self.instances:
            if instance.failed:
                await instance.recheck()
        return not any(instance.failed for instance in self.instances)

    async def close(self) -> None:
        """Drain and close all models."""
        for instance in self.instances:
            await instance.drain()
        self._instances.clear()

    def _version(self, name: str) -> str:
        return self._instances[name].model.version

    async def _load(self, name: str) -> ModelInstance:
        return ModelInstance(await load_model(name, self.settings), self.settings, self._metrics)
