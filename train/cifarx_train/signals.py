"""SIGINT and SIGTERM during training: the current step is finished and saved before the process exits."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class ReceivedSignal:
    """The signal that asked the process to stop.

    Attributes:
        number: the number of the signal, or None if none was received.
    """

    number: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the signal. This is the signal handler; a second Ctrl-C raises KeyboardInterrupt immediately."""
        del frame
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def catch_signals() -> Iterator[ReceivedSignal]:
    """Record SIGINT and SIGTERM within the block instead of acting on them, then restore the previous handlers.

    Ignored signals stay ignored. Python delivers signals only to the main thread; in other threads the handlers are
    left unchanged and nothing is recorded.
    """
    received = ReceivedSignal()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, received.handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
