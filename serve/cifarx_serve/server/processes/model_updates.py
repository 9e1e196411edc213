"""Which model files the workers serve: the supervisor decides it, and all workers follow at the same time."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from cifarx_serve.errors import CifarxError, unknown_name_error
from cifarx_serve.server.model_changes import ChangeReply, ChangeRequest
from cifarx_serve.server.model_files import absolute_paths, parse_key, scan_repository
from cifarx_serve.server.processes.messages import Update, Updated
from cifarx_serve.server.settings import Settings


class ModelUpdates:
    """The files of the workers, and the changes to them.

    Attributes:
        files: the files by key that workers serve from their start.

    Args:
        settings: the settings of the workers at their start.
        send: sends a message to a worker, by its number.
        workers: returns the numbers of the workers that run now.
    """

    def __init__(
        self, settings: Settings, send: Callable[[int, Update | ChangeReply], None], workers: Callable[[], set[int]]
    ) -> None:
        self.files: dict[str, str] = dict(settings.files)
        self._directory = Path(settings.model_repository) if settings.model_repository else None
        self._polls = settings.model_control == "poll"
        self._given = {key: path for key, path in self.files.items() if not self._is_in_repository(path)}
        self._send = send
        self._workers = workers
        self._lock = asyncio.Lock()
        self._number = 0
        self._pending: set[int] = set()
        self._errors: dict[str, str] = {}
        self._finished = asyncio.Event()

    def known_files(self) -> dict[str, str]:
        """Return the files that can be served: those of the command line, and those of the repository now.

        Raises:
            CifarxError: the repository cannot be read.
        """
        if self._directory is None:
            return self._given
        return self._given | absolute_paths(scan_repository(self._directory))

    def wanted_files(self) -> dict[str, str]:
        """Return the files that should be served: with polling those that are known, otherwise those that are."""
        if not self._polls:
            return self.files
        try:
            return self.known_files()
        except CifarxError:
            return self.files

    async def handle(self, worker: int, request: ChangeRequest) -> None:
        """Load or unload a model as a worker requests, and reply to it when every worker has done so."""
        try:
            await self._change(request)
        except CifarxError as error:
            self._send(worker, ChangeReply(request.id, (error.problem, error.remedy)))
        else:
            self._send(worker, ChangeReply(request.id, None))

    async def _change(self, request: ChangeRequest) -> None:
        async with self._lock:
            known = await asyncio.to_thread(self.known_files)
            model, others = request.model, {k: p for k, p in self.files.items() if parse_key(k).name != request.model}
            versions = {key: path for key, path in known.items() if parse_key(key).name == model}
            if request.action == "unload":
                if not versions and len(others) == len(self.files):
                    raise unknown_name_error("model", model[:80], {parse_key(key).name for key in self.files | known})
                await self._apply(others)
                return
            if not versions:
                raise unknown_name_error("model", model[:80], {parse_key(key).name for key in known})
            kept = {key: path for key, path in self.files.items() if key in others or key in versions}
            errors = await self._serve(kept | versions)
            if failed := [key for key in versions if key in errors]:
                problem, _, remedy = errors[failed[0]].rpartition(": ")
                raise CifarxError(f"cannot load {failed[0]}: {problem}", remedy)

    async def serve(self, files: Mapping[str, str]) -> None:
        """Make all workers serve these files. A model that cannot be loaded is left out, or stays as it was."""
        async with self._lock:
            await self._serve(files)

    async def _serve(self, files: Mapping[str, str]) -> dict[str, str]:
        before = self.files
        errors = await self._apply(files)
        if lost := [key for key in errors if key not in before]:  # it may have been loaded by some workers
            await self._apply({key: path for key, path in files.items() if key not in lost})
        return errors

    async def _apply(self, files: Mapping[str, str]) -> dict[str, str]:
        """Send an update to all workers, and wait until they have followed it or have exited."""
        self.files = dict(files)
        self._number += 1
        self._errors = {}
        self._pending = self._workers()
        self._finished.clear()
        for worker in self._pending:
            self._send(worker, Update(self._number, self.files))
        if self._pending:
            await self._finished.wait()
        return self._errors

    def on_updated(self, worker: int, message: Updated) -> None:
        """Handle the message of a worker that has followed an update."""
        if message.number == self._number:
            self._errors |= message.errors
            self.on_exit(worker)

    def on_exit(self, worker: int) -> None:
        """Wait no longer for a worker: the one that replaces it serves the files from its start."""
        self._pending.discard(worker)
        if not self._pending:
            self._finished.set()

    def _is_in_repository(self, path: str) -> bool:
        return self._directory is not None and Path(path).is_relative_to(self._directory)
