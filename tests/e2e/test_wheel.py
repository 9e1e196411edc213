"""The wheel, installed without extras in a clean environment, runs ONNX files and does not install PyTorch."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.trained_model import Trained

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the `bin` directory of an environment with only the wheel and its requirements."""
    folder = tmp_path_factory.mktemp("clean")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True)
    wheel = next(folder.glob("cifarx-*.whl"))
    venv.create(folder / "env", with_pip=False)
    target = folder / "env" / "bin" / "python"
    install = [*pip, "--python", str(target), "install", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    if subprocess.run(install, check=False).returncode:
        if os.environ.get("CI"):
            pytest.fail("the wheel cannot be installed")
        pytest.skip("no package index is reachable to install the requirements of the wheel")
    yield folder / "env" / "bin"


def run(program: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd)


def test_pytorch_is_not_installed(clean: Path, tmp_path: Path) -> None:
    listed = run(
        Path(sys.executable), "-m", "pip", "--python", clean / "python", "list", "--format", "json", cwd=tmp_path
    )
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "cifarx" in names
    assert not names & {"torch", "torchvision", "tensorboard", "onnx", "onnxscript", "triton"}
    assert len({"onnxruntime", "onnxruntime-gpu"} & names) == 1


def test_infer_runs_an_onnx_file(clean: Path, trained: Trained, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "x.png")
    result = run(clean / "cifarx", "infer", "x.png", "--model", trained.onnx, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with_torch = run(
        Path(sys.executable), "-m", "cifarx", "infer", "x.png", "--model", trained.checkpoint, "--json", cwd=tmp_path
    )
    ours, theirs = json.loads(result.stdout)[0], json.loads(with_torch.stdout)[0]
    assert ours["index"] == theirs["index"]
    assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)


def test_inspect_bench_and_doctor_work(clean: Path, trained: Trained, tmp_path: Path) -> None:
    assert run(clean / "cifarx", "inspect", trained.onnx, "--json", cwd=tmp_path).returncode == 0
    assert run(clean / "cifarx", "inspect", trained.torchscript, "--json", cwd=tmp_path).returncode == 0
    bench = run(clean / "cifarx", "bench", trained.onnx, "--batch", "1", "--json", cwd=tmp_path)
    assert bench.returncode == 0, bench.stderr
    doctor = run(clean / "cifarx", "doctor", cwd=tmp_path)
    assert doctor.returncode == 0
    assert 'pip install "cifarx[train]"' in doctor.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--model", "lzh"),
        ("export", "--ckpt", "CHECKPOINT", "--format", "onnx"),
        ("infer", "x.png", "--model", "CHECKPOINT"),
    ],
)
def test_commands_that_need_pytorch_name_the_extra(
    clean: Path, trained: Trained, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    given = [str(trained.checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    result = run(clean / "cifarx", *given, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert 'pip install "cifarx[train]"' in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png"]
