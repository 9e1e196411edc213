"""Import the user's own code, which only a reference given by the user can name.

A reference is `FILE.py:CALLABLE` or `package.module:CALLABLE`, where CALLABLE is a class, a function or an object, also
one inside of another, such as `nets.Small`.
"""

import hashlib
import importlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import module_from_spec, spec_from_file_location
from modulefinder import ModuleFinder
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any, Final, NamedTuple

from cifarx_serve.errors import CifarxError, UsageError, error_message, unknown_name_error
from cifarx_serve.files.regular_file import read_regular_file

FILE_SUFFIX: Final = ".py"

_MAX_BYTES: Final = 1 << 24
"""Larger files are no code."""

_DEBUG: Final = "correct the code; CIFARX_DEBUG=1 shows the traceback"

_LIBRARIES: Final = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
_ROOMS: Final = ("cifarx.", "cifarx_export.", "cifarx_train.", "cifarx_serve.")

_imported: dict[Path, tuple[bytes, ModuleType]] = {}
"""The files that were imported, with the content they had then."""


class Reference(NamedTuple):
    """A reference to the user's code.

    Attributes:
        text: the reference as the user gave it.
        module: the path of a file that ends in `.py`, or the dotted name of a module.
        name: the callable, or an empty string if the reference names only a module.
    """

    text: str
    module: str
    name: str

    @property
    def is_file(self) -> bool:
        """Whether the module is a file rather than the name of a module."""
        return self.module.endswith(FILE_SUFFIX)

    @property
    def folder(self) -> Path:
        """The folder whose modules the code can import: that of the file, or the current one."""
        return Path(self.module).resolve().parent if self.is_file else Path.cwd()

    @property
    def portable(self) -> str:
        """The reference without folders, which would reveal details of the machine."""
        module = Path(self.module).name if self.is_file else self.module
        return f"{module}:{self.name}" if self.name else module


def is_reference(text: str) -> bool:
    """Return whether a value names code of the user rather than a network that cifarx knows."""
    return ":" in text or text.endswith(FILE_SUFFIX)


def parse_reference(text: str) -> Reference:
    """Split a reference. The part after the colon can be missing.

    Raises:
        UsageError: it is neither a `.py` file nor the name of a module.
    """
    module, colon, name = text.rpartition(":")
    if not colon or text.endswith(FILE_SUFFIX):
        module, name = text, ""
    is_module = all(part.isidentifier() for part in module.split("."))
    is_name = all(part.isidentifier() for part in name.split(".")) or not name
    if not is_name or not (is_module or module.endswith(FILE_SUFFIX)):
        raise UsageError(
            f"{text!r} does not name code", "write FILE.py:CALLABLE or package.module:CALLABLE, such as model.py:Net"
        )
    return Reference(text, module, name)


def load_user_module(text: str) -> ModuleType:
    """Import the module that a reference names. A callable in the reference is ignored.

    A file is imported under a private name, so that it hides no other module, and again only if it was changed.

    Raises:
        UsageError: there is no such file or module, or its code raises an exception. The message names the line.
    """
    reference = parse_reference(text)
    with running_user_code(reference):
        return _import_file(Path(reference.module)) if reference.is_file else _import_module(reference)


def load_user_object(text: str) -> Any:
    """Return the object that a reference names.

    Raises:
        UsageError: as for `load_user_module`; or the reference names no object, or the module does not contain it.
    """
    reference, module = parse_reference(text), load_user_module(text)
    if not reference.name:
        names = _public_names(module, module)
        example = f", such as {text}:{names[0]}" if names else ""
        raise UsageError(f"{text} does not say which network to use", f"add its class or function{example}")
    found: Any = module
    for part in reference.name.split("."):
        if not hasattr(found, part):
            raise _unknown_error(reference, _public_names(found, module))
        found = getattr(found, part)
    return found


def source_sha256(text: str) -> str:
    """Return the SHA-256 of the source code that a reference names.

    For one file this is the hash of the file. If it imports other modules of its folder, it is the hash of the lines
    `sha256 name` of all these files, sorted by their name relative to the folder.

    Raises:
        UsageError: the code cannot be imported.
    """
    path = Path(load_user_module(text).__file__ or "").resolve()
    finder = ModuleFinder(path=[str(path.parent)])
    finder.run_script(str(path))  # reads the code without running it
    files = {Path(file) for module in finder.modules.values() if (file := getattr(module, "__file__", None))}
    hashes = {file.relative_to(path.parent).as_posix(): hashlib.sha256(file.read_bytes()) for file in files}
    if len(hashes) == 1:
        return hashes.popitem()[1].hexdigest()
    lines = [f"{digest.hexdigest()} {name}\n" for name, digest in sorted(hashes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def running_user_code(reference: Reference) -> Iterator[None]:
    """Run the user's code in a `with` block: importing it, building a network, or calling one.

    Its folder is on the module search path, its output goes to standard error, and its exceptions are reported as one
    line with the place in the code.

    Raises:
        UsageError: the code raised an exception.
    """
    folder = str(reference.folder)
    sys.path.insert(0, folder)
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (CifarxError, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # also SystemExit, from a script that parses arguments
        raise _user_error(reference, error) from error
    finally:
        with suppress(ValueError):  # the code may change the search path
            sys.path.remove(folder)


def _import_file(path: Path) -> ModuleType:
    resolved = path.resolve()
    try:
        content = read_regular_file(resolved, _MAX_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error_message(error)})", "give the path of a Python file") from error
    known = _imported.get(resolved)
    if known and known[0] == content:
        return known[1]
    stem = re.sub(r"\W", "_", path.stem)
    name = f"cifarx_user_{stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(name, resolved)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # for classes that look up their module, such as dataclasses
    try:
        exec(compile(content, str(resolved), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    _imported[resolved] = content, module
    return module


def _import_module(reference: Reference) -> ModuleType:
    try:
        module = importlib.import_module(reference.module)
    except ModuleNotFoundError as error:
        if error.name and f"{reference.module}.".startswith(f"{error.name}."):
            raise UsageError(
                f"there is no module {reference.module}",
                "check its name, install its package, or give the file as FILE.py:CALLABLE",
            ) from error
        raise
    if not getattr(module, "__file__", None):
        raise UsageError(f"{reference.module} is not a module with source code", "name the module inside the package")
    return module


def _public_names(container: Any, module: ModuleType) -> list[str]:
    """Return the names of the callables that are defined in a module; those it imports only if there are no others."""
    names = [name for name, value in vars(container).items() if callable(value) and not name.startswith("_")]
    own = [name for name in names if getattr(vars(container)[name], "__module__", None) == module.__name__]
    return own or names


def _unknown_error(reference: Reference, names: list[str]) -> UsageError:
    if names:
        return unknown_name_error(f"callable of {reference.module}", reference.name, names)
    return UsageError(f"{reference.module} has no callable {reference.name}", "it defines no class and no function")


def _user_error(reference: Reference, error: BaseException) -> UsageError:
    """Return the error for an exception of the user's code."""
    if isinstance(error, SyntaxError) and error.filename:
        name = Path(error.filename).name
        return UsageError(f"{name} line {error.lineno} is not valid Python ({error.msg})", "correct the code")
    installed = sys.modules.get("" if reference.is_file else reference.module)
    place = user_code_line(error, installed) or reference.text
    match error:
        case ModuleNotFoundError():
            return UsageError(f"{place} imports {error.name}, which is not installed", "install it")
        case SystemExit():
            return UsageError(
                f"{place} ends the process when it is imported", 'put what runs under if __name__ == "__main__"'
            )
        case ImportError() if "relative import" in str(error):
            return UsageError(f"{place} uses a relative import", "give the module as package.module:CALLABLE")
    return UsageError(f"{place} raised {type(error).__name__} ({error_message(error)})", _DEBUG)


def user_code_line(error: BaseException, installed: ModuleType | None = None) -> str | None:
    """Return the last line outside of libraries and cifarx that was running, as `model.py line 12`; None if none was.

    Args:
        error: an exception that was raised.
        installed: a module whose folder counts as the user's code although it is among the libraries.
    """
    folder = str(Path(installed.__file__).parent) if installed and installed.__file__ else None
    found = None
    for frame, line in walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        in_library = file.startswith(("<", *_LIBRARIES)) or frame.f_globals.get("__name__", "").startswith(_ROOMS)
        if not in_library or (folder and file.startswith(folder)):
            found = f"{Path(file).name} line {line}"
    return found
