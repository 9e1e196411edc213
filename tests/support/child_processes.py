"""The processes that a test has started."""

from contextlib import suppress

import psutil


def running_children(word: str) -> list[psutil.Process]:
    """Return the running child processes with a word in their command lines.

    Other tests of this process may leave children. One that has just ended has no command line any more.
    """
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # also the base class of psutil.ZombieProcess
            if word in " ".join(child.cmdline()):
                found.append(child)
    return found
