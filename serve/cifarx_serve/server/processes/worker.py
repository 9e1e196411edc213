"""The program that serves: one process of several on the same socket.

It is started by the supervisor, with the settings as a line of JSON on standard input; the end of the input, or
SIGTERM, has it answer what it has accepted and end. SIGHUP has it look for new versions of the files.
"""

import asyncio
import os
import signal
import socket
import sys
import warnings
from contextlib import suppress
from typing import Final

import msgspec

from cifarx_serve.errors import CifarxError
from cifarx_serve.images.reader import without_pillows_warnings
from cifarx_serve.server.app import create_app, prepare_process
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.listener import HttpServer
from cifarx_serve.server.processes.messages import ALL_READY, READY, Start

_PROBE_S: Final = 1.0
_PROBES: Final = 5
"""A model that has failed is tried so often, at most every `_PROBE_S`; then the process ends, and another begins."""

FAILED: Final = 70
"""The exit status of a worker whose model has failed for good (EX_SOFTWARE of sysexits.h)."""


class Worker:
    """One process's server, from its start to its end."""

    def __init__(self, start: Start) -> None:
        settings = start.settings
        self._at_once = start.at_once
        self._status = start.status
        self._log = AccessLog(sys.stdout.buffer) if settings.access_log else None
        self._service, application, self._metrics = create_app(settings, self._log)
        self._service.awaits_others = start.at_once
        self._server = HttpServer(application, settings, socket.socket(fileno=start.listener))
        self._ending = asyncio.Event()
        self._failed = False

    async def run(self) -> int:
        """Serve until told to end; the exit status."""
        swapping: set[asyncio.Task[None]] = set()

        def swap() -> None:
            task = asyncio.create_task(self._service.swap(_tell))
            swapping.add(task)
            task.add_done_callback(swapping.discard)

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._ending.set)
        loop.add_signal_handler(signal.SIGHUP, swap)
        loop.add_reader(sys.stdin.fileno(), self._hear)
        if self._at_once:
            self._server.start()
        opening = asyncio.create_task(self._service.open())
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait([opening, ending], return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
            if not self._at_once:
                self._server.start()
            os.write(self._status, READY)
            watching = asyncio.create_task(self._watch())
            await ending
            watching.cancel()
        await self._end()
        return FAILED if self._failed else 0

    async def _end(self) -> None:
        self._service.draining = True
        await self._server.drain()
        self._metrics.write()
        if self._log:
            self._log.flush()

    async def _watch(self) -> None:
        """Whether the models answer; a process in which one does not is of no use."""
        failures = 0
        while failures < _PROBES:
            await asyncio.sleep(_PROBE_S)
            failures = 0 if await self._service.probe() else failures + 1
        self._failed = True
        self._ending.set()

    def _hear(self) -> None:
        """From the supervisor `ALL_READY` may come; when it is gone its end of the pipe is closed."""
        if os.read(sys.stdin.fileno(), len(ALL_READY)):
            self._service.awaits_others = False
        else:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._ending.set()


def _tell(line: str) -> None:
    with suppress(OSError):  # nobody reads it any more
        print(f"note: worker {os.getpid()} {line}", file=sys.stderr, flush=True)  # noqa: T201


def main() -> int:
    """Serve; the exit status: 0 it was told to end, 2 a file or a setting is wrong, `FAILED`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the supervisor decides
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    start = msgspec.json.decode(_line(), type=Start)
    prepare_process(start.settings)
    with without_pillows_warnings, suppress(BrokenPipeError), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            return runner.run(_serve(start))
        except CifarxError as error:
            with suppress(BrokenPipeError):  # the supervisor tells it, once for all workers
                os.write(start.status, msgspec.json.encode([error.problem, error.remedy]) + b"\n")
            return error.exit_status
    return 0


async def _serve(start: Start) -> int:
    return await Worker(start).run()


def _line() -> bytes:
    """The first line of standard input, byte by byte: what follows it is for the event loop."""
    line = bytearray()
    while (byte := os.read(sys.stdin.fileno(), 1)) not in (b"\n", b""):
        line += byte
    return bytes(line)


def _loop_factory() -> "type[asyncio.AbstractEventLoop] | None":
    """uvloop's, where there is one: not on Windows."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.Loop


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # what ONNX Runtime would take 40 ms to give back, the system takes back
