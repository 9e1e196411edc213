"""Figures that processes share by files, as prometheus_client does it, written some at a time."""

import asyncio
import os
from collections import defaultdict
from typing import Any, Final

from prometheus_client.values import MultiProcessValue

_PAUSE_S: Final = 0.1
"""How late other processes may see what was added; a process that is killed loses as much."""


class SharedFigures:
    """What is added to figures, in an event loop, is held a while: a small request adds to five, 2 us each to write.

    Attributes:
        value_class: what prometheus_client makes its figures of, once `prometheus_client.values.ValueClass` is set.
    """

    def __init__(self) -> None:
        number = os.getpid()  # else the library asks the system at every count
        shared: Any = MultiProcessValue(lambda: number)
        held: defaultdict[Any, float] = defaultdict(float)
        write = self.write

        class HeldValue(shared):  # type: ignore[misc]
            """A figure, and what waits to be added to it."""

            def inc(self, amount: float) -> None:
                if not held:
                    asyncio.get_running_loop().call_later(_PAUSE_S, write)
                held[self] += amount

        self.value_class = HeldValue
        self._held = held
        self._add = shared.inc

    def write(self) -> None:
        """To the files, now; in the thread that counts."""
        held = dict(self._held)
        self._held.clear()
        for figure, amount in held.items():
            self._add(figure, amount)
