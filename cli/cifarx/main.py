"""The program `cifarx`: runs a command and turns what goes wrong into one line and an exit status."""

import os
import sys
import warnings
from typing import Final, NoReturn

import typer

import cifarx_train  # noqa: F401  offers its backend, also where no entry point does
from cifarx.app import app
from cifarx.output.console import failure, note
from cifarx_serve.errors import CifarxError, FallbackWarning, error_message

# The base of every usage error; Typer exports none of its ancestors by a name that stays.
_UsageProblem: Final[type[Exception]] = typer.BadParameter.__mro__[2]

_CTRL_C: Final = 130
_TRAIN_PACKAGES: Final = frozenset(
    {"torch", "torchvision", "tensorboard", "onnx", "onnxscript", "onnx_ir", "jinja2", "matplotlib"}
)


def main() -> NoReturn:
    """Run the command line and exit: 0 it holds, 1 a check failed, 2 the input or the usage is wrong."""
    _show_notes()
    if os.environ.get("CIFARX_DEBUG"):
        sys.exit(app(standalone_mode=False))
    sys.exit(_run())


def _run() -> int:
    try:
        status = app(standalone_mode=False)
        if status == _CTRL_C:  # Typer makes a status of it, and says nothing
            raise KeyboardInterrupt
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing is wrong
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, status = _explain(error)
        failure(f"error: {' '.join(message.split())}")
    return status if isinstance(status, int) else 0


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    match error:
        case CifarxError():
            told = str(error), error.exit_status
        case _UsageProblem():
            told = _usage(error), 2
        case ModuleNotFoundError():
            told = _missing(error), 2
        case KeyboardInterrupt() | typer.Abort():
            told = "interrupted: what was finished is kept", _CTRL_C
        case OSError():
            where = f" {error.filename}" if error.filename else ""
            told = f"the system refused{where} ({error_message(error)}): check the path and the disk", 2
        case _:
            what = f"{type(error).__name__} {error}"
            told = f"a defect of cifarx ({what}): report it with what CIFARX_DEBUG=1 shows", 2
    return told


def _usage(error: Exception) -> str:
    """Typer's own words on one line, and where to read on."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    command = getattr(getattr(error, "ctx", None), "command_path", "cifarx")
    message = " ".join(message.split()).rstrip(".")
    return f"{message[:1].lower()}{message[1:]}: see `{command} --help`"


def _missing(error: ModuleNotFoundError) -> str:
    name = (error.name or "").partition(".")[0]
    if name not in _TRAIN_PACKAGES:
        return f"the Python package {name or error} is not installed: install cifarx again"
    return f'{name} is not installed, and this command needs it: pip install "cifarx[train]"'


def _show_notes() -> None:
    """Our own warnings are notes to the user; those of libraries say nothing that a user could act on."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        note(f"note: {message}")

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", FallbackWarning)
        warnings.showwarning = show
