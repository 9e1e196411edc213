"""What several rooms' tests need: real data where it is there, and one small trained model with its artifacts."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from command_line import Cli, Ran
from trained_model import Trained

_SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_configure() -> None:
    """Each of several test processes has a CPU of its own: PyTorch's threads would slow the others' many times."""
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if number and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(number) % len(cpus)]})


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in a folder of its own, with no data set named from outside and no images kept from before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    monkeypatch.delenv("CIFARX_DATA", raising=False)


@pytest.fixture(scope="session")
def cifar10_jpeg() -> Path:
    """CIFAR-10 as image files: `$CIFARX_DATA`, or a copy beside the project."""
    path = Path(os.environ.get("CIFARX_DATA") or _SHARED / "cifar10-jpeg.tar.gz").absolute()
    if not path.exists():
        pytest.skip(f"no CIFAR-10 image files: set CIFARX_DATA (looked at {path.name})")
    return path


@pytest.fixture(scope="session")
def dog() -> Path:
    """A photograph of a dog, 1546x1213."""
    path = (_SHARED / "dog.jpg").absolute()
    if not path.exists():
        pytest.skip("no dog.jpg in the shared data beside the project")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Lzh after one epoch on the built-in data, exported to every format, each proof passed."""
    from cifarx_export.exporting import export
    from cifarx_train.run import train

    folder = tmp_path_factory.mktemp("trained")
    done = train("lzh", data="builtin", epochs=1, learning_rate=0.02, out=folder)
    shutil.rmtree(folder / "logs")
    onnx, torchscript = export(done.checkpoints[0], ["onnx", "torchscript"], data="builtin")
    assert onnx.report.summary.passed
    assert torchscript.report.summary.passed
    return Trained(folder, done.checkpoints[0], onnx.path, torchscript.path)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("verify", path, "--json")` as `cifarx verify PATH --json`, in this process:
    PyTorch takes seconds to load, and once is enough."""
    from cifarx.main import main

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["cifarx", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        status = ended.value.code
        assert isinstance(status, int)
        return Ran(status, *capfd.readouterr())

    return run
