"""A loader for splits that do not fit in the memory of the training device."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from cifarx_serve.system.prefetch import prefetch
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.base import Loader
from cifarx_train.data.loaders.streaming_worker import run_worker

_Connection: TypeAlias = "Connection[bytes, bytes]"

_MAX_WORKERS: Final = 8  # workers only copy decoded images, so a few are faster than any device can train


class StreamingLoader(Loader):
    """Streams batches to the device through pinned memory. Workers gather them ahead, in order.

    Memory-mapped images are read by processes, so that waiting for the disk does not block the training process. Images
    in memory are gathered by threads. The workers start with the first batch and are reused for the next epoch. They
    end with the loader, or when an iterator is closed early.

    Args:
        data: the split. It stays where it is.
        device: the training device.
    """

    # This does not use PyTorch's DataLoader: each of its workers takes seconds to start and loads PyTorch into memory,
    # they sometimes abort when they are ended early, and it reports a dead worker from a signal handler, which raises
    # the exception at an arbitrary point of the training process.

    def __init__(self, data: LabeledImages, device: torch.device) -> None:
        self.labels = torch.from_numpy(data.labels).to(device)
        self._data = data
        self._idle: _Workers | None = None

    def inputs(self, order: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the images of each batch, uint8 (n, height, width, 3), on the host, and their indices on the device.

        Raises:
            DataError: a worker process exited or could not read the images.
        """
        workers, self._idle = self._idle or self._start_workers(), None  # a concurrent iterator starts its own
        try:
            yield from zip(workers.gather(order), self._upload(order), strict=True)
        except BaseException:
            workers.close()
            raise
        self._idle = workers

    def batch(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, indices = inputs
        return images.to(self.labels.device, non_blocking=True), self.labels[indices]

    def _start_workers(self) -> "_Workers":
        count = min(available_cpus(), _MAX_WORKERS)
        device = self.labels.device
        if self._data.file:
            return _ProcessWorkers(count, self._data.file, self._data.images.shape[1:], device)
        return _ThreadWorkers(count, self._data.images, device)


class _Workers(ABC):
    @abstractmethod
    def gather(self, order: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the images of each batch in order, uint8 (n, height, width, 3), in host memory."""

    @abstractmethod
    def close(self) -> None:
        """End the workers and wait until they have ended."""


class _ThreadWorkers(_Workers):
    def __init__(self, count: int, images: NDArray[np.uint8], device: torch.device) -> None:
        self._count, self._images, self._pinned = count, images, _pins_memory(device)
        # Pinned memory belongs to the current device, which is the first GPU in a new thread.
        select_device = partial(torch.cuda.set_device, device) if self._pinned else None
        self._pool = ThreadPoolExecutor(count, initializer=select_device)

    def gather(self, order: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        yield from prefetch(self._pool, self._take, order, max_pending=self._count)

    def _take(self, indices: torch.Tensor) -> torch.Tensor:
        images = torch.from_numpy(self._images[indices.numpy()])
        return images.pin_memory() if self._pinned else images

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _ProcessWorkers(_Workers):
    """Worker processes, each with its own pipe. Each holds one gathered batch until it is received."""

    def __init__(self, count: int, file: Path, image_shape: tuple[int, ...], device: torch.device) -> None:
        self._file, self._image_shape, self._pinned = file, image_shape, _pins_memory(device)
        self._connections: list[_Connection] = []
        self._processes: list[SpawnProcess] = []
        self._finalizer = finalize(self, _end_processes, self._connections, self._processes)
        # A fork would copy the locks of all threads in their current state, and CUDA does not support it. The workers
        # are given the path, because pickling the memory-mapped array would copy all of it.
        context = get_context("spawn")
        for _ in range(count):
            connection, worker_connection = context.Pipe()
            self._connections.append(connection)
            process = context.Process(target=run_worker, args=(worker_connection, file), daemon=True)
            process.start()
            self._processes.append(process)
            worker_connection.close()  # so that reading raises EOFError when the process ends

    def gather(self, order: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        count = len(self._connections)
        try:
            for connection, indices in zip(self._connections, order, strict=False):
                connection.send_bytes(indices.numpy().data)
            for number, indices in enumerate(order):
                connection = self._connections[number % count]
                images = self._receive(connection, len(indices))
                if number + count < len(order):
                    # Not earlier: if both processes wrote into full pipes at once, they would deadlock.
                    connection.send_bytes(order[number + count].numpy().data)
                yield images
        except (EOFError, OSError) as error:
            self.close()
            statuses = sorted({str(process.exitcode) for process in self._processes if process.exitcode})
            raise DataError(
                f"a worker process that reads {self._file} exited with status {', '.join(statuses) or 0}",
                "free memory if it ran out, restore the file if it is gone, and train again",
            ) from error

    def _receive(self, connection: _Connection, count: int) -> torch.Tensor:
        images = torch.empty((count, *self._image_shape), dtype=torch.uint8, pin_memory=self._pinned)
        connection.recv_bytes_into(images.view(-1).numpy())
        return images

    def close(self) -> None:
        self._finalizer()


def _pins_memory(device: torch.device) -> bool:
    return device.type == "cuda"  # copies from pageable memory would block the host


def _end_processes(connections: list[_Connection], processes: list[SpawnProcess]) -> None:
    for connection in connections:
        connection.close()  # ends the worker
    for process in processes:
        process.join()
