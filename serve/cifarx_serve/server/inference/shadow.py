"""A second model that answers a share of the real requests of a model, without delaying them.

It runs in a process of its own that gets only the spare time of the CPUs, and only while the queue of the real model is
empty. Requests wait for it in a short queue; one that finds no room in it is left out.
"""

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.errors import CifarxError, ModelFileError, UsageError, error_message
from cifarx_serve.scores import applicable_labels
from cifarx_serve.server.inference.shadow_metrics import ShadowObservation
from cifarx_serve.server.inference.shadow_process import OPENED, ShadowReply, ShadowRequest, ShadowStart
from cifarx_serve.server.settings import Settings
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.worker_process import WorkerExited, WorkerProcess, start_module

_PROGRAM: Final = "cifarx_serve.server.inference.shadow_process"

_MAX_WAITING: Final = 16
_MAX_WAITING_BYTES: Final = 8 << 20
"""The limits of the queue, in requests and in bytes of images."""

_IDLE_POLL_S: Final = 0.005
_RESTART_DELAY_S: Final = 5.0
"""How long to wait before the process is started again after it has failed."""


class _Sample(NamedTuple):
    images: NDArray[Any]
    outputs: NDArray[np.float32]
    spec: ModelSpec


class Shadow:
    """The shadow of a model in one worker. Create and use it in one event loop.

    Args:
        key: the key of the model.
        path: the file of the shadow.
        settings: the settings of the server, with the share of the requests.
        observe: called in the event loop for each request that was chosen.
        is_idle: returns whether the model has nothing to do.
        on_event: called in a thread with a line of text if the shadow cannot be opened or fails.
    """

    def __init__(
        self,
        key: str,
        path: str,
        settings: Settings,
        observe: Callable[[ShadowObservation], None],
        is_idle: Callable[[], bool],
        on_event: Callable[[str], None],
    ) -> None:
        self._start = ShadowStart(key, msgspec.structs.replace(settings, files={key: path}))
        self._share = settings.shadow_share
        self._observe = observe
        self._is_idle = is_idle
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._samples: SimpleQueue[_Sample | None] = SimpleQueue()
        self._waiting = 0
        self._waiting_bytes = 0
        self._process: WorkerProcess | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()  # for the start of the process in the thread, and its end from the event loop
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, images: NDArray[Any], outputs: NDArray[np.float32], spec: ModelSpec) -> None:
        """Let the shadow answer a request too, if it is chosen and there is room for it. Nothing is waited for.

        Args:
            images: the images, as `ServedModel.run` takes them. They must not change afterwards.
            outputs: what the model returned for them.
            spec: the spec of the model. A reload can change it.
        """
        if random.random() >= self._share:
            return
        if self._waiting >= _MAX_WAITING or self._waiting_bytes + images.nbytes > _MAX_WAITING_BYTES:
            self._observe(ShadowObservation("dropped"))
            return
        self._waiting += 1
        self._waiting_bytes += images.nbytes
        self._samples.put(_Sample(images, outputs, spec))

    def restart(self) -> None:
        """Open the file again, once the requests that wait are answered."""
        self._samples.put(None)

    def close(self) -> None:
        """End the process; requests that wait are left out."""
        self._closed.set()
        self._samples.put(None)
        with self._lock:
            if self._process is not None:
                self._process.stop()

    def _work(self) -> None:
        """Answer requests in the thread, until the shadow is closed."""
        while not self._closed.is_set():
            try:
                self._open()
                self._answer_all()
            except (CifarxError, WorkerExited, OSError) as error:
                self._end_process()
                if not self._closed.is_set():
                    reason = error_message(error) if isinstance(error, OSError) else str(error)
                    self._on_event(f"the shadow of {self._start.key} has failed: {reason}")
                    self._closed.wait(_RESTART_DELAY_S)
            else:
                self._end_process()

    def _end_process(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _open(self) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            self._process = start_module(_PROGRAM, self._start.settings.threads)
        self._process.send(msgspec.json.encode(self._start))
        if (line := self._process.readline()) != OPENED:
            raise ModelFileError(*msgspec.json.decode(line, type=tuple[str, str]))

    def _answer_all(self) -> None:
        """Answer requests until the shadow is closed or restarted."""
        while (sample := self._samples.get()) is not None and not self._closed.is_set():
            while not (self._is_idle() or self._closed.is_set()):
                time.sleep(_IDLE_POLL_S)
            observation = ShadowObservation("failed")
            try:
                observation = self._answer(sample)
            finally:
                self._report(sample, observation)

    def _answer(self, sample: _Sample) -> ShadowObservation:
        assert self._process is not None
        images = sample.images
        header = ShadowRequest(images.dtype.str, images.shape)
        self._process.send(msgspec.json.encode(header), np.ascontiguousarray(images).tobytes())
        reply = msgspec.json.decode(self._process.readline(), type=ShadowReply)
        if reply.error is not None:
            return ShadowObservation("failed")
        labels = np.frombuffer(self._process.read(math.prod(reply.shape)), np.bool_).reshape(reply.shape)
        expected = applicable_labels(sample.outputs, sample.spec)
        if labels.shape != expected.shape:
            return ShadowObservation("failed")
        agree = (labels == expected).all(axis=1)
        return ShadowObservation("answered", len(agree), int(agree.sum()), reply.compute_s)

    def _report(self, sample: _Sample, observation: ShadowObservation) -> None:
        def report() -> None:
            self._waiting -= 1
            self._waiting_bytes -= sample.images.nbytes
            self._observe(observation)

        try:
            self._loop.call_soon_threadsafe(report)
        except RuntimeError:  # the event loop is closed
            return


def require_comparable(key: str, spec: ModelSpec, path: str, shadow: ModelSpec) -> None:
    """Check that a shadow can answer the requests of a model, and that its answers can be compared.

    Args:
        key: the key of the model.
        spec: its spec.
        path: the file of the shadow.
        shadow: the spec of the shadow.

    Raises:
        UsageError: the shadow has other classes, or takes another input.
    """
    for name, ours, theirs in (
        ("classes", spec.class_names, shadow.class_names),
        ("outputs", (spec.output_size, spec.multi_label), (shadow.output_size, shadow.multi_label)),
        ("an input", (spec.input, spec.embedded_preprocessing), (shadow.input, shadow.embedded_preprocessing)),
    ):
        if ours != theirs:
            problem = f"the shadow {path} has {name} that {key} does not have"
            raise UsageError(problem, "give a model with the same classes and preprocessing")
