import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch

from cifarx_serve.backends.registry import read_spec
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.spec import InputSpec, ModelSource, ModelSpec
from tests.support.color_model import SPEC, write_onnx
from tests.support.command_line import Cli
from tests.support.parity_summary import SUMMARY
from tests.support.spec_model import BGR, GRAYSCALE, make_spec, write_model
from tests.support.trained_model import Trained


def test_json_is_the_spec(cli: Cli, trained: Trained) -> None:
    for path in (trained.checkpoint, trained.onnx, trained.torchscript):
        spec = cli("inspect", path, "--json").json
        assert spec["model"] == "lzh"
        assert spec["class_names"] == list(read_spec(path).class_names)
        assert spec["training"]["data"]["kind"] == "builtin"
        assert (spec["parity"] is None) == (path == trained.checkpoint)


def test_prints_the_most_important_facts(cli: Cli, trained: Trained) -> None:
    out = cli("inspect", trained.onnx).out
    for words in ("lzh, fp32", "airplane", "(N, 3, 32, 32)", "drawings", "test accuracy", "agreement", "sha256"):
        assert words in out
    spec = read_spec(trained.onnx)
    assert f"weights         sha256 {spec.weights_sha256}" in out
    assert "export          format: onnx" in out
    assert "opset: 18" in out


def test_prints_facts_that_only_some_files_have(cli: Cli, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(
        SPEC,
        embedded_preprocessing=True,
        precision="int8",
        minimum_onnxruntime="1.18",
        exporter={"format": "onnx", "calibration": "512 images, entropy", "fp32 layers": "conv1, fc"},
    )
    lines = cli("inspect", write_onnx(tmp_path / "x.onnx", spec.to_json())).out.splitlines()
    for line in (
        "model           colors, int8",
        "input           uint8 NHWC (N, any height, any width, 3), RGB",
        "requires        ONNX Runtime >= 1.18",
        "export          format: onnx",
        "                calibration: 512 images, entropy",
        "                fp32 layers: conv1, fc",
    ):
        assert line in lines
    assert any(line.startswith("preprocessing") and line.endswith("inside the model") for line in lines)


def test_prints_on_which_images_parity_was_checked_and_what_that_does_not_prove(cli: Cli, tmp_path: Path) -> None:
    summary = msgspec.structs.replace(
        SUMMARY, test_images=30, training_images=10, warnings=("only 40 images", "drawings")
    )
    spec = msgspec.structs.replace(SPEC, parity=summary)
    lines = cli("inspect", write_onnx(tmp_path / "x.onnx", spec.to_json())).out.splitlines()
    assert "agreement 75.0000% on 30 test and 10 training images of pictures, batch sizes" in lines[-3]
    assert lines[-2:] == ["WARNING         only 40 images", "WARNING         drawings"]


def lines_of(cli: Cli, tmp_path: Path, spec: ModelSpec) -> dict[str, str]:
    """Return the printed facts by their name."""
    out = cli("inspect", write_model(tmp_path / "x.onnx", spec)).out
    return {line[:15].strip(): line[16:] for line in out.splitlines()}


def resizing(cli: Cli, tmp_path: Path, **fields: Any) -> str:
    spec = make_spec(InputSpec(**{"height": 224, "width": 224, **fields}))
    return lines_of(cli, tmp_path, spec)["preprocessing"].partition(", range")[0]


def test_prints_how_images_are_resized(cli: Cli, tmp_path: Path) -> None:
    crop = ", crop the center to 224x224"
    for fields, expected in (
        ({}, "resize bilinear to 224x224"),
        ({"antialias": False}, "resize bilinear without antialiasing to 224x224"),
        ({"resize_to": (256, 240)}, f"resize bilinear to 256x240{crop}"),
        ({"resize": "shorter_side", "resize_to": 256}, f"resize bilinear to a shorter side of 256{crop}"),
        ({"resize": "shorter_side", "resize_to": 200}, f"resize bilinear to a shorter side of 200{crop}, pad with 0"),
        ({"resize": "letterbox", "fill": 114}, "resize bilinear to fit into 224x224, pad with 114"),
    ):
        assert resizing(cli, tmp_path, **fields) == expected


def test_prints_the_input(cli: Cli, tmp_path: Path) -> None:
    for spec, expected in (
        (make_spec(GRAYSCALE), "float32 NCHW (N, 1, 4, 6), L"),
        (make_spec(msgspec.structs.replace(BGR, layout="NHWC")), "float32 NHWC (N, 4, 6, 3), BGR"),
        (make_spec(BGR, embedded_preprocessing=True), "uint8 NHWC (N, any height, any width, 3), RGB"),
        (make_spec(GRAYSCALE, embedded_preprocessing=True), "uint8 NHWC (N, any height, any width, 1), L"),
    ):
        assert lines_of(cli, tmp_path, spec)["input"] == expected


def test_prints_the_output(cli: Cli, tmp_path: Path) -> None:
    binary = {"class_names": ("no", "yes"), "activation": "sigmoid", "outputs": 1}
    for fields, expected in (
        ({}, "logits, float32 (N, 3), softmax"),
        ({"output": "probabilities"}, "probabilities, float32 (N, 3), softmax"),
        ({"temperature": 1.25}, "logits, float32 (N, 3), softmax at temperature 1.25"),
        (
            {"activation": "sigmoid", "thresholds": (0.5, 0.25, 0.5)},
            "logits, float32 (N, 3), sigmoid: several labels, each from a score of 0.25 to 0.5 on",
        ),
        (binary, "logits, float32 (N, 1), sigmoid: yes from a score of 0.5 on"),
    ):
        assert lines_of(cli, tmp_path, make_spec(**fields))["output"] == expected


def test_prints_the_source(cli: Cli, tmp_path: Path) -> None:
    source = ModelSource(
        kind="python", name="model.py:Net", arguments={"width": 8, "act": "silu"}, sha256="0" * 64, output="logits"
    )
    assert lines_of(cli, tmp_path, make_spec(source=source))["source"] == (
        f"python model.py:Net, width=8, act='silu', its output 'logits', sha256 {'0' * 64}"
    )
    assert "source" not in lines_of(cli, tmp_path, make_spec())


def test_marks_what_was_assumed(cli: Cli, tmp_path: Path) -> None:
    assumed = {"architecture": "model", "class_names": "classes", "preprocessing": "preprocessing", "output": "output"}
    for part, name in assumed.items():
        lines = lines_of(cli, tmp_path, make_spec(assumed=(part,)))
        assert [line for line, text in lines.items() if "ASSUMED" in text] == [name]
    assert "ASSUMED" not in str(lines_of(cli, tmp_path, make_spec()))


def test_files_that_cannot_be_opened(cli: Cli, tmp_path: object) -> None:
    for check in ([], ["--check"]):
        absent = cli("inspect", "absent.onnx", *check)
        assert "no such file" in absent.error
        assert absent.status == 2
        assert cli("inspect", str(tmp_path), *check).status == 2


def test_check_of_a_file_with_a_checksum(cli: Cli, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "x.onnx")
    write_checksum(path)
    result = cli("inspect", path, "--check")
    assert result.status == 0
    assert "checksum        intact, sha256 " in result.out
    assert json.loads(cli("inspect", path, "--check", "--json").out) == json.loads(SPEC.to_json())


def test_check_of_a_changed_file(cli: Cli, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "x.onnx")
    write_checksum(path)
    whole = bytearray(path.read_bytes())
    for place in (20, 200, len(whole) - 1):  # in the graph, in the spec, in the checksum
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        for json_option in ([], ["--json"]):
            result = cli("inspect", path, "--check", *json_option)
            assert result.status == 1
            assert f"the checksum of {path} does not match" in result.error
            assert result.out == ""


def test_check_of_a_file_without_a_checksum(cli: Cli, tmp_path: Path) -> None:
    result = cli("inspect", write_onnx(tmp_path / "x.onnx"), "--check")
    assert result.status == 1
    assert "has no checksum" in result.error
    assert result.out == ""


def test_check_of_a_checkpoint_without_a_checksum_uses_the_crc_of_its_members(
    cli: Cli, trained: Trained, tmp_path: Path
) -> None:
    path = tmp_path / "lzh_0.pth"
    # Saved again by PyTorch: checkpoints that cifarx writes have a checksum.
    torch.save(torch.load(trained.checkpoint, weights_only=True), path)
    result = cli("inspect", path, "--check")
    assert result.status == 0
    assert "the CRC-32 of every member matches" in result.out
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    result = cli("inspect", path, "--check")
    assert result.status == 1
    assert f" in {path} does not match" in result.error


def test_check_of_a_checkpoint_uses_its_checksum(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "lzh_0.pth"
    shutil.copy(trained.checkpoint, path)
    result = cli("inspect", path, "--check")
    assert result.status == 0
    assert "intact, sha256" in result.out
    whole = bytearray(path.read_bytes())
    whole[-100] ^= 1
    path.write_bytes(whole)
    assert cli("inspect", path, "--check").status == 1


def test_check_of_a_checkpoint_of_the_older_format(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    result = cli("inspect", path, "--check")
    assert result.status == 1
    assert "has no checksum and is not a zip archive" in result.error


def test_a_model_repository(cli: Cli, tmp_path: Path) -> None:
    model = tmp_path / "x.triton" / "x" / "1" / "model.onnx"
    model.parent.mkdir(parents=True)
    write_onnx(model)
    write_checksum(model)
    result = cli("inspect", tmp_path / "x.triton", "--check")
    assert result.status == 0
    assert "intact" in result.out
