"""Runs the documented commands one after the other in one directory, as real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAM = Path(sys.executable).with_name("cifarx")


def cifarx(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([PROGRAM, *line.split()], capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result


def test_the_documented_commands(tmp_path: Path, cifar10_jpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for the ten epochs of the default recipe, on a tenth of CIFAR-10 to be fast."""
    monkeypatch.setenv("CIFARX_DATA", str(_tenth(cifar10_jpeg, tmp_path / "tenth")))
    Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(tmp_path / "dog.png")

    cifarx("train --model lzh", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [f"lzh_{epoch}.pth" for epoch in range(10)]

    cifarx("export --ckpt lzh_9.pth --format onnx", tmp_path)
    result = cifarx("infer dog.png --backend onnxruntime", tmp_path)
    assert result.stdout.startswith("dog.png: ")
    assert "lzh_9.onnx" in result.stderr

    report = json.loads((tmp_path / "lzh_9.onnx.parity.json").read_text())
    assert report["summary"]["agreement"] == 1.0
    assert report["summary"]["data"] == "tenth"


def test_every_backend_has_the_same_predictions_on_real_images(
    tmp_path: Path, cifar10_jpeg: Path, dog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train for one epoch on CIFAR-10 (as JPEG), check parity on all 10,000 test images, and classify a photograph."""
    monkeypatch.setenv("CIFARX_DATA", str(cifar10_jpeg))
    trained = json.loads(cifarx("train --model lzh --epochs 1 --lr 0.02 --json", tmp_path).stdout)
    assert trained["test_accuracy"] > 0.25

    rows = json.loads(cifarx("export --ckpt lzh_0.pth --format onnx --format torchscript --json", tmp_path).stdout)
    for row in rows:
        assert row["images"] == 10_000
        assert row["agreement"] == 1.0
        assert row["forgiven"] == 0
        assert row["max_abs_error"] < 1e-4
        assert row["accuracy"] == trained["test_accuracy"]

    predictions = [
        json.loads(cifarx(f"infer {dog} --backend {backend} --json", tmp_path).stdout)[0]
        for backend in ("onnxruntime", "torchscript", "pytorch")
    ]
    assert len({prediction["index"] for prediction in predictions}) == 1
    assert [prediction["score"] for prediction in predictions] == pytest.approx([predictions[0]["score"]] * 3, abs=1e-5)


def _tenth(archive: Path, folder: Path) -> Path:
    """Extract every tenth image of the training split and of the test split to a folder."""
    import tarfile

    if archive.is_dir():
        pytest.skip("CIFARX_DATA is a folder, not an archive")
    with tarfile.open(archive) as source:
        for member in source:
            if member.isfile() and int(Path(member.name).stem) % 10 == 0:
                content = source.extractfile(member)
                assert content is not None
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    return folder
