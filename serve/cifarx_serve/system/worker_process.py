"""A program of this package in a process of its own, which answers requests; both sides of it.

Requests go by its standard input, replies by its standard output; the end of the requests ends it.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import BinaryIO, Final

_PATIENCE_S: Final = 10.0
"""How long it may take to end."""

_PIPE_BYTES: Final = 2**20
"""What a reply may have without waiting to be read; Linux gives no user more. Other systems keep their own."""


class ChildEnded(Exception):
    """It ended before it replied; `status` is its exit status."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"ended with {status}")


class ChildProgram:
    """The parent's side.

    Args:
        module: what the process runs, as `python -m` would, with this process's modules and current folder.
        numpy_threads: see `child_environment`.
    """

    def __init__(self, module: str, numpy_threads: int | None = None) -> None:
        self._process = subprocess.Popen(
            child_command(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=_PIPE_BYTES,
            env=child_environment(numpy_threads),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def send(self, line: bytes) -> None:
        """A request, without its newline; one that has ended is not told of here."""
        with suppress(OSError):
            self._requests.write(line + b"\n")
            self._requests.flush()

    def read_line(self) -> bytes:
        """The next line of a reply, with its newline.

        Raises:
            ChildEnded: there is none.
        """
        return self._whole(line := self._replies.readline(), line.endswith(b"\n"))

    def read(self, size: int) -> bytes:
        """So many bytes of a reply; raises as `read_line` does."""
        return self._whole(found := self._replies.read(size), len(found) == size)

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """End it; a second call does nothing."""
        for pipe in (self._requests, self._replies):
            with suppress(OSError):
                pipe.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _whole(self, reply: bytes, is_whole: bool) -> bytes:
        if not is_whole:
            raise ChildEnded(self._process.wait(_PATIENCE_S))
        return reply


def child_command(module: str) -> list[str]:
    """What runs a module as a program; what lies in the current folder is not imported (-P)."""
    return [sys.executable, "-P", "-m", module]


def child_environment(numpy_threads: int | None = None) -> dict[str, str]:
    """This process's, with its modules.

    Args:
        numpy_threads: of numpy's own, unless the user says how many. None for one a CPU, which take a quarter of the
            CPU time of a worker's start on two CPUs.
    """
    threads = {} if numpy_threads is None else {"OPENBLAS_NUM_THREADS": str(numpy_threads)}
    return {**threads, **os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def take_replies() -> BinaryIO:
    """The child's side, called first: the file for its replies, which nothing else writes to.

    What libraries print goes to standard error. Ctrl-C, which reaches every process of a terminal, is left to the
    parent: it ends the child.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies
