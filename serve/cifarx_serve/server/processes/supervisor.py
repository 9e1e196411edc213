"""Starts the processes that serve, on one socket; replaces one that dies; passes on the signals.

It opens no model and answers no request, so there is little that could end it. It holds the socket: while a worker is
being replaced, connections wait and are not refused.
"""

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from cifarx_serve.errors import CifarxError, UsageError
from cifarx_serve.server.processes.messages import ALL_READY, READY, Start
from cifarx_serve.server.processes.socket_filter import refuse_handshakes
from cifarx_serve.server.settings import SHARED_FIGURES, Settings
from cifarx_serve.system.worker_process import child_command, child_environment

_PROGRAM: Final = "cifarx_serve.server.processes.worker"
_BACKLOG: Final = 1024
_WATCH_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 8.0
_END_S: Final = 5.0
"""What a worker may take to end beyond what its requests may take."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free.

    Raises:
        UsageError: no such address, or another program has it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {host} port {port} ({reason})", "choose another --host or --port"
        ) from error
    return listener


class Supervisor:
    """The processes of one server.

    Args:
        settings: what each worker is told.
        listener: the socket that they share; closed by `run`.
        workers: how many.
        watch: whether a file that changes is taken into service without being told to.
        told: is given a line for people at every event.
    """

    def __init__(
        self, settings: Settings, listener: socket.socket, workers: int, watch: bool, told: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._count = workers
        self._watch = watch
        self._told = told
        self._ending = asyncio.Event()
        self._workers: dict[int, asyncio.subprocess.Process] = {}
        self._ready: set[int] = set()
        self._swap_when_ready: set[int] = set()
        self._served = False
        self._failure: CifarxError | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            CifarxError: a worker could not even begin.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ending.set)
        loop.add_signal_handler(signal.SIGHUP, self._swap)
        with tempfile.TemporaryDirectory(prefix="cifarx-serve-") as folder:
            keeping = [asyncio.create_task(self._keep(number, folder)) for number in range(self._count)]
            watching = asyncio.create_task(self._watch_files()) if self._watch else None
            await self._ending.wait()
            refuse_handshakes(self._listener)
            self._listener.close()
            if watching:
                watching.cancel()
            for process in self._workers.values():
                _send(process, signal.SIGTERM)
            await asyncio.gather(*keeping)
        if self._failure:
            raise self._failure

    async def _keep(self, number: int, folder: str) -> None:
        """Start a worker, and another when it dies, until the server ends."""
        pause_s = _FIRST_PAUSE_S
        while not self._ending.is_set():
            was_ready, error = await self._run_one(number, folder)
            if self._ending.is_set():
                return
            if not (was_ready or self._served):  # what it died of, the next would die of
                self._failure = error
                self._ending.set()
                return
            self._told(f"worker {number} is replaced: {error.problem}")
            if was_ready:
                pause_s = _FIRST_PAUSE_S
            else:
                await self._pause(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _run_one(self, number: int, folder: str) -> tuple[bool, CifarxError]:
        """One worker from its start to its end: whether it was ready, and what it ended of."""
        reading, writing = os.pipe()
        process = await self._start(writing, folder)
        self._workers[number] = process
        if self._ending.is_set():
            _send(process, signal.SIGTERM)
        hearing = asyncio.create_task(self._hear(number, reading))
        status = await self._ended(process)
        error = await hearing or CifarxError(f"worker {number} ended with {status}", "see what it wrote")
        error.exit_status = max(status, 1)
        del self._workers[number]
        was_ready = number in self._ready
        self._ready.discard(number)
        _forget(folder, process.pid)
        return was_ready, error

    async def _start(self, writing: int, folder: str) -> asyncio.subprocess.Process:
        listener = self._listener.fileno()
        process = await asyncio.create_subprocess_exec(
            *child_command(_PROGRAM),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(listener, writing),
            env={**child_environment(self._settings.threads), SHARED_FIGURES: folder},
            process_group=0,  # the keys of a terminal reach the supervisor alone
        )
        os.close(writing)
        start = Start(settings=self._settings, listener=listener, status=writing, at_once=not self._served)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        return process

    async def _hear(self, number: int, reading: int) -> CifarxError | None:
        """What a worker tells: that it is ready; or why it cannot be, which is returned at its end."""
        error = None
        stream = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb", buffering=0)
        )
        while line := await stream.readline():
            if line != READY:
                error = CifarxError(*msgspec.json.decode(line, type=tuple[str, str]))
                continue
            self._ready.add(number)
            if number in self._swap_when_ready:
                self._swap_when_ready.discard(number)
                _send(self._workers[number], signal.SIGHUP)
            if len(self._ready) == self._count and not self._served:
                self._served = True
                self._tell_all()
                self._told("ready")
            elif self._served:
                self._told(f"worker {number} is ready again")
        transport.close()
        return error

    def _tell_all(self) -> None:
        """From now on a client is answered whichever worker it meets."""
        for process in self._workers.values():
            assert process.stdin is not None
            process.stdin.write(ALL_READY)

    async def _ended(self, process: asyncio.subprocess.Process) -> int:
        """The exit status; of one that does not end when it should, by force."""
        waiting = asyncio.create_task(process.wait())
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait([waiting, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if waiting.done():
            return waiting.result()
        limits = self._settings.limits
        try:
            return await asyncio.wait_for(waiting, limits.deadline_s + limits.body_timeout_s + _END_S)
        except TimeoutError:
            _send(process, signal.SIGKILL)
            return await process.wait()

    def _swap(self) -> None:
        """Have the workers look for new versions of the files: those that are being opened once they are ready."""
        self._swap_when_ready = self._workers.keys() - self._ready
        for number in self._ready:
            _send(self._workers[number], signal.SIGHUP)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._ending.wait(), seconds)
        except TimeoutError:
            return

    async def _watch_files(self) -> None:
        """A file that has changed, and then not for a while, is a new version."""
        known = before = self._signatures()
        while True:
            await asyncio.sleep(_WATCH_S)
            found = self._signatures()
            if found == before and found != known:
                known = found
                self._swap()
            before = found

    def _signatures(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file does."""
        return [_signature(Path(path)) for path in self._settings.files.values()]


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)  # its own method would take the exit status from who waits for it


def _forget(folder: str, pid: int) -> None:
    """A process that has ended holds nothing any more; what it counted stays counted."""
    for path in Path(folder).glob(f"gauge_live*_{pid}.db"):
        path.unlink(missing_ok=True)
