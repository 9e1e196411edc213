"""The exceptions that cifarx raises. Each one says what is wrong, with the value, and how to fix it."""

from collections.abc import Iterable
from typing import Any


class CifarxError(Exception):
    """Base class of all cifarx exceptions.

    Args:
        problem: what is wrong, including the offending value.
        remedy: how to fix it.

    Attributes:
        exit_status: the status with which the command line exits after this error.
    """

    exit_status: int = 2

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(problem, remedy)

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the attributes, for worker processes: the arguments of a subclass can be others."""
        return _restore, (type(self), self.args, vars(self))


def _restore(kind: type[CifarxError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> CifarxError:
    error = kind.__new__(kind, *arguments)
    vars(error).update(attributes)
    return error


class FallbackWarning(UserWarning):
    """Warns that a slower or lesser alternative is used in place of the preferred one."""


class UsageError(CifarxError):
    """Raised for an invalid option, name or combination of options."""


class SpecError(CifarxError):
    """Raised when a model spec is missing, malformed or has a newer schema."""


class ImageError(CifarxError):
    """Raised when a file cannot be read as an image."""


class ModelFileError(CifarxError):
    """Raised when a checkpoint or artifact cannot be read or run."""


class DataError(CifarxError):
    """Raised when a dataset is missing, empty or damaged."""


class DeviceError(CifarxError):
    """Raised when the requested device is not available."""


class DeviceMemoryError(CifarxError):
    """Raised when a device does not have enough free memory."""


class OutputError(CifarxError):
    """Raised when a file or directory cannot be written."""


class DistributedError(CifarxError):
    """Raised when another process of a distributed run has exited or cannot be reached."""


class Interrupted(CifarxError):
    """Raised when a signal interrupts a long operation, after the finished work has been saved.

    Args:
        problem: what was interrupted.
        remedy: how to resume.
        signal_number: the number of the signal. The exit status is 128 plus this number, as in a shell.
    """

    def __init__(self, problem: str, remedy: str, signal_number: int) -> None:
        super().__init__(problem, remedy)
        self.exit_status = 128 + signal_number


class CheckFailed(CifarxError):
    """Raised when a parity check or a requirement fails although the input is valid."""

    exit_status = 1


def error_message(error: BaseException) -> str:
    """Return the message of any exception on one line.

    This is the system's message for an `OSError`, without its number and path. For other exceptions it is the first
    line of the message, or the name of the type if the message is empty.
    """
    message = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (message.strip() or type(error).__name__).splitlines()[0]


def unknown_name_error(kind: str, value: str, choices: Iterable[str]) -> UsageError:
    """Return the error for a name that is not in `choices`. It suggests the closest match.

    Args:
        kind: what the name is for, such as "backend".
        value: the unknown name.
        choices: all valid names.
    """
    from difflib import get_close_matches  # imported here because it is needed only after a mistake

    known = sorted(choices)
    near = get_close_matches(value.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {value!r}", f"{hint}choose from {', '.join(known)}")
