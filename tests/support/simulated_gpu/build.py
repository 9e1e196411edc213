"""Compile CUDA libraries that run without a GPU, for the packages of this environment. See runtime.c for their rules.

PyTorch's and ONNX Runtime's own CUDA code then runs: it allocates, copies, launches kernels, and captures and replays
graphs. The kernels compute nothing. Functions that are not written in C are generated: those that compute launch a
kernel, and the others succeed without an effect. Functions of the runtime and the driver fail as not supported.
"""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

_SOURCES: Final = Path(__file__).parent
_PACKAGES: Final = Path(sysconfig.get_path("purelib"))


def _not_supported(name: str) -> str:
    return f"int {name}() {{ return 801; }}"


def _succeeds(name: str) -> str:
    return f"int {name}() {{ return 0; }}"


def _launches_kernel(name: str) -> str:
    """Return a function that launches a kernel on the stream at the start of its handle, the first argument."""
    return f"int {name}(void **handle) {{ return simulated_launch(*handle); }}"


def _cublas_function(name: str) -> str:
    return _succeeds(name) if re.match("cublas([GS]et|Xt|Logger)", name) else _launches_kernel(name)


def _cudnn_function(name: str) -> str:
    computes = re.search("Forward|Backward|Reduce|(Add|Op|Scale|Transform|Set)Tensor$|CTCLoss$", name)
    return _launches_kernel(name) if computes and not re.search("Get|Find|Create|Destroy", name) else _succeeds(name)


class _Library(NamedTuple):
    """A library of NVIDIA's packages.

    Attributes:
        source: the C file.
        installed: the pattern of the real library in the packages, for its name, its version and its functions.
        generate: returns the code of a function that is not in the C file.
    """

    source: str
    installed: str
    generate: Callable[[str], str]


_LIBRARIES: Final = (
    _Library("runtime.c", "nvidia/cu*/lib/libcudart.so.[0-9]*", _not_supported),
    _Library("cublaslt.c", "nvidia/cu*/lib/libcublasLt.so.[0-9]*", _succeeds),
    _Library("cublas.c", "nvidia/cu*/lib/libcublas.so.[0-9]*", _cublas_function),
    _Library("cudnn.c", "nvidia/cudnn/lib/libcudnn.so.[0-9]*", _cudnn_function),
)
"""The runtime comes first, because the others call it."""

_HEADERS: Final = ("nvidia/cu*/include", "nvidia/cudnn/include", "triton/backends/nvidia/include")
"""The folders with the headers of CUDA, of cuDNN, and those that only the package of Triton includes."""


def missing_requirement() -> str | None:
    """Return why the libraries cannot be built here, or None."""
    tools = (f"{tool} is not installed" for tool in ("gcc", "nm") if shutil.which(tool) is None)
    patterns = (*_HEADERS, *(library.installed for library in _LIBRARIES))
    files = (f"no {pattern} among the installed packages" for pattern in patterns if not _find(pattern))
    return next(iter((*tools, *files)), None)


def build_libraries(folder: Path) -> list[Path]:
    """Build all libraries into a folder, in two seconds, and return their paths in the order to load them."""
    built: list[Path] = []
    for library in _LIBRARIES:
        real = _installed(library.installed)
        # The real libraries give their functions their own name as a version, and programs ask for it.
        versions = folder / f"{real.name}.map"
        versions.write_text(f"{real.name} {{ global: *; }};\n")
        functions = map(library.generate, _exported_functions(real))
        built.append(
            _compile(folder, real.name, library.source, functions, *built[:1], f"-Wl,--version-script={versions}")
        )
    declared = re.findall(r"CUDAAPI (cu\w+)\(", (_installed(_HEADERS[0]) / "cuda.h").read_text())
    built.append(_compile(folder, "libcuda.so.1", "driver.c", map(_not_supported, set(declared)), built[0]))
    built.append(_compile(folder, "libnvidia-ml.so.1", "nvml.c", [], built[0]))
    built.append(_compile(folder, "libcurand.so.10", None, []))  # ONNX Runtime needs the library and no function of it
    return built


def _compile(folder: Path, name: str, source: str | None, generated: Iterable[str], *arguments: object) -> Path:
    """Compile a library from a C file and generated functions, of which those in the C file are left out."""
    code = folder / f"{name}.generated.c"
    lines = ["int simulated_launch(void *stream);", *(f"__attribute__((weak)) {line}" for line in generated)]
    code.write_text("\n".join(lines) + "\n")
    sources = [code] if source is None else [code, _SOURCES / source]
    includes = [f"-I{path}" for path in (_SOURCES, *map(_installed, _HEADERS))]
    target = folder / name
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", *includes, *sources, *arguments, "-ldl", "-lpthread"]
    subprocess.run([*map(str, command), f"-Wl,-soname,{name}", "-o", str(target)], check=True)
    return target


def _exported_functions(library: Path) -> list[str]:
    command = ["nm", "--dynamic", "--defined-only", str(library)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in table.splitlines() if " T " in line}
    return sorted(name for name in names if re.fullmatch(r"(__)?cu\w+", name))


def _find(pattern: str) -> Path | None:
    return next(iter(sorted(_PACKAGES.glob(pattern))), None)


def _installed(pattern: str) -> Path:
    found = _find(pattern)
    assert found is not None, f"no {pattern} among the installed packages"
    return found
