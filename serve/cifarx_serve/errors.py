"""Every error a user can meet: what was wrong, with the value, and how to mend it."""

from collections.abc import Iterable


class CifarxError(Exception):
    """Base of all errors raised on purpose.

    Args:
        problem: what was wrong, naming the value.
        remedy: how to mend it.
    """

    exit_status: int = 2

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}: {remedy}")


class FallbackWarning(UserWarning):
    """Something less than the best was taken, as `auto` may: told once, never silently."""


class UsageError(CifarxError):
    """An option, a name or a combination of them that means nothing."""


class SpecError(CifarxError):
    """A model spec that is missing, malformed or of a newer schema."""


class ImageError(CifarxError):
    """A file that cannot be read as an image."""


class ModelFileError(CifarxError):
    """A checkpoint or artifact that cannot be read or run."""


class DataError(CifarxError):
    """A data set that is absent, empty or damaged."""


class DeviceError(CifarxError):
    """A device that was asked for and cannot be had."""


class OutputError(CifarxError):
    """A file or folder that cannot be written."""


class PeerLost(CifarxError):
    """Another process that this one works with has ended."""


class Interrupted(CifarxError):
    """A signal ended long work; what was done is saved, and told how to go on with."""

    def __init__(self, problem: str, remedy: str, signal_number: int) -> None:
        super().__init__(problem, remedy)
        self.exit_status = 128 + signal_number  # as a shell reports a process that a signal ended


class CheckFailed(CifarxError):
    """A proof or a budget that does not hold; nothing was wrong with the input."""

    exit_status = 1


def unknown(kind: str, value: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is none of `choices`, with the nearest of them."""
    from difflib import get_close_matches  # only a mistake should pay for it

    known = sorted(choices)
    near = get_close_matches(value.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {value!r}", f"{hint}known are {', '.join(known)}")
