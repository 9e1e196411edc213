import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.command_line import Cli
from tests.support.trained_model import Trained


def cifarx(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The real program, as its own process."""
    return subprocess.run(
        [sys.executable, "-m", "cifarx", *arguments], capture_output=True, text=True, check=False, **options
    )


def test_version_and_help_go_to_standard_output(cli: Cli) -> None:
    assert cli("--version").out.strip() == "0.1.0"
    helped = cli("--help")
    assert helped.status == 0
    assert all(name in helped.out for name in ("train", "export", "verify", "infer", "bench", "inspect", "doctor"))
    assert cli().out == helped.out


def test_unknown_command_gets_the_nearest(cli: Cli) -> None:
    ran = cli("exprot")
    assert ran.status == 2
    assert "did you mean 'export'?" in ran.error


def test_wrong_option_is_one_line(cli: Cli) -> None:
    ran = cli("infer", "x.png", "--modle", "m.onnx")
    assert ran.status == 2
    assert "--model" in ran.error
    assert ran.out == ""


def test_missing_argument_names_the_help_page(cli: Cli) -> None:
    ran = cli("export")
    assert ran.status == 2
    assert "cifarx export --help" in ran.error


def test_module_and_program_are_the_same() -> None:
    program = Path(sys.executable).with_name("cifarx")
    assert subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout == "0.1.0\n"
    assert cifarx("--version").stdout == "0.1.0\n"


def test_debug_shows_the_traceback() -> None:
    ran = cifarx("infer", "nope.png", "--model", "nope.onnx", env={**os.environ, "CIFARX_DEBUG": "1"})
    assert ran.returncode != 0
    assert "Traceback" in ran.stderr
    assert "ModelFileError" in ran.stderr


def test_reader_that_leaves_is_no_error(trained: Trained) -> None:
    model = trained.onnx
    command = f"{sys.executable} -m cifarx inspect {model} --json | head -n 1"
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert ran.stdout == "{\n"
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("command", ["train", "export", "verify", "infer", "bench", "inspect", "doctor", "demo"])
def test_help_of_a_command_imports_no_pytorch(command: str) -> None:
    code = (
        "import sys; from cifarx.app import app\n"
        f"app(['{command}', '--help'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "--" in ran.stdout


def test_missing_extra_is_named(tmp_path: Path) -> None:
    """As where torch is not installed: a finder that knows no torch stands in for its absence."""
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'tensorboard', 'onnx'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "sys.argv = ['cifarx', 'train', '--model', 'lzh']\n"
        "from cifarx.main import main\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 2
    assert 'pip install "cifarx[train]"' in ran.stderr
    assert not list(tmp_path.iterdir())


def test_pytorch_backend_is_found_without_an_install(trained: Trained, tmp_path: Path) -> None:
    """A source tree has no entry points."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    code = (
        "import importlib.metadata, sys\n"
        "importlib.metadata.entry_points = lambda **_: ()\n"
        f"sys.argv = ['cifarx', 'infer', 'x.png', '--model', {str(trained.checkpoint)!r}]\n"
        "from cifarx.main import main\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "by pytorch on cpu" in ran.stderr
