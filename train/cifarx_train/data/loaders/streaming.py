"""A split that does not fit on the training device, streamed there through pinned memory."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Final, TypeAlias
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray

from cifarx_serve.errors import DataError
from cifarx_serve.system.cpus import available_cpus
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.streaming_worker import serve

_Connection: TypeAlias = "Connection[bytes, bytes]"

_MOST_WORKERS: Final = 8  # they copy decoded images, which a few do faster than any device trains


class StreamedImages:
    """A split kept where it is: workers gather batches ahead, and give them in the order they are asked for.

    Images mapped from a file are read by processes, which do not hold up the one that trains while they wait for the
    disk; images in memory are gathered by threads. The workers start with the first batch and stay for the next epoch.
    They end with this object, or with an iterator that is closed before its end.
    """

    # Not torch's DataLoader: its workers take seconds to start, hold PyTorch in memory each, now and then abort when
    # they are ended early, and a signal handler raises what ended them wherever the process that trains happens to be.

    def __init__(self, data: LabeledImages, device: torch.device) -> None:
        self.labels = torch.from_numpy(data.labels).to(device)
        self._data = data
        self._idle: _Workers | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images uint8 (n, height, width, 3) and labels int64 (n,) on the device, a batch for each of `order`.

        Args:
            order: the numbers of each batch's images, int64 (n,), on the CPU.

        Raises:
            DataError: a worker process ended, or could not read the images.
        """
        device = self.labels.device
        workers, self._idle = self._idle or self._start(), None  # of two iterators at once, each has its own
        try:
            for chosen, images in zip(order, workers.gather(order), strict=True):
                yield images.to(device, non_blocking=True), self.labels[chosen.to(device, non_blocking=True)]
        except BaseException:
            workers.end()
            raise
        self._idle = workers

    def _start(self) -> "_Workers":
        count = min(available_cpus(), _MOST_WORKERS)
        pinned = self.labels.device.type == "cuda"  # or the host would wait for the end of every copy
        if self._data.file:
            return _Processes(count, self._data.file, self._data.images.shape[1:], pinned)
        return _Threads(count, self._data.images, pinned)


class _Workers(ABC):
    @abstractmethod
    def gather(self, order: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The images of each batch in turn, uint8 (n, height, width, 3), in host memory."""

    @abstractmethod
    def end(self) -> None:
        """End the workers and wait for that."""


class _Threads(_Workers):
    def __init__(self, count: int, images: NDArray[np.uint8], pinned: bool) -> None:
        self._count, self._images, self._pinned = count, images, pinned
        self._pool = ThreadPoolExecutor(count)

    def gather(self, order: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        waiting: deque[Future[torch.Tensor]] = deque()
        for chosen in order:
            waiting.append(self._pool.submit(self._take, chosen))
            if len(waiting) > self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _take(self, chosen: torch.Tensor) -> torch.Tensor:
        images = torch.from_numpy(self._images[chosen.numpy()])
        return images.pin_memory() if self._pinned else images

    def end(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Processes(_Workers):
    """Each has a connection of its own and gathers one batch at a time, while the others' wait to be taken."""

    def __init__(self, count: int, file: Path, image_shape: tuple[int, ...], pinned: bool) -> None:
        self._file, self._image_shape, self._pinned = file, image_shape, pinned
        self._connections: list[_Connection] = []
        self._processes: list[SpawnProcess] = []
        self._finalizer = finalize(self, _end, self._connections, self._processes)
        # A fork would copy the locks of this process's threads as they are at that moment, and breaks CUDA. The path
        # goes to the workers, not the mapped array: pickling that would copy all of it.
        context = get_context("spawn")
        for _ in range(count):
            here, there = context.Pipe()
            self._connections.append(here)
            process = context.Process(target=serve, args=(there, file), daemon=True)
            process.start()
            self._processes.append(process)
            there.close()  # so that the end of the process is the end of what can be read here

    def gather(self, order: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        count = len(self._connections)
        try:
            for connection, chosen in zip(self._connections, order, strict=False):
                connection.send_bytes(chosen.numpy().data)
            for number, chosen in enumerate(order):
                connection = self._connections[number % count]
                images = self._receive(connection, len(chosen))
                if number + count < len(order):
                    # Only now: were both sides to write at once into full pipes, they would wait for ever.
                    connection.send_bytes(order[number + count].numpy().data)
                yield images
        except (EOFError, OSError) as error:
            self.end()
            ends = sorted({str(process.exitcode) for process in self._processes if process.exitcode})
            raise DataError(
                f"a process that reads {self._file} ended (exit status {', '.join(ends) or 0})",
                "train again: with less memory in use, if that was short, and with the file in its place",
            ) from error

    def _receive(self, connection: _Connection, count: int) -> torch.Tensor:
        images = torch.empty((count, *self._image_shape), dtype=torch.uint8, pin_memory=self._pinned)
        connection.recv_bytes_into(images.view(-1).numpy())
        return images

    def end(self) -> None:
        self._finalizer()


def _end(connections: list[_Connection], processes: list[SpawnProcess]) -> None:
    for connection in connections:
        connection.close()  # which every worker takes for its end
    for process in processes:
        process.join()
