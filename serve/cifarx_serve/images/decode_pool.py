"""Many image files decoded in processes: half of Pillow's work on a small file holds the interpreter's lock."""

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
from cifarx_serve.system.worker_process import ChildEnded, ChildProgram

Decoded: TypeAlias = "NDArray[np.uint8] | ImageError"

START: Final = 256
"""Files from which on processes are worth their start, a tenth of a second each."""

_MOST: Final = 16
"""Processes; each takes some 40 MB."""

_PROGRAM: Final = "cifarx_serve.images.decode_worker"


class DecodingProcesses:
    """Processes that decode files to one size, for any number of threads, until they are closed.

    They are started when there is enough to do. Until one is free, and for what is no path, `decode` gives None.

    Args:
        spec: the size, and the filter of the resize.
        count: how many processes, 16 at most; with fewer than two there are none.
    """

    def __init__(self, spec: InputSpec, count: int) -> None:
        self._spec = spec
        self._count = min(count, _MOST) if count > 1 else 0
        self._free: SimpleQueue[ChildProgram] = SimpleQueue()
        self._processes: list[ChildProgram] = []
        self._lock = threading.Lock()
        self._asked = 0

    def decode(self, sources: Sequence[ImageSource]) -> list[Decoded] | None:
        """The images in their order, uint8 (height, width, 3), or their errors; None where the caller is to do it."""
        if not all(isinstance(source, str | os.PathLike) for source in sources):
            return None
        with self._lock:
            before, self._asked = self._asked, self._asked + len(sources)
            if before <= START < self._asked:
                with suppress(OSError):  # no process can be started here: threads do it
                    for _ in range(self._count):
                        self._processes.append(self._start())
        try:
            process = self._free.get_nowait()
        except Empty:
            return None
        try:
            found = _ask(process, sources, self._spec)
        except ChildEnded:  # the caller does it, and the other processes go on
            return None
        self._free.put(process)
        return found

    def close(self) -> None:
        """End the processes, also those that are not ready yet."""
        for process in self._processes:
            process.kill()

    def _start(self) -> ChildProgram:
        """A process that will be free as soon as it is ready."""
        process = ChildProgram(_PROGRAM, numpy_threads=1)
        process.send(msgspec.json.encode(self._spec))

        def wait() -> None:
            with suppress(ChildEnded, ValueError):  # there was no memory for it, or it is not needed any more
                process.read_line()
                self._free.put(process)

        threading.Thread(target=wait, daemon=True).start()
        return process


def _ask(process: ChildProgram, sources: Sequence[ImageSource], spec: InputSpec) -> list[Decoded]:
    paths = [os.fsencode(source) for source in sources]  # type: ignore[arg-type]
    process.send(msgspec.json.encode(paths))
    problems = msgspec.json.decode(process.read_line(), type=Problems)
    shape = (problems.count(None), spec.height, spec.width, 3)
    pixels = iter(np.frombuffer(process.read(int(np.prod(shape))), np.uint8).reshape(shape))
    return [next(pixels) if problem is None else ImageError(*problem) for problem in problems]
