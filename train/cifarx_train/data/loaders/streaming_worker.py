"""The worker process of `StreamingLoader`, which gathers batches from images on disk.

A worker process imports the module of its function, so this module must not import PyTorch: without it the import takes
0.2 s and 30 MB of memory, whereas `streaming` takes 4 s and 660 MB (CPU build of PyTorch, two cores).
"""

import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np


def run_worker(connection: "Connection[bytes, bytes]", file: Path) -> None:
    """Receive the indices of images, int64, and send back the bytes of the images, until the connection is closed.

    Args:
        connection: the pipe to the training process. It is also closed if that process is killed.
        file: an `.npy` file of uint8 (N, height, width, 3).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the training process ends this one
    with suppress(EOFError, OSError, ValueError):  # the training process reports the error, once for all workers
        images = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        while True:
            indices = np.frombuffer(connection.recv_bytes(), np.int64)
            connection.send_bytes(images[indices].reshape(-1).data)
