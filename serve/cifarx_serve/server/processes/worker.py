"""The worker program: serves requests, as one of several processes on the same socket.

The supervisor starts it and sends the settings as a line of JSON on standard input. At the end of standard input, or
on SIGTERM, the worker drains its connections and exits. On SIGHUP it reloads the models whose files have changed.
"""

import asyncio
import os
import signal
import socket
import sys
import warnings
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

import msgspec

from cifarx_serve.errors import CifarxError
from cifarx_serve.images.reader import suppress_pillow_warnings
from cifarx_serve.server.app import configure_process, create_app, create_components, create_grpc_server
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.listener import Listener
from cifarx_serve.server.model_changes import ChangeReply, ChangeRequest
from cifarx_serve.server.processes.messages import ALIVE, ALIVE_INTERVAL_S, ALL_READY, READY, Start, Update, Updated
from cifarx_serve.system.terminal import printable

_RECHECK_INTERVAL_S: Final = 1.0
_MAX_RECHECKS: Final = 5
"""After this many failed rechecks of a model that has failed, the worker exits, and the supervisor starts another."""

_DRIFT_INTERVAL_S: Final = 5.0
_READ_BYTES: Final = 1 << 16
_MAX_ERROR: Final = 500

EXIT_MODEL_FAILED: Final = 70
"""The exit status of a worker whose model has failed for good: EX_SOFTWARE of sysexits.h."""


class Worker:
    """The server of one process."""

    def __init__(self, start: Start) -> None:
        settings = start.settings
        self._accept_while_opening = start.accept_while_opening
        self._status_fd = start.status_fd
        self._access_log = AccessLog(sys.stdout.buffer) if settings.access_log else None
        components = create_components(settings, self._access_log, start.number, _log_event)
        self._repository, self._metrics = components.repository, components.metrics
        self._repository.peers_starting = start.accept_while_opening
        self._control, self._tracer = components.control, components.tracer
        self._control.connect(self._send)
        self._received = b""
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references
        self._listener = Listener(create_app(components), settings, socket.socket(fileno=start.listener_fd))
        self._grpc_server = create_grpc_server(components, start.grpc_address) if start.grpc_address else None
        self._stopping = asyncio.Event()
        self._failed = False

    async def run(self) -> int:
        """Serve until the worker is stopped; return the exit status.

        Raises:
            CifarxError: a model cannot be opened, or the port for gRPC cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._start(self._repository.reload(_log_event)))
        loop.add_reader(sys.stdin.fileno(), self._read_stdin)
        if self._accept_while_opening:
            await self._accept()
        opening = asyncio.create_task(self._repository.open(_log_event))
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([opening, stopping], return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
            if not self._accept_while_opening:
                await self._accept()
            os.write(self._status_fd, READY)
            self._start(self._report_alive())  # it also runs during the shutdown
            self._start(self._observe_drift())
            health = asyncio.create_task(self._monitor_health())
            await stopping
            health.cancel()
        else:  # nobody needs to know any more whether a model can be opened
            opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        await self._shutdown()
        return EXIT_MODEL_FAILED if self._failed else 0

    async def _accept(self) -> None:
        self._listener.start()
        if self._grpc_server:
            await self._grpc_server.start()

    async def _shutdown(self) -> None:
        self._repository.draining = True
        draining = [self._listener.drain()]
        if self._grpc_server:
            draining.append(self._grpc_server.drain())
        await asyncio.gather(*draining)
        self._metrics.flush()
        if self._access_log:
            self._access_log.flush()
        if self._tracer:
            await self._tracer.close()

    async def _monitor_health(self) -> None:
        """Recheck models that have failed; stop the worker if one does not recover."""
        failures = 0
        while failures < _MAX_RECHECKS:
            await asyncio.sleep(_RECHECK_INTERVAL_S)
            failures = 0 if await self._repository.recheck_failed() else failures + 1
        self._failed = True
        self._stopping.set()

    async def _observe_drift(self) -> None:
        """Let the drift be measured from now on, even if nobody reads the metrics."""
        while True:
            if self._metrics.is_drift_due:
                await asyncio.to_thread(self._metrics.observe_drift)
            await asyncio.sleep(_DRIFT_INTERVAL_S)

    async def _report_alive(self) -> None:
        """Tell the supervisor that the event loop runs."""
        while True:
            await asyncio.sleep(ALIVE_INTERVAL_S)
            with suppress(OSError):  # the supervisor has exited
                os.write(self._status_fd, ALIVE)

    def _read_stdin(self) -> None:
        """Handle messages of the supervisor, or the end of standard input, which means that it has exited."""
        received = os.read(sys.stdin.fileno(), _READ_BYTES)
        if not received:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._stopping.set()
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            self._handle(line + b"\n")

    def _handle(self, line: bytes) -> None:
        if line == ALL_READY:
            self._repository.peers_starting = False
            return
        message = msgspec.json.decode(line, type=Update | ChangeReply)
        if isinstance(message, Update):
            self._start(self._update(message))
        else:
            self._control.on_reply(message)

    async def _update(self, update: Update) -> None:
        errors = await self._repository.update(update.files, _log_event)
        self._send(Updated(update.number, {key: error[:_MAX_ERROR] for key, error in errors.items()}))

    def _send(self, message: Updated | ChangeRequest) -> None:
        with suppress(OSError):  # the supervisor has exited
            os.write(self._status_fd, msgspec.json.encode(message) + b"\n")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _log_event(event: str) -> None:
    with suppress(OSError):  # standard error may no longer be read
        print(printable(f"note: worker {os.getpid()} {event}"), file=sys.stderr, flush=True)  # noqa: T201


def main() -> int:
    """Run a worker and return its exit status: 0 if it was stopped, 2 for an invalid file or setting, or 70."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the supervisor handles it
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    start = msgspec.json.decode(_read_line(), type=Start)
    configure_process(start.settings)
    with suppress_pillow_warnings, suppress(BrokenPipeError), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            return runner.run(_run(start))
        except CifarxError as error:
            with suppress(BrokenPipeError):  # the supervisor prints the error, once for all workers
                os.write(start.status_fd, msgspec.json.encode([error.problem, error.remedy]) + b"\n")
            return error.exit_status
    return 0


async def _run(start: Start) -> int:
    return await Worker(start).run()


def _read_line() -> bytes:
    """Read the first line of standard input byte by byte, so that what follows is left for the event loop."""
    line = bytearray()
    while (byte := os.read(sys.stdin.fileno(), 1)) not in (b"\n", b""):
        line += byte
    return bytes(line)


def _loop_factory() -> "type[asyncio.AbstractEventLoop] | None":
    """Return uvloop's event loop; None on Windows, which has no uvloop."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.Loop


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # ONNX Runtime would take 40 ms to free what the system frees anyway
