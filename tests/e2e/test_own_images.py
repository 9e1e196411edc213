"""Images as people have them go from training to a checked artifact."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import CommandResult, run_program
from tests.support.image_datasets import write_image_folder
from tests.support.server_process import PROGRAM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def cifarx(*command: object) -> CommandResult:
    result = run_program(PROGRAM, *command)
    assert result.status == 0, result.err
    return result


@pytest.mark.parametrize("labeled", [False, True], ids=["folders", "label file"])
def test_held_out_images_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labeled: bool) -> None:
    monkeypatch.chdir(tmp_path)
    (write_image_folder(tmp_path / "whole", train=20, test=1) / "train").rename("photos")
    (tmp_path / "photos" / "notes.txt").touch()
    options: list[object] = []
    if labeled:
        images = sorted(path.relative_to("photos") for path in Path("photos").rglob("*.png"))
        lines = [f"{image},{image.parts[0]}\n" for image in images]
        Path("labels.csv").write_text("path,label\n" + "".join(lines))
        options = ["--labels", "labels.csv"]

    trained = cifarx(
        "train", "--model", "lzh", "--epochs", 2, "--lr", 0.05, "--data", "photos", "--split", 0.2, *options, "--json"
    )
    assert "note: left out 1 file of photos: 1 .txt" in trained.err
    exported = cifarx("export", "--ckpt", "lzh_1.pth", "--format", "onnx", "--data", "photos")
    assert "note: left out 1 file of photos: 1 .txt" in exported.err
    record = json.loads(cifarx("inspect", "lzh_1.onnx", "--json").out)["training"]["data"]
    assert (record["train_images"], record["test_images"], record["split_fraction"]) == (48, 12, 0.2)
    assert record["labels"] == ("labels.csv" if labeled else None)
    verified = cifarx("verify", "lzh_1.onnx", "--ckpt", "lzh_1.pth", "--data", "photos", "--json").json[0]
    assert verified["accuracy"] == trained.json["test_accuracy"]
