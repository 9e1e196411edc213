"""AOTInductor: the network compiled to a shared library for the CPU, in one package with its spec.

The names of `torch._inductor` used here are still private to PyTorch, though its documentation shows them
("AOTInductor: Ahead-Of-Time Compilation for Torch.Export-ed Models").
"""

import logging
import os
import shutil
import sysconfig
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import nn

from cifarx_export.formats.onnx.converter import example_input
from cifarx_export.formats.registry import Source
from cifarx_serve.backends.torch.aot_inductor import CPU_KEY, SPEC_FILE, target_machine, trust
from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import seal
from cifarx_serve.spec import InputSpec, ModelSpec

_ROOT: Final = "model"
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip archive can say: when it was made is no matter of the file's."""

_OPTIONS: Final[Mapping[str, Any]] = {
    # AVX2, FMA and F16C, which `target_machine` asks for, in place of all that this CPU happens to have.
    "cpp.march": "",
    "cpp.simdlen": 256,
    "cpp.dynamic_threads": True,  # else the number of threads is that of this process, now
    "freezing": True,  # weights are constants: batch normalisation is folded into them
    # Headers compiled once for many packages; each is compiled in a folder of its own here.
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.enable_line_tables": False,  # names of this machine's files
    "aot_inductor.check_lowerbound": False,  # a batch of one is the commonest there is
}


class AotInductorArtifact:
    """A package's entries by name, below its root."""

    def __init__(self, entries: Mapping[str, bytes], machine: str) -> None:
        self._entries = entries
        self._machine = machine

    def describe(self, spec: ModelSpec) -> ModelSpec:
        """With the machine it is for, and the version of torch to the letter: it is linked against no other."""
        facts = {CPU_KEY: self._machine, "torch": str(torch.__version__)}
        return msgspec.structs.replace(spec, exporter={**(spec.exporter or {}), **facts})

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the package with the spec among its extra files, and let this process open it."""
        entries = {**self._entries, f"extra/{SPEC_FILE}": spec.to_json().encode()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in entries.items():
                archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}", _EPOCH), content)
        seal(path)  # now, not after: it changes the bytes that are trusted
        trust(path)


def convert_to_aot_inductor(source: Source) -> AotInductorArtifact:
    """Compile; takes about a minute.

    Raises:
        UsageError: this machine has no C++ compiler, or is not one that packages are compiled for.
    """
    machine = target_machine()
    if machine is None:
        raise UsageError(
            "AOTInductor packages are compiled on Linux, for x86-64 with AVX2, which this machine is not",
            "use --format onnx",
        )
    _require_compiler()
    from torch._inductor.utils import fresh_cache  # takes seconds to import

    # Inductor keeps what it compiles in a folder for all processes of a user; here it goes with the rest.
    with _quiet(), tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):
        package = _compiled(source.module, source.spec.input, Path(folder))
        return AotInductorArtifact(_entries(package, Path(folder)), machine)


def _require_compiler() -> None:
    """As `torch._inductor` looks for it: `$CXX`, else g++."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UsageError(
            f"AOTInductor needs a C++ compiler and there is no {compiler}",
            "install g++, or name a compiler in the environment variable CXX",
        )


def _compiled(module: nn.Module, spec: InputSpec, folder: Path) -> Path:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():  # freezing is for inference alone
        program = torch.export.export(module, (example_input(spec),), dynamic_shapes=({0: batch},))
        try:
            made = torch._inductor.aoti_compile_and_package(
                program, package_path=str(folder / "model.pt2"), inductor_configs=dict(_OPTIONS)
            )
        except torch._inductor.exc.InductorError as error:
            if isinstance(error.inner_exception, OSError):  # a full disk
                raise error.inner_exception from error
            raise
    return Path(made)


def _entries(package: Path, folder: Path) -> dict[str, bytes]:
    """What loading needs of a package: no C++ sources, no paths of this machine."""
    private = [os.fsencode(place) for place in (folder, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))]
    entries = {}
    with zipfile.ZipFile(package) as archive:
        for full_name in archive.namelist():
            name = full_name.partition("/")[2]
            if not name.endswith((".cpp", "/serialization_id")):
                entries[name] = _without(private, archive.read(full_name))
    return entries


def _without(places: list[bytes], content: bytes) -> bytes:
    """Folders written over by as many slashes: texts of error messages, which no code depends on."""
    for place in places:
        content = content.replace(place, b"/" * len(place))
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch tells of its own insides, and that there is no GPU; what matters it raises."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
