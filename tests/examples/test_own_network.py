"""`examples/own_network.py` on a folder of images."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import cifarx
from tests.support.examples import run_example
from tests.support.image_datasets import write_image_folder


@pytest.mark.slow  # trains and exports a network
def test_trains_exports_and_classifies(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "colors", train=40, test=334)
    Image.new("RGB", (64, 48), (10, 220, 30)).save(tmp_path / "leaf.png")
    result = run_example("own_network.py", "leaf.png", "--data", "colors", "--epochs", 4)
    assert result.status == 0, result.err
    trained, exported, prediction = result.out.splitlines()
    accuracy = re.fullmatch(r"trained tiny_resnet_3\.pth, test accuracy (.*)%", trained)
    assert accuracy
    assert float(accuracy[1]) > 90
    assert exported == "exported tiny_resnet_3.onnx, agreement 100.00% on 1002 images"
    assert prediction.startswith("leaf.png: green 0.")
    assert json.loads(Path("tiny_resnet_3.onnx.parity.json").read_text())["summary"]["passed"]
    with cifarx.load("tiny_resnet_3.onnx") as model:  # needs no registration
        assert model.predict("leaf.png").label == "green"


def test_an_error_is_one_line(tmp_path: Path) -> None:
    result = run_example("own_network.py", "leaf.png", "--data", tmp_path / "missing")
    assert result.status == 1
    assert "missing" in result.error
