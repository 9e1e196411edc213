import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cifarx_export.formats.registry import FORMATS, PRECISIONS
from tests.support.command_line import Cli
from tests.support.trained_model import Trained

pytestmark = pytest.mark.usefixtures("remembered_outputs")

ROW = [
    "artifact", "format", "precision", "passed", "images", "batch_sizes", "max_abs_error", "mean_abs_error",
    "p999_abs_error", "required_tolerance", "agreement", "forgiven", "reference_accuracy", "accuracy", "nonfinite",
    "provider", "agreement_bound", "test_images", "training_images", "warnings", "assumed",
]  # fmt: skip


@pytest.fixture
def checkpoint(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copy(trained.checkpoint, tmp_path / "lzh_0.pth"))


def test_writes_artifacts_next_to_the_checkpoint(cli: Cli, checkpoint: Path) -> None:
    result = cli("export", "--ckpt", "lzh_0.pth", "--format", "onnx", "--format", "torchscript", "--json")
    assert result.status == 0, result.err
    assert [list(row) for row in result.json] == [ROW, ROW]
    assert [row["artifact"] for row in result.json] == ["lzh_0.onnx", "lzh_0.torchscript.pt"]
    for row in result.json:
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


def test_a_failed_parity_check_writes_only_the_report(cli: Cli, checkpoint: Path) -> None:
    result = cli("export", "--ckpt", checkpoint, "--format", "onnx", "--atol", 0, "--rtol", 0)
    assert result.status == 1
    failed = checkpoint.parent / "lzh_0.onnx.failed.parity.json"
    assert (
        result.error
        == f"error: {failed.with_name('lzh_0.onnx')} failed the parity check and was not written: see {failed}"
    )
    assert "tolerance" in result.out
    assert not (checkpoint.parent / "lzh_0.onnx").exists()
    assert failed.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "onx"], "did you mean 'onnx'"),
        (["--format", "onnx", "--opset", "3"], "opset 3"),
        (["--format", "torchscript", "--opset", "18"], "torchscript does not support --opset: leave it out"),
        (["--format", "onnx", "--precision", "fp61"], "unknown precision 'fp61'"),
        (["--format", "torchscript", "--precision", "int8"], "torchscript does not support int8: it supports fp32"),
        (["--format", "onnx", "--calibration-images", "9"], "leave --calibration-images out"),
        (["--format", "onnx", "--batch", "0"], "batch size 0 is out of range"),
        (["--format", "onnx", "--atol", "-1"], "atol"),
        (["--format", "onnx", "--data", "nowhere"], "dataset nowhere does not exist"),
        (["--format", "onnx", "--out", "lzh_0.pth/below"], "cannot write"),
    ],
)
def test_invalid_options_are_usage_errors(cli: Cli, checkpoint: Path, arguments: list[str], words: str) -> None:
    result = cli("export", "--ckpt", checkpoint, *arguments)
    assert result.status == 2
    assert words in result.error
    assert [path.name for path in checkpoint.parent.iterdir()] == ["lzh_0.pth"]


def test_a_file_that_is_not_a_checkpoint(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not a checkpoint")
    shutil.copy(trained.torchscript, tmp_path / "script.pth")
    for name in ("text.pth", "script.pth", "absent.pth"):
        result = cli("export", "--ckpt", tmp_path / name, "--format", "onnx")
        assert result.status == 2
        assert name in result.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["script.pth", "text.pth"]


def test_a_checkpoint_with_a_newer_schema(cli: Cli, checkpoint: Path) -> None:
    import json

    import torch

    content = torch.load(checkpoint, weights_only=True)
    content["spec"] = json.dumps(json.loads(content["spec"]) | {"schema_version": 99})
    torch.save(content, checkpoint)
    result = cli("export", "--ckpt", checkpoint, "--format", "onnx")
    assert result.status == 2
    assert "99" in result.error
    assert "newer cifarx" in result.error


def test_help_lists_the_formats_and_the_precisions(cli: Cli) -> None:
    result = cli("export", "--help")
    assert result.status == 0
    text = " ".join(result.out.replace("│", " ").split())
    assert ", ".join(FORMATS) in text
    assert ", ".join(PRECISIONS) in text


def test_the_help_does_not_import_pytorch() -> None:
    script = "import sys; from cifarx.main import main; sys.argv = ['cifarx', 'export', '--help']\n"
    script += "try: main()\nexcept SystemExit: pass\nsys.exit(any(name in sys.modules for name in ('torch', 'onnx')))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_checks_an_additional_batch_size(cli: Cli, checkpoint: Path) -> None:
    result = cli("export", "--ckpt", checkpoint, "--format", "onnx", "--batch", 17, "--json")
    assert result.status == 0, result.err
    assert result.json[0]["batch_sizes"] == [1, 3, 17, 64]
