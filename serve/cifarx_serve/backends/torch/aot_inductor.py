"""AOTInductor packages: `.aoti.pt2` files, a network compiled to machine code for the CPU.

Opening a package runs the machine code in it, as loading any shared library does; no check of a file can make that
safe. So a package is opened only where this process compiled it itself (an export proves what it made), or where the
user says with `CIFARX_TRUST_AOTI=1` that it comes from where they trust. Reading its spec runs nothing of it.
"""

import os
import platform
import re
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import require_file
from cifarx_serve.backends.torch.base import TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, ModelFileError, OutputError, UsageError
from cifarx_serve.spec import ModelSpec

SPEC_FILE: Final = "cifarx_spec.json"
"""The name of the model spec among a package's extra files."""

TRUST: Final = "CIFARX_TRUST_AOTI"
"""The environment variable with which a user says that packages may run their code."""

CPU_KEY: Final = "cpu"
"""What `spec.exporter` calls the machine that a package was compiled for, as `target_machine` names it."""

_MAX_SPEC_BYTES: Final = 1 << 24

# All that an export writes, in the one folder that every entry of a PyTorch archive lies in. Nothing else is let
# through to the library, which would also read pickles there.
_ENTRY: Final = re.compile(
    r"[A-Za-z0-9_-]+/(?:\.data/(?:version|serialization_id)|version|byteorder|archive_format|archive_version"
    rf"|extra/{re.escape(SPEC_FILE)}|data/aotinductor/model/[A-Za-z0-9_]+\.[a-z]+(?:\.so|_metadata\.json))"
)

_trusted: set[str] = set()


class AotInductorBackend(TorchBackend):
    """A loaded package, on the CPU."""

    name = "aot_inductor"
    suffixes = (".aoti.pt2",)

    def __init__(self, path: Path, device: Device) -> None:
        require_file(path)
        if device.kind not in ("auto", "cpu"):
            raise DeviceError(
                f"{path} holds machine code for the CPU and {device.kind} was asked for", "use --device cpu"
            )
        self.spec = self.read_spec(path)
        _require_trust(path)
        import torch

        from cifarx_serve.backends.torch.device import torch_device

        place = torch_device(Device("cpu"))
        _require_same_machine(self.spec, path)
        # Unpacked here: the library keeps what it unpacks until the model is freed, and so for ever if the process is
        # ended first, as a server's worker is. Code that is loaded needs its file no more.
        try:
            with TemporaryDirectory(prefix="cifarx_aoti_") as folder:
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(folder)
                # Not `torch._inductor.aoti_load_package`: it imports the whole compiler to load what is compiled.
                loader = torch._C._aoti.AOTIModelPackageLoader(folder, "model", False, 1, -1)
        except OSError as error:
            problem = f"cannot unpack {path} in the temporary folder ({error.strerror or error})"
            raise OutputError(problem, "make room there, or name another in TMPDIR") from error
        except Exception as error:  # what zipfile and the library's C++ raise has no common base
            _refuse(path, (str(error).strip() or type(error).__name__).splitlines()[0], error)
        self._hold(loader, place)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Needs no PyTorch and runs nothing of the file: the package is a zip archive."""
        require_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                if problem := _problem(archive.infolist(), path.stat().st_size):
                    _refuse(path, problem)
                names = [name for name in archive.namelist() if name.endswith(f"/extra/{SPEC_FILE}")]
                document = archive.read(names[0]) if names else None
        except ModelFileError:
            raise
        except Exception as error:  # what zipfile raises on damaged archives has no common base
            _refuse(path, " ".join(str(error).split()), error)
        if document is None:
            raise ModelFileError(f"{path} carries no model spec", "make it with `cifarx export`")
        return ModelSpec.from_json(document, str(path))

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            # The compiled code takes any strides for those of a contiguous batch.
            (logits,) = self._module.run([self._torch.from_numpy(np.ascontiguousarray(batch))])
        array: NDArray[np.float32] = logits.numpy()
        return array


def trust(path: Path) -> None:
    """Let this process open a package with these bytes: it compiled them itself."""
    _trusted.add(_sha256(path))


def target_machine() -> str | None:
    """What packages are compiled for, where this machine can run them; None where it cannot.

    Every x86-64 with AVX2 runs them, be it otherwise of any make.
    """
    import torch

    machine = (sys.platform, platform.machine(), torch.backends.cpu.get_cpu_capability())
    return "linux x86_64 avx2" if machine[:2] == ("linux", "x86_64") and machine[2] in ("AVX2", "AVX512") else None


def _require_trust(path: Path) -> None:
    if os.environ.get(TRUST) == "1" or (_trusted and _sha256(path) in _trusted):
        return
    raise UsageError(
        f"{path} holds machine code, which opening it runs",
        f"set {TRUST}=1 if you trust where it comes from, or use an ONNX file",
    )


def _require_same_machine(spec: ModelSpec, path: Path) -> None:
    import torch

    said, version = spec.exporter or {}, str(torch.__version__)
    if said.get("torch") != version:
        raise ModelFileError(
            f"{path} was compiled against torch {said.get('torch')} and this is {version}",
            "export it again with this one",
        )
    if said.get(CPU_KEY) != target_machine():
        raise ModelFileError(
            f"{path} was compiled for {said.get(CPU_KEY)}, which this machine is not",
            "export it again on this machine, or use an ONNX file",
        )


def _problem(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    """Why an archive is not one that an export wrote: a foreign entry, one twice, or more than its bytes can hold."""
    names = [entry.filename for entry in entries]
    for entry in entries:
        if not _ENTRY.fullmatch(entry.filename) or entry.filename.partition("/")[0] != names[0].partition("/")[0]:
            return f"a strange entry {entry.filename!r}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            return f"{entry.filename} is compressed"
        if entry.filename.endswith(SPEC_FILE) and entry.file_size > _MAX_SPEC_BYTES:
            return f"a spec of {entry.file_size} bytes"
    if len(set(names)) != len(names):
        return "an entry that is there twice"
    if sum(entry.file_size for entry in entries) > size:
        return "entries that overlap"
    return None


def _refuse(path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    raise ModelFileError(f"{path} is not an AOTInductor package ({reason})", "export it again") from cause


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
