"""Clients that run in threads until they are stopped."""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self


class ClientThreads:
    """A thread per client, from the start to the end of a `with` block.

    Args:
        clients: the functions to run. Each returns soon after `stopping` is set.
    """

    def __init__(self, clients: Sequence[Callable[[], None]]) -> None:
        self.stopping = threading.Event()
        self._threads = [threading.Thread(target=client) for client in clients]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Wait until every client has returned."""
        self.stopping.set()
        for thread in self._threads:
            thread.join()
