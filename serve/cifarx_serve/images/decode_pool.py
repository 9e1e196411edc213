"""Decodes many image files in worker processes, because Pillow holds the GIL for half of its work on a small file."""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.errors import ImageError
from cifarx_serve.images.decode_worker import Problems
from cifarx_serve.images.reader import ImageSource
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.worker_process import WorkerExited, WorkerProcess, start_module

Decoded: TypeAlias = "NDArray[np.uint8] | ImageError"

START_THRESHOLD: Final = 256
"""The number of files after which the pool starts its workers. Starting one takes a tenth of a second."""

_MAX_WORKERS: Final = 16
"""Each worker takes about 40 MB of memory."""

_PROGRAM: Final = "cifarx_serve.images.decode_worker"


class DecodePool:
    """A pool of worker processes that decode image files to one size. Any number of threads can use it at once.

    The workers start once enough files have been requested. The pool never blocks: see `decode`.

    Args:
        spec: the size of the decoded images, and how they are resized.
        workers: the number of workers, limited to 16. There are none if it is less than two.
    """

    def __init__(self, spec: InputSpec, workers: int) -> None:
        self._spec = spec
        self._count = min(workers, _MAX_WORKERS) if workers > 1 else 0
        self._idle: SimpleQueue[WorkerProcess] = SimpleQueue()
        self._workers: list[WorkerProcess] = []
        self._lock = threading.Lock()
        self._requested = 0

    def decode(self, sources: Sequence[ImageSource]) -> list[Decoded] | None:
        """Decode a batch of files in one of the workers.

        Returns:
            One entry per file in the given order, uint8 (height, width, channels) or an error; or None if no worker is
            idle or a source is not a path. The caller must then decode the batch itself.
        """
        if not all(isinstance(source, str | os.PathLike) for source in sources):
            return None
        with self._lock:
            before, self._requested = self._requested, self._requested + len(sources)
            if before <= START_THRESHOLD < self._requested:
                with suppress(OSError):  # no process can be started, so the callers decode everything
                    for _ in range(self._count):
                        self._workers.append(self._start_worker())
        try:
            paths = [os.fsencode(source) for source in sources]  # type: ignore[arg-type]
            worker = self._idle.get_nowait()
        except (Empty, UnicodeError):  # no file has a name that cannot be encoded
            return None
        try:
            decoded = _decode_in_worker(worker, paths, self._spec)
        except WorkerExited:  # the other workers continue
            return None
        self._idle.put(worker)
        return decoded

    def close(self) -> None:
        """Kill all workers, including those that are still starting."""
        for worker in self._workers:
            worker.kill()

    def _start_worker(self) -> WorkerProcess:
        """Start a worker that becomes idle as soon as it is ready."""
        worker = start_module(_PROGRAM, numpy_threads=1)
        worker.send(msgspec.json.encode(self._spec))

        def wait_until_ready() -> None:
            with suppress(WorkerExited, ValueError):  # it ran out of memory, or the pool is closed
                worker.readline()
                self._idle.put(worker)

        threading.Thread(target=wait_until_ready, daemon=True).start()
        return worker


def _decode_in_worker(worker: WorkerProcess, paths: list[bytes], spec: InputSpec) -> list[Decoded]:
    worker.send(msgspec.json.encode(paths))
    problems = msgspec.json.decode(worker.readline(), type=Problems)
    shape = (problems.count(None), spec.height, spec.width, spec.channels)
    pixels = iter(np.frombuffer(worker.read(int(np.prod(shape))), np.uint8).reshape(shape))
    return [next(pixels) if problem is None else ImageError(*problem) for problem in problems]
