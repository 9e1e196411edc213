import shutil
from pathlib import Path

import pytest

from tests.support.command_line import Cli
from tests.support.trained_model import Trained


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
    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint

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


def test_two_files_and_a_page(cli: Cli, trained: Trained) -> None:
    ran = cli("verify", trained.onnx, trained.torchscript, "--batch", "5", "--report", "page.html", "--json")
    assert ran.status == 0
    assert ran.json[0]["batch_sizes"] == [1, 3, 5, 64]
    assert trained.onnx.name in Path("page.html").read_text()


@pytest.mark.slow
def test_the_first_layer_that_differs(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint

    loaded = load_checkpoint(trained.checkpoint)
    loaded.model["model.4.bias"][3] += 0.1
    save_checkpoint(tmp_path / "other.pth", loaded)
    told = cli("verify", trained.onnx, tmp_path / "other.pth", "--locate")
    assert told.status == 1
    assert "first layer outside the tolerance: model.4" in " ".join(told.out.split())
    ran = cli("verify", trained.onnx, tmp_path / "other.pth", "--locate", "--json")
    assert (ran.status, ran.json[0]["passed"]) == (1, False)
    assert "note: first layer outside the tolerance: model.4" in ran.err


def test_a_spec_for_a_file_without_one(cli: Cli, trained: Trained) -> None:
    import onnx

    model = onnx.load(trained.onnx)
    del model.metadata_props[:]
    onnx.save(model, "bare.onnx")
    Path("spec.json").write_text(cli("inspect", trained.onnx, "--json").out)
    assert cli("verify", "bare.onnx", trained.onnx).status == 2
    assert cli("verify", "bare.onnx", trained.onnx, "--spec", "spec.json").status == 0


def test_wrong_usage(cli: Cli, trained: Trained) -> None:
    for arguments in [
        (),
        (trained.onnx, "--ckpt", trained.checkpoint),
        (trained.onnx, "--report", "page.pdf"),
        (trained.onnx, "--spec", "absent.json"),
        (trained.torchscript, "--locate"),
        (trained.onnx, "--batch", "0"),
        (trained.onnx, "--device", "tpu"),
    ]:
        ran = cli("verify", trained.onnx, *arguments)
        assert ran.status == 2
        assert ran.error
