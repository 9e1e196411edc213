import shutil
from pathlib import Path

from command_line import Cli
from trained_model import Trained


def test_holds(cli: Cli, trained: Trained) -> None:
    ran = cli("verify", trained.onnx, "--ckpt", trained.checkpoint, "--json")
    assert ran.status == 0
    assert ran.json[0]["passed"]
    assert ran.json[0]["artifact"] == trained.onnx.name


def test_reads_as_ticks(cli: Cli, trained: Trained) -> None:
    out = cli("verify", trained.torchscript, "--ckpt", trained.checkpoint).out
    assert out.startswith("✓ ")
    assert "✗" not in out


def test_another_model_does_not_hold(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    from cifarx_train.checkpoint import load_checkpoint, save_checkpoint

    loaded = load_checkpoint(trained.checkpoint)
    loaded.model["model.8.bias"][3] += 0.01
    save_checkpoint(tmp_path / "other.pth", loaded)
    ran = cli("verify", trained.onnx, "--ckpt", tmp_path / "other.pth")
    assert ran.status == 1
    assert "tolerance" in ran.error
    assert "✗ tolerance" in ran.out


def test_wrong_files(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    shutil.copy(trained.checkpoint, tmp_path / "x.onnx")
    assert cli("verify", tmp_path / "x.onnx", "--ckpt", trained.checkpoint).status == 2
    assert cli("verify", trained.onnx, "--ckpt", "absent.pth").status == 2
    assert cli("verify", trained.onnx, "--ckpt", trained.onnx).status == 2
