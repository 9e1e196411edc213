"""The directory `NAME.web` that a static host serves: its files, and the checksums in it."""

import hashlib
import re
from pathlib import Path
from typing import Final

from cifarx_serve.backends.registry import WEB_MODEL
from cifarx_serve.errors import ModelFileError, error_message
from cifarx_serve.files.regular_file import open_regular_file, read_text_file

MODEL_FILE: Final = WEB_MODEL
SPEC_FILE: Final = "cifarx_spec.json"
CHECKSUMS_FILE: Final = "SHA256SUMS"
"""In the format of `sha256sum`, which checks it with `sha256sum --check SHA256SUMS`."""

SCRIPT_FILE: Final = "runtime/ort.js"
WASM_FILE: Final = "runtime/ort.wasm"
"""ONNX Runtime Web, under names with suffixes that every server has a media type for."""

OFFLINE_FILE: Final = "offline.js"
"""The service worker, which directories of older versions do not have."""

PAGE_FILES: Final = ("index.html", "style.css", "page.js", "classifier.js", OFFLINE_FILE)
LICENSE_FILE: Final = "runtime/LICENSE.txt"

FILES: Final = (MODEL_FILE, SPEC_FILE, SCRIPT_FILE, WASM_FILE, LICENSE_FILE, *PAGE_FILES)
"""The files with a checksum."""

_LINE: Final = re.compile(r"([0-9a-f]{64})  ([a-zA-Z0-9_./]{1,60})")


def write_checksums(directory: Path) -> None:
    """Write the checksums of all files, so do it last.

    Raises:
        OSError: a file cannot be read or written.
    """
    lines = [f"{file_sha256(directory / name)}  {name}\n" for name in sorted(FILES)]
    (directory / CHECKSUMS_FILE).write_text("".join(lines), encoding="ascii", newline="\n")


def require_intact_directory(directory: Path) -> dict[str, str]:
    """Check that no file of a directory was changed, and return their SHA-256 by name. Other files are ignored.

    Raises:
        ModelFileError: a file is missing, unreadable or changed.
    """
    checksums = _read_checksums(directory)
    for name, expected in checksums.items():
        try:
            found = file_sha256(directory / name)
        except OSError as error:
            raise ModelFileError(
                f"cannot read {directory / name} ({error_message(error)})", "copy the whole directory"
            ) from error
        if found != expected:
            raise ModelFileError(
                f"the checksum of {directory / name} does not match", "copy the directory again, or export it again"
            )
    return checksums


def _read_checksums(directory: Path) -> dict[str, str]:
    path = directory / CHECKSUMS_FILE
    try:
        text = read_text_file(path)
    except (OSError, UnicodeError) as error:
        raise ModelFileError(f"cannot read {path} ({error_message(error)})", "copy the whole directory") from error
    found = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    checksums = {match[2]: match[1] for match in found if match}
    if len(checksums) != len(found) or checksums.keys() | {OFFLINE_FILE} != set(FILES):
        raise ModelFileError(f"{path} is damaged", "copy the directory again, or export it again")
    return checksums


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        OSError: the file cannot be read, or is not a regular one.
    """
    with open_regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
