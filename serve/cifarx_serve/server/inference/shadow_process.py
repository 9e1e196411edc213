"""The worker program that runs the model of a `Shadow`, only when nothing else needs the CPUs.

The first line of its input is a `ShadowStart`, and the reply to it `OPENED`, or the two parts of an error as a JSON
array. A request is a `ShadowRequest` on one line, followed by the images. The reply is a `ShadowReply` on one line,
followed by what `applicable_labels` returns for the outputs of the model.
"""

import math
import os
import sys
import time
from contextlib import suppress
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.registry import register_backend
from cifarx_serve.errors import CifarxError
from cifarx_serve.scores import applicable_labels
from cifarx_serve.server.inference.model import ServedModel
from cifarx_serve.server.settings import Settings
from cifarx_serve.system.cpus import set_cpu_limit
from cifarx_serve.system.worker_process import init_worker

OPENED: Final = b"opened\n"

_LOWEST_PRIORITY: Final = 19


class ShadowStart(msgspec.Struct, frozen=True):
    """The model: its file has the key `key` in the settings."""

    key: str
    settings: Settings


class ShadowRequest(msgspec.Struct, frozen=True):
    """The type and shape of the images that follow, as `ServedModel.run` takes them."""

    dtype: str
    shape: tuple[int, ...]


class ShadowReply(msgspec.Struct, frozen=True):
    """The shape of the labels that follow, bool (N, classes), and how long the model took; or why it failed."""

    shape: tuple[int, int] = (0, 0)
    compute_s: float = 0.0
    error: str | None = None


def main() -> None:
    """Open the model, and answer requests until standard input is closed."""
    replies, requests = init_worker(), sys.stdin.buffer
    _lower_priority()
    start = msgspec.json.decode(requests.readline(), type=ShadowStart)
    settings = start.settings
    for backend in settings.registered_backends:
        register_backend(*backend)
    set_cpu_limit(settings.threads)
    path, max_batch = settings.files[start.key], settings.limits.max_batch
    try:
        model = ServedModel(
            start.key, path, settings.backend, settings.device, max_batch, public_key=settings.public_key
        )
    except CifarxError as error:
        replies.write(msgspec.json.encode([error.problem, error.remedy]) + b"\n")
        replies.flush()
        return
    replies.write(OPENED)
    replies.flush()
    while line := requests.readline():
        request = msgspec.json.decode(line, type=ShadowRequest)
        dtype = np.dtype(request.dtype)
        data = requests.read(math.prod(request.shape) * dtype.itemsize)
        reply, labels = _answer(model, np.frombuffer(data, dtype).reshape(request.shape))
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.write(labels)
        replies.flush()


def _answer(model: ServedModel, images: NDArray[Any]) -> tuple[ShadowReply, bytes]:
    started_at = time.perf_counter()
    try:
        outputs = model.run(images)
    except CifarxError as error:
        return ShadowReply(error=str(error)), b""
    compute_s = time.perf_counter() - started_at
    labels = applicable_labels(outputs, model.spec)
    return ShadowReply((len(labels), labels.shape[1]), compute_s), labels.tobytes()


def _lower_priority() -> None:
    """Let the system run this process only on CPUs that no other process wants, or seldom where it cannot do that."""
    with suppress(OSError):
        os.nice(_LOWEST_PRIORITY)
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # no thread of a library is waited for
