"""SIGINT and SIGTERM while a run trains: the step is finished and saved before the process ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether the process was told to stop.

    Attributes:
        signal_number: of the signal, or None.
    """

    signal_number: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second Ctrl-C is not held back: whoever presses it twice means at once."""
        del frame
        self.signal_number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def catch_signals() -> Iterator[Interruption]:
    """Within the block both signals are noted and nothing else; afterwards they mean what they did before.

    Python hands signals to the main thread alone: elsewhere nothing is changed, and nothing is ever noted.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interruption.note) for number in numbers}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
