"""Decodes the images of requests in processes. Unlike a thread, a process can be killed at the deadline."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final
from weakref import finalize

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.errors import ImageError
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.server.inference.deadline import Deadline, wait_for_slot
from cifarx_serve.server.inference.decoder_process import DecodeReply, DecodeRequest
from cifarx_serve.server.inference.errors import DecoderUnavailable, RequestCancelled
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.worker_process import WorkerExited, WorkerProcess, start_module

_PROGRAM: Final = "cifarx_serve.server.inference.decoder_process"

_STUCK_S: Final = 5.0
"""How long images wait, while no process begins or finishes one, before the pool counts as stuck."""


class SlowImage(ImageError):
    """Raised for an image that takes too much CPU time to decode."""


class DecoderPool:
    """A pool of processes, each of which decodes one image at a time. Use it in one event loop.

    The processes are started when images need them. One is killed when its request misses the deadline, and kills
    itself when an image takes too much CPU time. Requests wait in the event loop rather than in a queue, so that the
    image of a request that has ended is not kept.

    Args:
        processes: the maximum number of processes.
        max_pixels: the maximum number of pixels of any image.
    """

    def __init__(self, processes: int, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._slots = asyncio.Semaphore(processes)
        self._threads = ThreadPoolExecutor(processes, "decode")
        self._idle: list[_Decoder] = []
        self._running: set[_Decoder] = set()
        self._waiting = 0
        self._last_progress = 0.0
        self._finalizer = finalize(self, _close, self._idle, self._running, self._threads)

    @property
    def is_stuck(self) -> bool:
        """Whether images wait, but no process has begun or finished one for a while."""
        return self._waiting > 0 and time.perf_counter() - self._last_progress > _STUCK_S

    async def decode(
        self, data: bytes, spec: ModelSpec, max_pixels: int, deadline: Deadline, is_disconnected: Callable[[], bool]
    ) -> NDArray[np.uint8]:
        """Decode an image file to the pixels that `model_pixels` returns. No process uses `data` afterwards.

        Raises:
            ImageError: the data is not a readable image.
            TooManyPixels: the image, or a part of it, has more than `max_pixels` pixels.
            SlowImage: the image takes too much CPU time.
            DecoderUnavailable: no process can be started.
            DeadlineExceeded: the deadline has passed, and the process was killed.
            RequestCancelled: the client has disconnected.
        """
        self._waiting += 1
        try:
            await wait_for_slot(self._slots, deadline)
        finally:
            self._waiting -= 1
        self._last_progress = time.perf_counter()
        try:
            if is_disconnected():
                raise RequestCancelled
            return await self._decode(data, spec, max_pixels, deadline)
        finally:
            self._last_progress = time.perf_counter()
            self._slots.release()

    def close(self) -> None:
        """Kill all processes."""
        self._finalizer()

    async def _decode(self, data: bytes, spec: ModelSpec, max_pixels: int, deadline: Deadline) -> NDArray[np.uint8]:
        decoder = self._idle.pop() if self._idle else _Decoder(self._max_pixels)
        self._running.add(decoder)
        try:
            decoding = asyncio.get_running_loop().run_in_executor(self._threads, decoder.decode, data, spec, max_pixels)
            await asyncio.wait({decoding}, timeout=deadline.remaining_s())
            if not decoding.done():
                decoder.kill()
                await asyncio.wait({decoding})  # the memory of the image is in use until then
                decoding.exception()
                raise deadline.exceeded()
            return decoding.result()
        except BaseException as error:
            if not isinstance(error, ImageError):
                decoder.kill()
            raise
        finally:
            self._running.discard(decoder)
            if decoder.is_alive:
                self._idle.append(decoder)


class _Decoder:
    """A process that decodes one image at a time, in one thread of this process."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._process: WorkerProcess | None = None
        self._lock = threading.Lock()  # for the start of the process in one thread, and its end from another one
        self._killed = False
        self._is_ready = False

    @property
    def is_alive(self) -> bool:
        """Whether the process can decode another image."""
        return self._is_ready and not self._killed

    def kill(self) -> None:
        """Kill the process, from any thread. An image that it is decoding then fails."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.stop()

    def decode(self, data: bytes, spec: ModelSpec, max_pixels: int) -> NDArray[np.uint8]:
        """Decode an image. The process is started for the first one. See `DecoderPool.decode` for the errors."""
        try:
            process = self._start()
            return _decode_in_process(process, data, spec, max_pixels)
        except (OSError, WorkerExited) as error:
            self.close()
            if self._is_ready and isinstance(error, WorkerExited):
                raise _process_error(error.status, len(data)) from error
            raise DecoderUnavailable("the server cannot start a process to decode images", "try again") from error

    def close(self) -> None:
        """Kill the process and release its pipes."""
        self.kill()
        if self._process is not None:
            self._process.close()

    def _start(self) -> WorkerProcess:
        """Return the process once it is ready. Raises OSError if it cannot be started, or WorkerExited."""
        with self._lock:
            if self._killed:
                raise WorkerExited(-signal.SIGKILL)
            if self._process is None:
                self._process = start_module(_PROGRAM, numpy_threads=1)
                self._process.send(str(self._max_pixels).encode())
        if not self._is_ready:
            self._process.readline()
            self._is_ready = True
        return self._process


def _decode_in_process(process: WorkerProcess, data: bytes, spec: ModelSpec, max_pixels: int) -> NDArray[np.uint8]:
    process.send(spec.to_json().encode())
    process.send(msgspec.json.encode(DecodeRequest(len(data), max_pixels)), data)
    reply = msgspec.json.decode(process.readline(), type=DecodeReply)
    if reply.error is not None:
        raise (TooManyPixels if reply.too_many_pixels else ImageError)(*reply.error)
    height, width, channels = reply.shape
    pixels = process.read(height * width * channels)
    return np.frombuffer(pixels, np.uint8).reshape(reply.shape)


def _process_error(status: int, size: int) -> ImageError:
    if status == -getattr(signal, "SIGPROF", 0):
        return SlowImage(f"{size} bytes take too much time to decode", "resize the image, or save it in another format")
    problem = f"{size} bytes cannot be decoded (the process ended with status {status})"
    return ImageError(problem, "save the image again in another program")


def _close(idle: "list[_Decoder]", running: "set[_Decoder]", threads: ThreadPoolExecutor) -> None:
    for decoder in [*idle, *running]:
        decoder.close()
    threads.shutdown(wait=False, cancel_futures=True)
