"""What the tests of the format `web` need: Node.js and the npm package. `make test-web` installs it."""

import os
import shutil
from pathlib import Path

import pytest

from cifarx_serve.backends.web.directory import FILES, MODEL_FILE, SPEC_FILE, write_checksums
from cifarx_serve.backends.web.node_package import find_package
from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import write_checksum
from tests.support.color_model import SPEC, write_onnx


def _missing() -> str | None:
    if shutil.which("node") is None:
        return "no node on the PATH"
    try:
        package = find_package()
    except UsageError as error:
        return f"{error.problem}: run `make test-web`"
    os.environ["NODE_PATH"] = str(package.folder.parent)  # tests run in other directories
    return None


MISSING = _missing()
"""Why a model cannot run, or None."""

requires_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node on the PATH")
requires_web = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def write_web_directory(directory: Path, document: str = SPEC.to_json()) -> Path:
    """Write a directory with the tiny model, and with texts in place of the page and the runtime."""
    (directory / "runtime").mkdir(parents=True)
    for name in FILES:
        (directory / name).write_text(f"the file {name}\n", encoding="utf-8")
    write_onnx(directory / MODEL_FILE, document)
    write_checksum(directory / MODEL_FILE)
    (directory / SPEC_FILE).write_text(document, encoding="utf-8")
    write_checksums(directory)
    return directory


def install_runtime(directory: Path) -> None:
    """Put the installed runtime into a directory, and update its checksums."""
    package = find_package()
    shutil.copyfile(package.script, directory / "runtime" / "ort.js")
    shutil.copyfile(package.wasm, directory / "runtime" / "ort.wasm")
    write_checksums(directory)
