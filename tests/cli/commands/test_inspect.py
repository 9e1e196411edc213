import json
import shutil
from pathlib import Path

import msgspec
import torch

from cifarx_serve.backends.registry import read_spec
from cifarx_serve.files.checksum import write_checksum
from tests.support.color_model import SPEC, write_onnx
from tests.support.command_line import Cli
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
