"""The supervisor starts the worker processes, restarts them when they exit, and forwards signals.

It opens no model and answers no request, so little can make it fail. It holds the listening socket: while a worker is
restarted, connections wait instead of being refused.
"""

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from cifarx_serve.errors import CifarxError, UsageError, error_message
from cifarx_serve.files.signature import signature_path
from cifarx_serve.server.inference.metrics_files import clear_gauges, create_metrics_files
from cifarx_serve.server.model_changes import ChangeReply, ChangeRequest
from cifarx_serve.server.processes.messages import ALIVE, ALL_READY, READY, Start, Update, Updated
from cifarx_serve.server.processes.model_updates import ModelUpdates
from cifarx_serve.server.processes.port_reservation import PortReservation
from cifarx_serve.server.settings import PROMETHEUS_MULTIPROC_DIR, Settings
from cifarx_serve.system.socket_filter import drop_new_connections
from cifarx_serve.system.worker_process import worker_command, worker_environment

_OBJECT: Final = b"{"
"""The start of a message that is a JSON object."""

_WORKER_MODULE: Final = "cifarx_serve.server.processes.worker"
BACKLOG: Final = 1024
"""The number of connections that may wait until a worker accepts them."""

_WATCH_INTERVAL_S: Final = 1.0
_MIN_RESTART_DELAY_S: Final = 0.25
_MAX_RESTART_DELAY_S: Final = 8.0
_MAX_READY_DELAY_S: Final = 1.0
"""The delay for workers that become ready and exit soon, which would otherwise keep a CPU busy with starting them."""

_STABLE_S: Final = 10.0
"""A worker that ran for this long is replaced without a delay."""

_MAX_SILENCE_S: Final = 30.0
"""How long a worker that was ready may be silent before it is killed: its event loop does not run.

The supervisor counts this in intervals of its own event loop. If the whole server was suspended, as by `docker pause`,
its clock has gone on but its workers are fine.
"""

_SILENCE_INTERVAL_S: Final = 3.0

_SHUTDOWN_GRACE_S: Final = 5.0
"""How long a worker may take to exit, beyond the time limits of its requests, before it is killed."""


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 chooses a free one.

    Raises:
        UsageError: the address does not exist, or another program uses it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host} port {port} ({error_message(error)})", "choose another --host or --port"
        ) from error
    return listener


class Supervisor:
    """The worker processes of one server.

    Args:
        settings: the settings of the workers.
        listener: the socket that the workers share; `run` closes it.
        workers: the number of workers.
        watch: whether to reload models when their files change.
        on_event: called with a line of text for each event; the first is "ready".
        on_drain: called when no new connections shall reach the socket, before it is closed.
        grpc_port: the port on which the workers listen for gRPC; `run` closes it. None for no gRPC.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        workers: int,
        watch: bool,
        on_event: Callable[[str], None],
        on_drain: Callable[[], None] = lambda: None,
        grpc_port: PortReservation | None = None,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._count = workers
        self._watch = watch
        self._on_event = on_event
        self._on_drain = on_drain
        self._grpc_port = grpc_port
        self._stopping = asyncio.Event()
        self._workers: dict[int, asyncio.subprocess.Process] = {}
        self._ready: set[int] = set()
        self._reload_when_ready: set[int] = set()
        self._updates = ModelUpdates(settings, self._send, lambda: set(self._workers))
        self._changes: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references
        self._all_were_ready = False
        self._failure: CifarxError | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP reloads the models.

        Raises:
            CifarxError: a worker failed before all workers were ready.
            OutputError: the directory for temporary files has not enough space.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        with tempfile.TemporaryDirectory(prefix="cifarx-serve-") as metrics_dir:
            for worker in range(self._count):
                create_metrics_files(Path(metrics_dir), worker)
            workers = [asyncio.create_task(self._supervise(number, metrics_dir)) for number in range(self._count)]
            watching = (
                asyncio.create_task(self._watch_files())
                if self._watch or self._settings.model_control == "poll"
                else None
            )
            await self._stopping.wait()
            self._on_drain()
            drop_new_connections(self._listener)
            self._listener.close()
            if self._grpc_port:
                self._grpc_port.close()
            if watching:
                watching.cancel()
            for process in self._workers.values():
                _send_signal(process, signal.SIGTERM)
            await asyncio.gather(*workers)
        if self._failure:
            raise self._failure

    async def _supervise(self, number: int, metrics_dir: str) -> None:
        """Start a worker, and restart it when it exits, until the server stops."""
        delay_s = _MIN_RESTART_DELAY_S
        while not self._stopping.is_set():
            started = asyncio.get_running_loop().time()
            was_ready, error = await self._run_worker(number, metrics_dir)
            if self._stopping.is_set():
                return
            if not (was_ready or self._all_were_ready):  # another worker would fail in the same way
                self._failure = error
                self._stopping.set()
                return
            self._on_event(f"restarting worker {number}: {error.problem}")
            if was_ready and asyncio.get_running_loop().time() - started > _STABLE_S:
                delay_s = _MIN_RESTART_DELAY_S  # it may fail only now and then: replace it at once
            else:
                await self._sleep(delay_s)
                delay_s = min(2 * delay_s, _MAX_READY_DELAY_S if was_ready else _MAX_RESTART_DELAY_S)

    async def _run_worker(self, number: int, metrics_dir: str) -> tuple[bool, CifarxError]:
        """Run a worker until it exits; return whether it was ready, and why it exited."""
        read_fd, write_fd = os.pipe()
        process = await self._start_worker(number, write_fd, metrics_dir)
        self._workers[number] = process
        if self._stopping.is_set():
            _send_signal(process, signal.SIGTERM)
        reading = asyncio.create_task(self._read_status(number, read_fd))
        status = await self._wait_for_exit(process)
        error = await reading or CifarxError(f"worker {number} exited with status {status}", "see its output")
        error.exit_status = max(status, 1)
        del self._workers[number]
        self._updates.on_exit(number)
        was_ready = number in self._ready
        self._ready.discard(number)
        clear_gauges(Path(metrics_dir), number)
        return was_ready, error

    async def _start_worker(self, number: int, write_fd: int, metrics_dir: str) -> asyncio.subprocess.Process:
        listener_fd = self._listener.fileno()
        process = await asyncio.create_subprocess_exec(
            *worker_command(_WORKER_MODULE),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(listener_fd, write_fd),
            env={**worker_environment(self._settings.threads), PROMETHEUS_MULTIPROC_DIR: metrics_dir},
            process_group=0,  # Ctrl-C in a terminal reaches the supervisor only
        )
        os.close(write_fd)
        start = Start(
            settings=msgspec.structs.replace(self._settings, files=self._updates.files),
            number=number,
            listener_fd=listener_fd,
            status_fd=write_fd,
            accept_while_opening=not self._all_were_ready,
            grpc_address=self._grpc_port.address if self._grpc_port else None,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        return process

    async def _read_status(self, number: int, read_fd: int) -> CifarxError | None:
        """Read the messages of a worker until it exits; return the error that it reported, if any."""
        error = None
        stream = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_fd, "rb", buffering=0)
        )
        interval_s, silent_s = None, 0.0
        while True:
            try:
                line = await asyncio.wait_for(stream.readline(), interval_s)
            except TimeoutError:
                silent_s += _SILENCE_INTERVAL_S
                if silent_s >= _MAX_SILENCE_S:
                    if not self._stopping.is_set():
                        problem = f"worker {number} has not responded for {_MAX_SILENCE_S:g} s"
                        error = CifarxError(problem, "see its output")
                        _send_signal(self._workers[number], signal.SIGKILL)
                    interval_s = None  # the end of the pipe follows
                continue
            silent_s = 0.0
            if not line:
                break
            if line == READY:
                self._on_ready(number)
                interval_s = _SILENCE_INTERVAL_S
            elif line.startswith(_OBJECT):
                self._on_message(number, msgspec.json.decode(line, type=Updated | ChangeRequest))
            elif line != ALIVE:
                error = CifarxError(*msgspec.json.decode(line, type=tuple[str, str]))
        transport.close()
        return error

    def _on_message(self, number: int, message: Updated | ChangeRequest) -> None:
        if isinstance(message, Updated):
            self._updates.on_updated(number, message)
            return
        change = asyncio.create_task(self._updates.handle(number, message))
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)

    def _send(self, number: int, message: Update | ChangeReply) -> None:
        if (process := self._workers.get(number)) and process.stdin is not None:
            process.stdin.write(msgspec.json.encode(message) + b"\n")

    def _on_ready(self, number: int) -> None:
        self._ready.add(number)
        if number in self._reload_when_ready:
            self._reload_when_ready.discard(number)
            _send_signal(self._workers[number], signal.SIGHUP)
        if len(self._ready) == self._count and not self._all_were_ready:
            self._all_were_ready = True
            self._send_all_ready()
            self._on_event("ready")
        elif self._all_were_ready:
            self._on_event(f"worker {number} is ready again")

    def _send_all_ready(self) -> None:
        """Notify the workers that all of them are ready."""
        for process in self._workers.values():
            assert process.stdin is not None
            process.stdin.write(ALL_READY)

    async def _wait_for_exit(self, process: asyncio.subprocess.Process) -> int:
        """Wait for a worker to exit and return its status; kill it if it does not exit in time after a stop."""
        exiting = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([exiting, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if exiting.done():
            return exiting.result()
        limits = self._settings.limits
        try:
            return await asyncio.wait_for(exiting, limits.deadline_s + limits.body_timeout_s + _SHUTDOWN_GRACE_S)
        except TimeoutError:
            _send_signal(process, signal.SIGKILL)
            return await process.wait()

    def _reload(self) -> None:
        """Make the workers reload changed models; those that are not ready yet reload once they are."""
        self._reload_when_ready = self._workers.keys() - self._ready
        for number in self._ready:
            _send_signal(self._workers[number], signal.SIGHUP)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, or return early when the server stops."""
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def _watch_files(self) -> None:
        """Reload when a file has changed, but only once it stays the same, because it may still be written."""
        loaded = previous = self._file_states(self._updates.files)
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            files = await asyncio.to_thread(self._updates.wanted_files)
            current = self._file_states(files)
            if current == previous and current != loaded:
                loaded = current
                if self._settings.model_control == "poll":
                    await self._updates.serve(files)
                else:
                    self._reload()
            previous = current

    def _file_states(self, files: Mapping[str, str]) -> dict[str, list[tuple[int, int, int] | None]]:
        """Return the states of the files by key, with those of their signatures if they need one."""
        return {
            key: [
                _file_state(Path(path)),
                _file_state(signature_path(Path(path))) if self._settings.public_key else None,
            ]
            for key, path in files.items()
        }


def _file_state(path: Path) -> tuple[int, int, int] | None:
    """Return the inode, size and modification time of a file; None if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _send_signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)  # Process.send_signal could consume the exit status that a task waits for
