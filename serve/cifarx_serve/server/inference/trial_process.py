"""The worker program that opens and warms up one model for `loading`, in a process that can be ended.

It writes `STARTED` first. The request is a `Trial`. The replies are `STEP` when the model is open and after each batch
of its warm-up, and at the end `PASSED` or the two parts of an error as a JSON array.
"""

import os
import sys
import threading
from typing import Final

import msgspec

from cifarx_serve.backends.registry import register_backend
from cifarx_serve.errors import CifarxError
from cifarx_serve.server.inference.model import ServedModel
from cifarx_serve.server.settings import Settings
from cifarx_serve.system.cpus import set_cpu_limit
from cifarx_serve.system.worker_process import init_worker

STARTED: Final = b"started\n"
STEP: Final = b"step\n"
PASSED: Final = b"passed\n"


class Trial(msgspec.Struct, frozen=True):
    """Request to try one of the models of the settings."""

    name: str
    settings: Settings


def main() -> None:
    """Answer one request."""
    replies = init_worker()

    def reply(line: bytes) -> None:
        replies.write(line)
        replies.flush()

    reply(STARTED)
    trial = msgspec.json.decode(sys.stdin.buffer.readline(), type=Trial)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    settings = trial.settings
    for backend in settings.registered_backends:
        register_backend(*backend)
    set_cpu_limit(settings.threads)
    path, max_batch, key = settings.files[trial.name], settings.limits.max_batch, settings.public_key
    try:
        ServedModel(trial.name, path, settings.backend, settings.device, max_batch, lambda: reply(STEP), key)
    except CifarxError as error:
        reply(msgspec.json.encode([error.problem, error.remedy]) + b"\n")
    else:
        reply(PASSED)
    os._exit(0)  # no thread of a library is waited for


def _exit_with_parent() -> None:
    """End this process when the parent has ended, even while the model runs."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
