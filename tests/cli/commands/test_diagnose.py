import shlex
import tomllib
from pathlib import Path

import pytest

from tests.support.command_line import Cli
from tests.support.level_model import CLASSES, write_level_folder, write_levels


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_level_folder(tmp_path / "trees", 170)


def test_the_printed_command_adopts_the_file_with_the_right_preprocessing(cli: Cli, data: Path) -> None:
    write_levels(Path("levels.onnx"), (3, 0, 5, 1, 2, 4))
    result = cli("diagnose", "levels.onnx", "--data", data, "--images", "360")
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "levels.onnx on 360 images of trees: 6 classes, chance is 16.7%"
    assert "ImageNet's mean and std" in result.out
    assert "stated before" in result.out
    assert "by McNemar's exact test at 5%" in result.out
    adopted = cli(*shlex.split(lines[-1])[1:])
    assert adopted.status == 0, adopted.err
    assert "reference: accuracy 100.00% of 1,020 images" in adopted.err


def test_json_and_a_spec_file_state_the_best_preprocessing(cli: Cli, data: Path) -> None:
    write_levels(Path("levels.onnx"))
    arguments = ("diagnose", "levels.onnx", "--data", data, "--images", "360", "--out", "found.toml", "--json")
    result = cli(*arguments)
    assert result.status == 0, result.err
    best = result.json["trials"][0]
    assert (best["accuracy"], best["class_order"]) == (1.0, "sorted")
    assert result.json["flags"].startswith("--preprocessing imagenet --image-size 8 --classes ash,")
    written = tomllib.loads(Path("found.toml").read_text())
    assert written["class_names"] == list(CLASSES)
    assert written["input"]["resize"] == "shorter_side"
    assert cli("adopt", "levels.onnx", "--data", data, "--spec", "found.toml").status == 0


def test_unusable_requests_are_usage_errors(cli: Cli, data: Path) -> None:
    write_levels(Path("levels.onnx"))
    for arguments in (
        ("levels.onnx",),
        ("absent.onnx", "--data", data),
        ("levels.onnx", "--data", "nowhere"),
        ("levels.onnx", "--data", data, "--images", "3"),
    ):
        result = cli("diagnose", *arguments)
        assert result.status == 2
        assert result.error
