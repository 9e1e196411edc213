"""Run AOTInductor packages, `.aoti.pt2`: models compiled to machine code for the CPU.

Opening a package runs the machine code in it, like loading any shared library, and no check can make that safe. So a
package is opened only if this process compiled it, as an export does before it checks parity, or if the user sets
`CIFARX_TRUST_AOTI=1` because the package comes from a trusted source. Reading the spec runs no code of the package.
"""

import os
import platform
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import parse_spec, require_file
from cifarx_serve.backends.torch.base import SPEC_FILE, TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, ModelFileError, OutputError, UsageError, error_message
from cifarx_serve.spec import ModelSpec

TRUST_VARIABLE: Final = "CIFARX_TRUST_AOTI"
"""The environment variable that allows packages to run their code."""

CPU_KEY: Final = "cpu"
"""The key in `spec.exporter` for the machine that a package was compiled for, as `target_machine` returns it."""

_MAX_SPEC_BYTES: Final = 1 << 24

# Every entry that an export writes, in the one directory that a PyTorch archive has. Other entries are refused before
# the library reads them, because it would also unpickle some of them.
_ENTRY: Final = re.compile(
    r"[A-Za-z0-9_-]+/(?:\.data/(?:version|serialization_id)|version|byteorder|archive_format|archive_version"
    rf"|extra/{re.escape(SPEC_FILE)}|data/aotinductor/model/[A-Za-z0-9_]+\.[a-z]+(?:\.so|\.json|_metadata\.json))"
)

_trusted: set[str] = set()


class AotInductorBackend(TorchBackend):
    """A loaded package, on the CPU."""

    name = "aot_inductor"

    def __init__(self, path: Path, device: Device) -> None:
        require_file(path)
        if device.type not in ("auto", "cpu"):
            raise DeviceError(
                f"{path} contains machine code for the CPU, but {device.type} was requested", "use --device cpu"
            )
        self.spec = self.read_spec(path)
        _require_trust(path)
        import torch

        from cifarx_serve.backends.torch.device import torch_device

        target = torch_device(Device("cpu"))
        _require_same_machine(self.spec, path)
        # Unpacked here, because the library would keep its unpacked files until the model is freed, and so leave them
        # behind if the process is killed, like a server's worker. Loaded code no longer needs its file.
        try:
            with TemporaryDirectory(prefix="cifarx_aoti_") as folder:
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(folder)
                # Not `torch._inductor.aoti_load_package`, which imports the whole compiler.
                loader = torch._C._aoti.AOTIModelPackageLoader(folder, "model", False, 1, -1)
        except OSError as error:
            problem = f"cannot unpack {path} in the temporary directory ({error_message(error)})"
            raise OutputError(problem, "free some space, or set TMPDIR to another directory") from error
        except Exception as error:  # the exceptions of zipfile and of the library's C++ have no common base class
            _raise_invalid(path, error_message(error), error)
        self._init_module(loader, target)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a package without PyTorch and without running any code of the package."""
        require_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                if problem := _archive_problem(archive.infolist(), path.stat().st_size):
                    _raise_invalid(path, problem)
                names = [name for name in archive.namelist() if name.endswith(f"/extra/{SPEC_FILE}")]
                document = archive.read(names[0]) if names else None
        except ModelFileError:
            raise
        except Exception as error:  # the exceptions of zipfile for damaged archives have no common base class
            _raise_invalid(path, error_message(error), error)
        return parse_spec(document, path)

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        with self._torch.inference_mode(), self._report_out_of_memory(len(batch)):
            # The compiled code assumes the strides of a contiguous batch without checking them.
            (outputs,) = self._module.run([self._torch.from_numpy(np.ascontiguousarray(batch))])
        array: NDArray[np.float32] = outputs.numpy()
        return array


def trust_package(path: Path) -> None:
    """Allow this process to open a package with the content of this file, because this process compiled it."""
    _trusted.add(_sha256(path))


def trusted_packages() -> tuple[str, ...]:
    """Return the hashes of the packages that this process may open, so that a worker of it may open them too."""
    return tuple(sorted(_trusted))


def trust_packages(hashes: Iterable[str]) -> None:
    """Allow this process to open what its parent process may open."""
    _trusted.update(hashes)


def target_machine() -> str | None:
    """Return the kind of machine that packages are compiled for, or None if this machine cannot run them.

    Packages run on every x86-64 CPU with AVX2 under Linux.
    """
    import torch

    machine = (sys.platform, platform.machine(), torch.backends.cpu.get_cpu_capability())
    return "linux x86_64 avx2" if machine[:2] == ("linux", "x86_64") and machine[2] in ("AVX2", "AVX512") else None


def _require_trust(path: Path) -> None:
    if os.environ.get(TRUST_VARIABLE) == "1" or (_trusted and _sha256(path) in _trusted):
        return
    raise UsageError(
        f"{path} contains machine code, which runs when the file is opened",
        f"set {TRUST_VARIABLE}=1 if you trust its source, or use an ONNX file",
    )


def _require_same_machine(spec: ModelSpec, path: Path) -> None:
    import torch

    exporter, version = spec.exporter or {}, str(torch.__version__)
    if exporter.get("torch") != version:
        raise ModelFileError(
            f"{path} was compiled for torch {exporter.get('torch')}, but torch {version} is installed",
            "export it again with this version",
        )
    if exporter.get(CPU_KEY) != target_machine():
        raise ModelFileError(
            f"{path} was compiled for {exporter.get(CPU_KEY)}, which is not this machine",
            "export it again on this machine, or use an ONNX file",
        )


def _archive_problem(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    """Return why an archive cannot come from an export, or None."""
    names = [entry.filename for entry in entries]
    for entry in entries:
        if not _ENTRY.fullmatch(entry.filename) or entry.filename.partition("/")[0] != names[0].partition("/")[0]:
            return f"an unexpected entry {entry.filename!r}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            return f"{entry.filename} is compressed"
        if entry.filename.endswith(SPEC_FILE) and entry.file_size > _MAX_SPEC_BYTES:
            return f"a spec of {entry.file_size} bytes"
    if len(set(names)) != len(names):
        return "a duplicate entry"
    if sum(entry.file_size for entry in entries) > size:
        return "overlapping entries"
    return None


def _raise_invalid(path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    raise ModelFileError(f"{path} is not an AOTInductor package ({reason})", "export it again") from cause


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
