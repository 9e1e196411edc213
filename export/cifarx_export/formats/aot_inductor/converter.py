"""AOTInductor packages: the network compiled to a shared library for the CPU, in one file with its spec.

The functions of `torch._inductor` used here are private, but PyTorch documents them ("AOTInductor: Ahead-Of-Time
Compilation for Torch.Export-ed Models").
"""

import os
import shutil
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from cifarx_export.formats.conversion_errors import reporting_conversion_errors
from cifarx_export.formats.exported_program import export_program
from cifarx_export.formats.quiet import quiet
from cifarx_export.formats.registry import Artifact, ConversionSource
from cifarx_export.formats.traced_module import module_to_trace
from cifarx_export.parity.checks import Check
from cifarx_serve.backends.torch.aot_inductor import CPU_KEY, target_machine, trust_package
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.spec import ModelSpec

_ROOT_FOLDER: Final = "model"
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
"""Timestamp of every entry, so that the bytes do not depend on the time: the earliest that a zip archive can hold."""

_INDUCTOR_OPTIONS: Final[Mapping[str, Any]] = {
    # The instructions that `target_machine` requires: AVX2, FMA and F16C. The default is everything this CPU supports.
    "cpp.march": "",
    "cpp.simdlen": 256,
    "cpp.dynamic_threads": True,  # otherwise the current number of threads is compiled in
    "freezing": True,  # weights become constants, and batch normalization is folded into them
    # Precompiled headers pay off over many packages. Each package is compiled in a folder of its own here.
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.enable_line_tables": False,  # they hold file names of this machine
    "aot_inductor.check_lowerbound": False,  # allow a batch of one, which the lower bound would reject
}


class AotInductorArtifact(Artifact):
    """A compiled package.

    Args:
        entries: content of each file in the package, by name below the root folder.
        facts: facts about the conversion that the spec records.
        checks: what the conversion found about the network.
    """

    def __init__(self, entries: Mapping[str, bytes], facts: Mapping[str, str], checks: Sequence[Check] = ()) -> None:
        self._entries = entries
        self.facts = facts
        self.checks = checks

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the package with the spec among its extra files, and trust it in this process."""
        entries = {**self._entries, f"extra/{SPEC_FILE}": spec.to_json().encode()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in entries.items():
                archive.writestr(zipfile.ZipInfo(f"{_ROOT_FOLDER}/{name}", _EPOCH), content)
        write_checksum(path)  # must come first: it changes the bytes that are trusted
        trust_package(path)


def convert_to_aot_inductor(source: ConversionSource) -> Iterator[AotInductorArtifact]:
    """Compile the network, which takes about a minute. Yields one artifact, or for int8 one per candidate.

    Raises:
        UsageError: there is no C++ compiler, this machine is not of a kind that packages are compiled for, the network
            cannot be compiled, or an option of int8 cannot be followed.
        DataError: int8 cannot be calibrated. See `QuantizationSearch`.
    """
    machine = target_machine()
    if machine is None:
        raise UsageError(
            "AOTInductor packages can only be compiled on Linux, for x86-64 with AVX2",
            "use --format onnx, or export on such a machine",
        )
    _require_compiler()
    # The package is linked against this version of torch only.
    facts = {CPU_KEY: machine, "torch": str(torch.__version__)}
    module, example = module_to_trace(source), source.example_input()
    if source.spec.precision != "int8":
        yield AotInductorArtifact(_compile(module, example), facts)
        return
    # Imported here because not every build of PyTorch has the operators of int8.
    from cifarx_export.formats.aot_inductor.int8 import QuantizationSearch
    from cifarx_export.formats.aot_inductor.operators import write_in_place

    for candidate in QuantizationSearch(module, source).candidates():
        entries = _compile(candidate.network, example, {"post_grad_custom_post_pass": write_in_place})
        yield AotInductorArtifact(entries, {**candidate.facts, **facts}, [candidate.gain])
        if not candidate.gain.passed:
            return  # later candidates have more layers in fp32


def _require_compiler() -> None:
    """Look for the compiler as `torch._inductor` does: `$CXX`, or else g++."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UsageError(
            f"AOTInductor needs a C++ compiler, and {compiler} was not found",
            "install g++, or name a compiler in the environment variable CXX",
        )


def _compile(module: nn.Module, example: Tensor, options: Mapping[str, Any] = MappingProxyType({})) -> dict[str, bytes]:
    """Return the files of a package, by name below the root folder.

    Args:
        module: the network.
        example: the images to export it with.
        options: options of Inductor besides `_INDUCTOR_OPTIONS`.
    """
    from torch._inductor.utils import fresh_cache  # takes seconds to import

    # Inductor has one cache folder for all processes of a user. Here the cache is deleted with the other files.
    with quiet(), tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):
        program = export_program(module, example, "aotinductor")
        with reporting_conversion_errors("aotinductor", module, example), torch.no_grad():  # as freezing requires
            try:
                package = torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=str(Path(folder, "model.pt2")),  # PyTorch requires this suffix
                    inductor_configs={**_INDUCTOR_OPTIONS, **options},
                )
            except torch._inductor.exc.InductorError as error:
                if isinstance(error.inner_exception, OSError):  # such as a full disk
                    raise error.inner_exception from error
                raise
        return _read_entries(Path(package), Path(folder))


def _read_entries(package: Path, folder: Path) -> dict[str, bytes]:
    """Return the files that loading a package needs: no C++ sources, and no paths of this machine."""
    private = [os.fsencode(path) for path in (folder, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))]
    entries = {}
    with zipfile.ZipFile(package) as archive:
        for full_name in archive.namelist():
            name = full_name.partition("/")[2]
            if not name.endswith((".cpp", "/serialization_id")):
                entries[name] = _mask_paths(archive.read(full_name), private)
    return entries


def _mask_paths(content: bytes, paths: list[bytes]) -> bytes:
    """Replace each path by slashes of the same length. The paths occur in error messages, which no code depends on."""
    for path in paths:
        content = content.replace(path, b"/" * len(path))
    return content
