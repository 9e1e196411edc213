"""Runs the command line, and reports every error as one line and an exit status."""

import errno
import io
import os
import sys
import warnings
from typing import Final, NoReturn

import typer

import cifarx_train  # noqa: F401  registers its backend, for a source tree that is not installed
from cifarx.app import app
from cifarx.output.console import note, print_error
from cifarx_serve.errors import CifarxError, FallbackWarning, error_message

# The base class of all usage errors. Typer exports none of its base classes under a stable name.
_UsageError: Final[type[Exception]] = typer.BadParameter.__mro__[2]

_INTERRUPTED: Final = 130
_TRAIN_PACKAGES: Final = frozenset(
    {"torch", "torchvision", "tensorboard", "onnx", "onnxscript", "onnx_ir", "jinja2", "matplotlib", "safetensors"}
)


def main() -> NoReturn:
    """Run the command line and exit: with 0 on success, 1 if a check failed, 2 if the input or the usage is wrong."""
    _show_warnings_as_notes()
    _escape_unencodable_output()
    if os.environ.get("CIFARX_DEBUG"):
        sys.exit(app(standalone_mode=False))
    sys.exit(_run())


def _run() -> int:
    try:
        status = app(standalone_mode=False)
        if status == _INTERRUPTED:  # Typer converts Ctrl-C to this status without a message
            raise KeyboardInterrupt
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of a pipe has closed it
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, status = _describe(error)
        print_error(" ".join(message.split()))
    return status if isinstance(status, int) else 0


def _describe(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit status for an error."""
    match error:
        case CifarxError():
            return str(error), error.exit_status
        case _UsageError():
            return _usage_message(error), 2
        case ModuleNotFoundError():
            return _missing_package_message(error), 2
        case KeyboardInterrupt() | typer.Abort():
            return "interrupted: finished work is kept", _INTERRUPTED
        case OSError() | UnicodeEncodeError() | MemoryError():
            return _system_message(error), 2
        case _:
            what = f"{type(error).__name__} {error}"
            return f"internal error ({what}): run it again with CIFARX_DEBUG=1 and report the traceback", 2


def _system_message(error: OSError | UnicodeEncodeError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory: use smaller images, batches or models, or end other programs"
    if isinstance(error, UnicodeEncodeError):
        return f"a name is not valid UTF-8 ({ascii(error.object)[:200]}): rename the file or directory"
    problem = f"cannot access {error.filename}" if error.filename else "input or output failed"
    remedy = "check the path and the disk"
    if error.errno == errno.ENOSPC:
        import tempfile

        remedy = f"free some space; TMPDIR sets the directory of temporary files, now {tempfile.gettempdir()}"
    return f"{problem} ({error_message(error)}): {remedy}"


def _usage_message(error: Exception) -> str:
    """Return Typer's message on one line, with a reference to the help page."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    command = getattr(getattr(error, "ctx", None), "command_path", "cifarx")
    message = " ".join(message.split()).rstrip(".")
    return f"{message[:1].lower()}{message[1:]}: see `{command} --help`"


def _missing_package_message(error: ModuleNotFoundError) -> str:
    name = (error.name or "").partition(".")[0]
    if name not in _TRAIN_PACKAGES:
        return f"the Python package {name or error} is not installed: reinstall cifarx"
    return f'this command needs {name}, which is not installed: pip install "cifarx[train]"'


def _escape_unencodable_output() -> None:
    """Print characters that the encoding of standard output lacks as escapes, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _show_warnings_as_notes() -> None:
    """Print our own warnings as notes, and hide those of libraries, which users cannot act on."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        note(f"note: {message}")

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", FallbackWarning)
        warnings.showwarning = show
