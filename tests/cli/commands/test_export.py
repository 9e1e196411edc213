import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cifarx_export.formats.registry import FORMATS, PRECISIONS
from tests.support.command_line import Cli
from tests.support.trained_model import Trained

ROW = [
    "artifact", "format", "precision", "passed", "images", "batch_sizes", "max_abs_error", "mean_abs_error",
    "p999_abs_error", "required_tolerance", "agreement", "forgiven", "reference_accuracy", "accuracy", "nonfinite",
    "provider",
]  # fmt: skip


@pytest.fixture
def checkpoint(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copy(trained.checkpoint, tmp_path / "lzh_0.pth"))


def test_both_formats_beside_the_checkpoint(cli: Cli, checkpoint: Path) -> None:
    ran = cli("export", "--ckpt", "lzh_0.pth", "--format", "onnx", "--format", "torchscript", "--json")
    assert ran.status == 0, ran.err
    assert [list(row) for row in ran.json] == [ROW, ROW]
    assert [row["artifact"] for row in ran.json] == ["lzh_0.onnx", "lzh_0.torchscript.pt"]
    for row in ran.json:
        assert row["passed"]
        assert row["agreement"] == 1.0
        assert row["max_abs_error"] < 1e-4
        assert row["batch_sizes"] == [1, 3, 64]
        assert row["accuracy"] == row["reference_accuracy"]
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == [
        "lzh_0.onnx",
        "lzh_0.onnx.parity.json",
        "lzh_0.pth",
        "lzh_0.torchscript.pt",
        "lzh_0.torchscript.pt.parity.json",
    ]


def test_failed_proof(cli: Cli, checkpoint: Path) -> None:
    ran = cli("export", "--ckpt", checkpoint, "--format", "onnx", "--atol", 0, "--rtol", 0)
    assert ran.status == 1
    assert "failed its proof" in ran.error
    assert "tolerance" in ran.out
    assert not (checkpoint.parent / "lzh_0.onnx").exists()
    assert (checkpoint.parent / "lzh_0.onnx.failed.parity.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "onx"], "did you mean 'onnx'"),
        (["--format", "onnx", "--opset", "3"], "opset 3"),
        (["--format", "torchscript", "--opset", "18"], "format torchscript has no --opset: leave it out"),
        (["--format", "onnx", "--precision", "fp61"], "unknown precision 'fp61'"),
        (["--format", "torchscript", "--precision", "int8"], "format torchscript has no int8: it has fp32"),
        (["--format", "onnx", "--calibration-images", "9"], "leave --calibration-images out"),
        (["--format", "onnx", "--batch", "0"], "batch size 0"),
        (["--format", "onnx", "--atol", "-1"], "atol"),
        (["--format", "onnx", "--data", "nowhere"], "no such data set"),
        (["--format", "onnx", "--out", "lzh_0.pth/below"], "cannot write"),
    ],
)
def test_wrong_choices(cli: Cli, checkpoint: Path, arguments: list[str], words: str) -> None:
    ran = cli("export", "--ckpt", checkpoint, *arguments)
    assert ran.status == 2
    assert words in ran.error
    assert [path.name for path in checkpoint.parent.iterdir()] == ["lzh_0.pth"]


def test_not_a_checkpoint(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("this is no checkpoint")
    shutil.copy(trained.torchscript, tmp_path / "script.pth")
    for name in ("text.pth", "script.pth", "absent.pth"):
        ran = cli("export", "--ckpt", tmp_path / name, "--format", "onnx")
        assert ran.status == 2
        assert name in ran.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["script.pth", "text.pth"]


def test_newer_schema(cli: Cli, checkpoint: Path) -> None:
    import json

    import torch

    content = torch.load(checkpoint, weights_only=True)
    content["spec"] = json.dumps(json.loads(content["spec"]) | {"schema_version": 99})
    torch.save(content, checkpoint)
    ran = cli("export", "--ckpt", checkpoint, "--format", "onnx")
    assert ran.status == 2
    assert "99" in ran.error
    assert "newer cifarx" in ran.error


def test_help_lists_the_formats_and_the_precisions(cli: Cli) -> None:
    ran = cli("export", "--help")
    assert ran.status == 0
    said = " ".join(ran.out.replace("│", " ").split())
    assert ", ".join(FORMATS) in said
    assert ", ".join(PRECISIONS) in said


def test_the_help_needs_no_pytorch() -> None:
    script = "import sys; from cifarx.main import main; sys.argv = ['cifarx', 'export', '--help']\n"
    script += "try: main()\nexcept SystemExit: pass\nsys.exit(any(name in sys.modules for name in ('torch', 'onnx')))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_batch_size_that_is_named_is_proved_too(cli: Cli, checkpoint: Path) -> None:
    ran = cli("export", "--ckpt", checkpoint, "--format", "onnx", "--batch", 17, "--json")
    assert ran.status == 0, ran.err
    assert ran.json[0]["batch_sizes"] == [1, 3, 17, 64]
