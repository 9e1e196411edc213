"""What runs in a process that gathers batches from images on the disk. No PyTorch: it takes seconds to start."""

import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np


def serve(connection: "Connection[bytes, bytes]", file: Path) -> None:
    """Answer each message, the int64 numbers of images, with the bytes of those images, until the other side closes.

    Args:
        connection: to the process that trains; it ends when that process does, however it does.
        file: an `.npy` file of uint8 (N, height, width, 3).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the process that trains ends this one
    with suppress(EOFError, OSError, ValueError):  # the other side tells of it, once for all workers
        images = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        while True:
            chosen = np.frombuffer(connection.recv_bytes(), np.int64)
            connection.send_bytes(images[chosen].reshape(-1).data)
