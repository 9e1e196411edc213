import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

import cifarx
from cifarx_serve.spec import InputSpec
from tests.support.command_line import Cli
from tests.support.spec_model import make_spec, write_model
from tests.support.trained_model import Trained


def run_cifarx(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cifarx", *arguments], capture_output=True, text=True, check=False, env=env
    )


def test_version_and_help_go_to_standard_output(cli: Cli) -> None:
    assert cli("--version").out.strip() == cifarx.__version__ == version("cifarx")
    helped = cli("--help")
    assert helped.status == 0
    assert all(name in helped.out for name in ("train", "export", "verify", "infer", "bench", "inspect", "doctor"))
    assert cli().out == helped.out


def test_an_unknown_command_gets_a_suggestion(cli: Cli) -> None:
    result = cli("exprot")
    assert result.status == 2
    assert "did you mean 'export'?" in result.error


def test_an_unknown_option_is_a_one_line_error(cli: Cli) -> None:
    result = cli("infer", "x.png", "--modle", "m.onnx")
    assert result.status == 2
    assert "--model" in result.error
    assert result.out == ""


def test_a_missing_argument_refers_to_the_help_page(cli: Cli) -> None:
    result = cli("export")
    assert result.status == 2
    assert "cifarx export --help" in result.error


def test_the_module_and_the_program_are_the_same() -> None:
    program = Path(sys.executable).with_name("cifarx")
    assert (
        subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        == f"{cifarx.__version__}\n"
    )
    assert run_cifarx("--version").stdout == f"{cifarx.__version__}\n"


def test_the_debug_variable_shows_the_traceback() -> None:
    result = run_cifarx("infer", "nope.png", "--model", "nope.onnx", env={**os.environ, "CIFARX_DEBUG": "1"})
    assert result.returncode != 0
    assert "Traceback" in result.stderr
    assert "ModelFileError" in result.stderr


def test_a_closed_pipe_is_not_an_error(trained: Trained) -> None:
    model = trained.onnx
    command = f"{sys.executable} -m cifarx inspect {model} --json | head -n 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert result.stdout == "{\n"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["train", "export", "verify", "infer", "bench", "inspect", "doctor", "demo"])
def test_the_help_of_a_command_does_not_import_pytorch(command: str) -> None:
    code = (
        "import sys; from cifarx.app import app\n"
        f"app(['{command}', '--help'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--" in result.stdout


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    """A finder that hides PyTorch simulates its absence."""
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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert 'error: this command needs torch, which is not installed: pip install "cifarx[train]"\n' in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_pytorch_backend_is_found_in_a_source_tree(trained: Trained, tmp_path: Path) -> None:
    """A source tree that is not installed has no entry points."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    code = (
        "import importlib.metadata, sys\n"
        "importlib.metadata.entry_points = lambda **_: ()\n"
        f"sys.argv = ['cifarx', 'infer', 'x.png', '--model', {str(trained.checkpoint)!r}]\n"
        "from cifarx.main import main\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "with pytorch on cpu" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS works only on Linux")
def test_missing_memory_is_an_error_of_one_line(tmp_path: Path) -> None:
    """The size of the images, which the file states, is larger than any memory."""
    file = write_model(tmp_path / "huge.onnx", make_spec(InputSpec(height=10**6, width=10**6)))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    command = f"ulimit -v 4000000; exec {sys.executable} -m cifarx infer {tmp_path}/x.png --model {file}"
    ran = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: there is not enough memory: ")


def test_a_full_disk_is_an_error_that_names_the_temporary_directory(trained: Trained) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "cifarx", "inspect", str(trained.onnx)]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "(No space left on device): free some space; TMPDIR sets the directory of temporary files" in result.stderr
    assert result.stderr.count("\n") == 1
