"""Fixtures shared by the tests of several packages.

Real data where available, and a small trained model with its artifacts.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.command_line import Cli, CommandResult
from tests.support.simulated_gpu.build import build_libraries, missing_requirement
from tests.support.simulated_gpu.process import SimulatedGpuProcess
from tests.support.trained_model import Trained

_SHARED = Path(__file__).parents[1].parent / "shared" / "data"

# A shared machine can take longer than hypothesis expects for any one example.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_configure() -> None:
    """Pin each test process to one CPU: the threads of PyTorch would slow the other processes down."""
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if number and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(number) % len(cpus)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use simulated CUDA libraries, directly or through another fixture."""
    for item in items:
        if "simulated_gpu_libraries" in getattr(item, "fixturenames", ()):
            item.add_marker("simulated_gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests that need a GPU on a machine without one."""
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs a GPU that PyTorch can use")


@cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in an empty folder, without `CIFARX_DATA` and with an empty image cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    monkeypatch.delenv("CIFARX_DATA", raising=False)


@pytest.fixture(scope="session")
def cifar10_jpeg() -> Path:
    """Return CIFAR-10 as image files: `$CIFARX_DATA`, or the copy next to the project."""
    path = Path(os.environ.get("CIFARX_DATA") or _SHARED / "cifar10-jpeg.tar.gz").absolute()
    if not path.exists():
        pytest.skip(f"no CIFAR-10 image files: set CIFARX_DATA (not found: {path.name})")
    return path


@pytest.fixture(scope="session")
def dog() -> Path:
    """Return a photograph of a dog, 1546x1213 pixels."""
    path = (_SHARED / "dog.jpg").absolute()
    if not path.exists():
        pytest.skip("no dog.jpg in the shared data next to the project")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train Lzh for one epoch on the built-in data and export it; every parity check passes."""
    from cifarx_export.export import export
    from cifarx_train.train import train

    folder = tmp_path_factory.mktemp("trained")
    done = train("lzh", data="builtin", epochs=1, learning_rate=0.02, out=folder)
    shutil.rmtree(folder / "logs")
    onnx, torchscript = export(done.checkpoints[0], ["onnx", "torchscript"], data="builtin")
    assert onnx.report.summary.passed
    assert torchscript.report.summary.passed
    return Trained(folder, done.checkpoints[0], onnx.path, torchscript.path)


@pytest.fixture(scope="session")
def _outputs_of_this_process() -> Any:
    from tests.support.remembered_outputs import RememberedOutputs

    return RememberedOutputs()


@pytest.fixture
def remembered_outputs(_outputs_of_this_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each batch once with the same weights in the PyTorch backend, in all tests that use this fixture."""
    _outputs_of_this_process.use(monkeypatch)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process: `cli("verify", path, "--json")` is `cifarx verify PATH --json`.

    PyTorch takes seconds to import; in this process that happens once.
    """
    from cifarx.main import main

    def run(*arguments: object) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["cifarx", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        status = ended.value.code
        assert isinstance(status, int)
        return CommandResult(status, *capfd.readouterr())

    return run


@pytest.fixture
def fresh_python() -> Callable[..., str]:
    """Run code in a new Python process: `fresh_python(code, *arguments)` returns its standard output, stripped."""

    def run(code: str, *arguments: object) -> str:
        command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    return run


@pytest.fixture(scope="session")
def simulated_gpu_libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Build CUDA libraries that run without a GPU."""
    if reason := missing_requirement():
        pytest.skip(f"the CUDA libraries cannot be simulated: {reason}")
    return build_libraries(tmp_path_factory.mktemp("simulated-gpu"))


@pytest.fixture(scope="module")
def gpu_process(simulated_gpu_libraries: list[Path]) -> Iterator[SimulatedGpuProcess]:
    """Start a process with two simulated GPUs, for the functions of one test file."""
    with SimulatedGpuProcess(simulated_gpu_libraries, devices=2) as process:
        yield process
