"""Metrics that processes share through files, as in prometheus_client, but with buffered writes."""

import asyncio
from collections import defaultdict
from typing import Any, Final

from prometheus_client.values import MultiProcessValue

_FLUSH_INTERVAL_S: Final = 0.1
"""How late other processes can see an increment, and how much of the metrics a killed process loses."""


class BufferedValues:
    """Buffers the increments made in an event loop: a small request makes five, and writing each one takes 2 us.

    Args:
        worker: the number of this process, which is in the names of its files.

    Attributes:
        value_class: the class of values, to be assigned to `prometheus_client.values.ValueClass`.
    """

    def __init__(self, worker: int) -> None:
        base: Any = MultiProcessValue(lambda: worker)
        buffer: defaultdict[Any, float] = defaultdict(float)
        flush = self.flush

        class BufferedValue(base):  # type: ignore[misc]
            """A value with increments that are not written yet."""

            def inc(self, amount: float) -> None:
                if not buffer:
                    asyncio.get_running_loop().call_later(_FLUSH_INTERVAL_S, flush)
                buffer[self] += amount

        self.value_class = BufferedValue
        self._buffer = buffer
        self._increment = base.inc

    def flush(self) -> None:
        """Write the buffered increments to the files. Call it in the thread of the event loop."""
        buffered = dict(self._buffer)
        self._buffer.clear()
        for value, amount in buffered.items():
            self._increment(value, amount)
