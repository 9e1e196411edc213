from pathlib import Path

import pytest

from tests.support.command_line import Cli
from tests.support.foreign_models import write_color_folder, write_onnx

CLASSES = ("--classes", "red,green,blue")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_color_folder(tmp_path / "colors")


def test_a_file_is_adopted_and_infers(cli: Cli, data: Path) -> None:
    write_onnx(Path("colors.onnx"), layout="NHWC", external=True)
    adopted = cli("adopt", "colors.onnx", "--data", data, *CLASSES)
    assert adopted.status == 0, adopted.err
    first = adopted.out.splitlines()[0]
    assert first == "✓ colors.adopted.onnx: onnx fp32, parity check passed (ASSUMED: preprocessing, output)"
    assert "  ✓ class names   red, green, blue" in adopted.out
    assert "  ? preprocessing ASSUMED: " in adopted.out
    assert "reference: accuracy " in adopted.err
    assert "3 classes (red, green, blue): from --classes" in adopted.err
    picture = next((data / "test" / "green").iterdir())
    assert "green" in cli("infer", picture, "--model", "colors.adopted.onnx").out


def test_json_names_what_is_assumed(cli: Cli, data: Path) -> None:
    write_onnx(Path("colors.onnx"))
    result = cli("adopt", "colors.onnx", "--data", data, *CLASSES, "--out", "mine.onnx", "--json")
    assert result.status == 0, result.err
    assert (result.json[0]["artifact"], result.json[0]["passed"]) == ("mine.onnx", True)
    assert result.json[0]["assumed"] == ["preprocessing", "output"]


def test_chance_stops_it_unless_it_is_allowed(cli: Cli, data: Path) -> None:
    write_onnx(Path("colors.onnx"))
    wrong = ("adopt", "colors.onnx", "--data", data, "--classes", "green,blue,red")
    stopped = cli(*wrong)
    assert stopped.status == 1
    assert "on 3 classes is chance: preprocessing or class order is likely wrong: try `cifarx diagnose" in stopped.error
    assert not Path("colors.adopted.onnx").exists()
    assert cli(*wrong, "--allow-chance-accuracy").status == 0


def test_unusable_files_are_usage_errors(cli: Cli, data: Path) -> None:
    Path("text.onnx").write_text("text")
    write_onnx(Path("any.onnx"), size=None)
    for name in ("text.onnx", "absent.onnx", "any.onnx"):
        result = cli("adopt", name, "--data", data)
        assert result.status == 2
        assert result.error
