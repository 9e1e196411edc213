"""Run a program in a worker process that answers requests: a module of this package, of which this has both sides.

Requests go to the worker's standard input and replies come from its standard output. The worker exits when its input
is closed.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import BinaryIO, Final

_EXIT_TIMEOUT_S: Final = 10.0

_PIPE_BYTES: Final = 2**20
"""The size of the pipe for replies, the maximum that Linux allows an ordinary user. Other systems ignore it."""


class WorkerExited(Exception):
    """Raised when the worker exited before it sent a whole reply.

    Attributes:
        status: the exit status; negative for the signal that ended the worker.
    """

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"the worker exited with status {status}")


class WorkerProcess:
    """The parent's side of a worker.

    Args:
        command: the program and its arguments. It runs in the working directory of this process.
        environment: its environment variables, or None for those of this process.
        silent: whether to discard what it writes to standard error.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, *, silent: bool = False
    ) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if silent else None,
            pipesize=_PIPE_BYTES,
            env=environment,
            # Ctrl-C in a terminal reaches only this process, which then ends the worker.
            process_group=0 if os.name == "posix" else None,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid

    def send(self, line: bytes, content: bytes | memoryview = b"") -> None:
        """Send a request: one line, without its newline, and the content that follows it.

        If the worker has exited, reading the reply reports it.
        """
        with suppress(OSError):
            self._requests.write(line + b"\n")
            self._requests.write(content)
            self._requests.flush()

    def readline(self) -> bytes:
        """Read one line of a reply, including its newline.

        Raises:
            WorkerExited: the worker exited before the end of the line.
        """
        line = self._replies.readline()
        return self._require_whole(line, line.endswith(b"\n"))

    def read(self, size: int) -> bytes:
        """Read `size` bytes of a reply.

        Raises:
            WorkerExited: the worker exited before it sent them.
        """
        content = self._replies.read(size)
        return self._require_whole(content, len(content) == size)

    def stop(self) -> None:
        """Kill the worker without waiting. Any thread that reads its reply then gets a WorkerExited."""
        self._process.kill()

    def kill(self) -> None:
        """Kill the worker immediately."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Close the pipes and wait until the worker has exited; kill it after a timeout. Calling it twice is safe."""
        for pipe in (self._requests, self._replies):
            with suppress(OSError):
                pipe.close()
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _require_whole(self, content: bytes, is_whole: bool) -> bytes:
        if not is_whole:
            raise WorkerExited(self._process.wait(_EXIT_TIMEOUT_S))
        return content


def start_module(module: str, numpy_threads: int | None = None) -> WorkerProcess:
    """Start a module as a worker, as with `python -m`, with the import path of this process.

    Args:
        module: the name of the module.
        numpy_threads: as for `worker_environment`.
    """
    return WorkerProcess(worker_command(module), worker_environment(numpy_threads))


def worker_command(module: str) -> list[str]:
    """Return the command that runs a module. Files in the working directory are not importable (`-P`)."""
    return [sys.executable, "-P", "-m", module]


def worker_environment(numpy_threads: int | None = None) -> dict[str, str]:
    """Return the environment variables for a worker: those of this process, with its import path in `PYTHONPATH`.

    Args:
        numpy_threads: the number of threads that numpy's BLAS starts, unless the user has set it. None leaves the
            default of one per CPU, whose start takes a quarter of the CPU time of a worker's start on two CPUs.
    """
    threads = {} if numpy_threads is None else {"OPENBLAS_NUM_THREADS": str(numpy_threads)}
    return {**threads, **os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def init_worker() -> BinaryIO:
    """Set up this process as a worker and return the stream for its replies. Call this first in the worker.

    Whatever libraries print goes to standard error instead. SIGINT is ignored, because the parent ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies
