"""The models that a worker serves, each with its queue; loaded, reloaded and closed while requests arrive."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Self, TypeAlias

import msgspec
from numpy.typing import NDArray

from cifarx_serve.errors import CifarxError, DeviceMemoryError, unknown_name_error
from cifarx_serve.server.inference.batcher import Batcher, BatchEvent, InferenceResult
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.errors import (
    InferenceError,
    InvalidInput,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
    RequestCancelled,
)
from cifarx_serve.server.inference.loading import load_model, try_model
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model import ServedModel, file_version
from cifarx_serve.server.inference.shadow import Shadow
from cifarx_serve.server.model_files import latest_keys, parse_key
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
        self.shadow: Shadow | None = None
        self._users = 0
        self._limits = limits
        self._observe_failure = metrics.failure_observer(model.key)
        observe_batch = metrics.batch_observer(model.key)
        observe_predictions = metrics.prediction_observer(model.key, model.spec)

        def on_batch(event: BatchEvent) -> None:
            observe_batch(event)
            observe_predictions(event)

        self._batcher = Batcher(
            model.run,
            limits.max_batch,
            limits.max_delay_us / 1e6,
            limits.max_queue,
            on_batch,
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
            result = await self._batcher.submit(images, deadline, is_disconnected)
        except (InferenceError, RequestCancelled):
            self._observe_failure(time.perf_counter() - deadline.started_at)
            raise
        except CifarxError as error:
            self._observe_failure(time.perf_counter() - deadline.started_at)
            if self.model.failed:
                raise ModelFailed(f"model {self.model.name} has failed", "try again in a second") from error
            if isinstance(error, DeviceMemoryError):
                raise
            # Not the message of the error: it names the file, which clients should not see.
            problem = f"model {self.model.name} cannot run on {images.dtype} {images.shape}"
            raise InvalidInput(problem, "send images of the shape in /v1/models") from error
        if self.shadow is not None:
            self.shadow.offer(images, result.values, self.model.spec)
        return result

    @property
    def is_idle(self) -> bool:
        """Whether the model has nothing to do. Any thread may ask for it."""
        return self._batcher.is_idle

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
        self._by_name: dict[str, ModelInstance] = {}
        self._default_name = _first_name(settings)
        self._shadows: dict[str, Shadow] = {}
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
        return [self._instances[key] for key in self.settings.files if key in self._instances]

    def get(self, name: str | None = None, version: str | None = None) -> ModelInstance:
        """Return a model.

        Args:
            name: the name it is served under, or NAME@2 for version 2; by default the first one. Without a version, it
                is the latest one.
            version: the number of a version, or the start of the SHA-256 of its file.

        Raises:
            ModelNotFound: there is no such model, or it has no such version.
            ModelNotReady: it is not loaded yet.
        """
        if name is None:
            name = self._default_name
        instance = self._by_name.get(name)
        if instance is None:
            raise self._missing(name)
        return instance if version is None else self._of_version(instance, name, version)

    def _missing(self, name: str) -> CifarxError:
        files = self.settings.files
        names = latest_keys(files)
        if name in files or name in names:
            return ModelNotReady(f"model {name} is still loading", "try again in a second")
        if not files:
            return ModelNotFound("no model is loaded", "load one of the model repository")
        error = unknown_name_error("model", name[:80], names)
        return ModelNotFound(error.problem, error.remedy)

    def _of_version(self, instance: ModelInstance, name: str, version: str) -> ModelInstance:
        versions = self.versions(name) if name == instance.model.name else [instance]
        for candidate in versions:
            if candidate.model.has_version(version):
                return candidate
        known = ", ".join(candidate.model.protocol_version for candidate in versions)
        problem = f"model {name} has no version {version[:80]!r}"
        raise ModelNotFound(problem, f"its version is {known}" if len(versions) == 1 else f"its versions are {known}")

    def versions(self, name: str) -> list[ModelInstance]:
        """Return the loaded versions of a model, in ascending order."""
        found = [instance for instance in self._instances.values() if instance.model.name == name]
        return sorted(found, key=lambda instance: instance.model.number or 0)

    async def open(self, on_event: Callable[[str], None] = lambda _event: None) -> None:
        """Load the models, one after the other, without blocking the event loop.

        Args:
            on_event: called in any thread with a line of text when a shadow fails.

        Raises:
            CifarxError: a model cannot be loaded.
        """
        async with self._lock:  # an update that is requested meanwhile follows
            for key in self.settings.files:
                self._instances[key] = await self._load(key, self.settings)
                self._index()
            for key, path in self.settings.shadows.items():
                self._shadows[key] = self._create_shadow(key, path, on_event)
                self._instances[key].shadow = self._shadows[key]

    async def reload(self, on_event: Callable[[str], None]) -> None:
        """Update the models whose file has changed, as `update` does, and open the files of all shadows again."""
        async with self._lock:
            await self._update(self.settings.files, on_event)
            for shadow in self._shadows.values():
                shadow.restart()

    async def update(self, files: Mapping[str, str], on_event: Callable[[str], None]) -> dict[str, str]:
        """Serve these files: load those that are new, replace those that have changed, and unload the others.

        A new version must load, verify and run; otherwise the old one is kept. Requests that are queued for an old
        version are answered by it.

        Args:
            files: the paths of the files by key.
            on_event: called with a line of text for each model that was loaded, replaced, kept or unloaded.

        Returns:
            Why a model could not be loaded, by its key.
        """
        async with self._lock:
            return await self._update(files, on_event)

    async def _update(self, files: Mapping[str, str], on_event: Callable[[str], None]) -> dict[str, str]:
        errors: dict[str, str] = {}
        for key in files:
            try:
                await self._load_changed(key, files, on_event)
            except CifarxError as error:
                errors[key] = str(error)
                old = self._instances.get(key)
                outcome = f"kept {key} at version {old.model.version}" if old else f"did not load {key}"
                on_event(f"{outcome}: {error}")
        unloaded = [self._instances.pop(key) for key in list(self._instances) if key not in files]
        loaded = {key: path for key, path in files.items() if key in self._instances}
        self.settings = msgspec.structs.replace(self.settings, files=loaded)
        self._index()
        for instance in unloaded:
            on_event(f"unloaded {instance.model.key}")
            await instance.drain()
        return errors

    async def _load_changed(self, key: str, files: Mapping[str, str], on_event: Callable[[str], None]) -> None:
        """Load a model that is new, or whose file is not the one that is served."""
        old = self._instances.get(key)
        if old is not None and await asyncio.to_thread(file_version, files[key]) == old.model.version:
            return
        settings = msgspec.structs.replace(self.settings, files=dict(files))
        await try_model(key, settings)
        new = self._instances[key] = await self._load(key, settings)
        if old is None:
            on_event(f"loaded {key} at version {new.model.version}")
            return
        self._index()
        on_event(f"reloaded {key} from version {old.model.version} to {new.model.version}")
        await old.drain()

    async def recheck_failed(self) -> bool:
        """Run the models that have failed once more, and return whether all models work."""
        for instance in self.instances:
            if instance.failed:
                await instance.recheck()
        return not any(instance.failed for instance in self.instances)

    async def close(self) -> None:
        """Drain and close all models."""
        for shadow in self._shadows.values():
            shadow.close()
        for instance in self.instances:
            await instance.drain()
        self._instances.clear()
        self._by_name.clear()

    def _index(self) -> None:
        """Find the models by name, which is that of their latest version, and by key."""
        latest = latest_keys([*self.settings.files, *self._instances])
        by_name = {name: self._instances[key] for name, key in latest.items() if key in self._instances}
        self._by_name = self._instances | by_name
        self._default_name = _first_name(self.settings)

    async def _load(self, key: str, settings: Settings) -> ModelInstance:
        instance = ModelInstance(await load_model(key, settings), settings, self._metrics)
        instance.shadow = self._shadows.get(key)
        return instance

    def _create_shadow(self, key: str, path: str, on_event: Callable[[str], None]) -> Shadow:
        def is_idle() -> bool:
            instance = self._instances.get(key)
            return instance is not None and instance.is_idle

        return Shadow(key, path, self.settings, self._metrics.shadow_observer(key), is_idle, on_event)


def _first_name(settings: Settings) -> str:
    """Return the name of the first model; empty if there is none."""
    return parse_key(next(iter(settings.files), "")).name
