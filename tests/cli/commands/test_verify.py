from pathlib import Path

import pytest

from tests.support.color_model import write_onnx
from tests.support.command_line import Cli
from tests.support.trained_model import Trained

pytestmark = pytest.mark.usefixtures("remembered_outputs")


def test_an_artifact_passes(cli: Cli, trained: Trained) -> None:
    result = cli("verify", trained.onnx, "--ckpt", trained.checkpoint, "--json")
    assert result.status == 0
    assert result.json[0]["passed"]
    assert result.json[0]["artifact"] == trained.onnx.name


def test_prints_ticks(cli: Cli, trained: Trained) -> None:
    out = cli("verify", trained.torchscript, "--ckpt", trained.checkpoint).out
    assert out.startswith("✓ ")
    assert "✗" not in out


def test_an_artifact_of_another_model_fails(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint

    loaded = load_checkpoint(trained.checkpoint)
    loaded.weights["model.8.bias"][3] += 0.01
    save_checkpoint(tmp_path / "other.pth", loaded)
    result = cli("verify", trained.onnx, "--ckpt", tmp_path / "other.pth")
    assert result.status == 1
    other = tmp_path / "other.pth"
    assert result.error.startswith(f"error: {trained.onnx} differs from {other} (failed checks: ")
    assert result.error.endswith("): export it again")
    assert "tolerance" in result.error
    assert "✗ tolerance" in result.out


def test_files_that_cannot_be_opened(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(trained.checkpoint.read_bytes()[:5000])
    assert cli("verify", tmp_path / "x.onnx", "--ckpt", trained.checkpoint).status == 2
    assert cli("verify", trained.onnx, "--ckpt", "absent.pth").status == 2
    assert cli("verify", trained.onnx, "--ckpt", trained.onnx).status == 2


def test_compares_two_files_and_writes_an_html_report(cli: Cli, trained: Trained) -> None:
    result = cli("verify", trained.onnx, trained.torchscript, "--batch", "5", "--report", "report.html", "--json")
    assert result.status == 0
    assert result.json[0]["batch_sizes"] == [1, 3, 5, 64]
    assert trained.onnx.name in Path("report.html").read_text()


@pytest.mark.slow
def test_finds_the_first_layer_that_differs(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint

    loaded = load_checkpoint(trained.checkpoint)
    loaded.weights["model.4.bias"][3] += 0.1
    save_checkpoint(tmp_path / "other.pth", loaded)
    result = cli("verify", trained.onnx, tmp_path / "other.pth", "--locate")
    assert result.status == 1
    assert "first layer outside the tolerance: model.4" in " ".join(result.out.split())
    result = cli("verify", trained.onnx, tmp_path / "other.pth", "--locate", "--json")
    assert (result.status, result.json[0]["passed"]) == (1, False)
    assert "note: first layer outside the tolerance: model.4" in result.err


def test_takes_a_spec_for_a_file_without_one(cli: Cli, trained: Trained) -> None:
    import onnx

    model = onnx.load(trained.onnx)
    del model.metadata_props[:]
    onnx.save(model, "bare.onnx")
    Path("spec.json").write_text(cli("inspect", trained.onnx, "--json").out)
    assert cli("verify", "bare.onnx", trained.onnx).status == 2
    assert cli("verify", "bare.onnx", trained.onnx, "--spec", "spec.json").status == 0


def test_invalid_options_are_usage_errors(cli: Cli, trained: Trained) -> None:
    for arguments in [
        (),
        (trained.onnx, "--ckpt", trained.checkpoint),
        (trained.onnx, "--report", "report.pdf"),
        (trained.onnx, "--spec", "absent.json"),
        (trained.torchscript, "--locate"),
        (trained.onnx, "--batch", "0"),
        (trained.onnx, "--device", "tpu"),
    ]:
        result = cli("verify", trained.onnx, *arguments)
        assert result.status == 2
        assert result.error


def test_runs_an_onnx_file_in_another_runtime(cli: Cli) -> None:
    pytest.importorskip("tract")
    right, swapped = write_onnx(Path("right.onnx")), write_onnx(Path("swapped.onnx"), order=(2, 1, 0))
    options = ("--runtime", "tract", "--data", "builtin", "--allow-chance-accuracy")
    result = cli("verify", right, right, *options, "--json")
    assert result.status == 0
    assert result.json[0]["provider"].startswith("tract ")
    result = cli("verify", swapped, right, *options)
    assert result.status == 1
    found = "error: swapped.onnx differs from right.onnx in tract (failed checks: tolerance, agreement): use another "
    assert result.error.startswith(found)
