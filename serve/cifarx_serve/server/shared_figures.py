"""Figures that processes share by files, as prometheus_client does it, written some at a time."""

import os
from collections import defaultdict
from typing import Any

from prometheus_client.values import MultiProcessValue


class SharedFigures:
    """What this process adds to figures is held until `write`: a small request adds to five, and each write takes 2 us.

    Attributes:
        value_class: what prometheus_client makes its figures of, once `prometheus_client.values.ValueClass` is set.
    """

    def __init__(self) -> None:
        number = os.getpid()  # else the library asks the system at every count
        shared: Any = MultiProcessValue(lambda: number)
        held: defaultdict[Any, float] = defaultdict(float)

        class HeldValue(shared):  # type: ignore[misc]
            """A figure, and what waits to be added to it."""

            def inc(self, amount: float) -> None:
                held[self] += amount

        self.value_class = HeldValue
        self._held = held
        self._add = shared.inc

    def write(self) -> None:
        """To the files; in the thread that counts."""
        for figure, amount in self._held.items():
            self._add(figure, amount)
        self._held.clear()
