"""The options `--sign` and `--require-signature` of `export`, `adopt` and `verify`."""

from pathlib import Path

import pytest

from tests.support.command_line import Cli
from tests.support.foreign_models import write_color_folder, write_onnx
from tests.support.key_pairs import KeyPair, create_key_pair
from tests.support.trained_model import Trained

CLASSES = ("--classes", "red,green,blue")


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return create_key_pair(tmp_path)


def test_an_adopted_file_is_signed_and_its_signature_reported(cli: Cli, tmp_path: Path, keys: KeyPair) -> None:
    data = write_color_folder(tmp_path / "colors")
    write_onnx(Path("colors.onnx"))
    adopt = ("adopt", "colors.onnx", "--data", data, *CLASSES)
    adopted = cli(*adopt, "--sign", keys.private)
    assert adopted.status == 0, adopted.err
    assert "colors.adopted.onnx.sig" in adopted.err
    verified = cli("verify", "colors.adopted.onnx", "--require-signature", keys.public, "--json")
    assert (verified.status, verified.json) == (0, [{"artifact": "colors.adopted.onnx", "signature": "valid"}])
    assert "colors.adopted.onnx.sig is a valid signature of colors.adopted.onnx with the key" in verified.err

    write_onnx(Path("colors.onnx"), layout="NHWC")
    again = cli(*adopt)
    assert again.status == 0, again.err
    assert "colors.adopted.onnx.sig is the signature of an older file: sign again with --sign" in again.err
    changed = cli("verify", "colors.adopted.onnx", "--require-signature", keys.public, "--json")
    assert (changed.status, changed.json[0]["signature"]) == (1, "invalid")
    assert "colors.adopted.onnx is not what colors.adopted.onnx.sig signs" in changed.error
    Path("colors.adopted.onnx.sig").unlink()
    unsigned = cli("verify", "colors.adopted.onnx", "--require-signature", keys.public)
    assert unsigned.status == 1
    assert "colors.adopted.onnx is not signed" in unsigned.error


@pytest.mark.slow
def test_an_exported_file_is_signed(cli: Cli, trained: Trained, tmp_path: Path, keys: KeyPair) -> None:
    export = ("export", "--ckpt", trained.checkpoint, "--format", "onnx", "--out", tmp_path, "--sign", keys.private)
    exported = cli(*export)
    assert exported.status == 0, exported.err
    [artifact] = tmp_path.glob("*.onnx")
    compared = cli("verify", artifact, "--ckpt", trained.checkpoint, "--json")
    assert (compared.status, compared.json[0]["signature"]) == (0, "unchecked")
    compared = cli("verify", artifact, "--ckpt", trained.checkpoint, "--json", "--require-signature", keys.public)
    assert (compared.status, compared.json[0]["signature"], compared.json[0]["passed"]) == (0, "valid", True)


def test_a_key_that_cannot_sign_is_an_error_before_anything_is_written(
    cli: Cli, trained: Trained, keys: KeyPair
) -> None:
    for command in (
        ("export", "--ckpt", trained.checkpoint, "--format", "onnx", "--out", "out"),
        ("adopt", trained.onnx, "--out", "out/x.onnx"),
    ):
        result = cli(*command, "--sign", keys.public)
        assert result.status == 2
        assert "is a public key: give the PEM file of the private key" in result.error
        assert not Path("out").exists()


def test_an_artifact_without_a_signature_is_compared_as_before(cli: Cli, trained: Trained) -> None:
    result = cli("verify", trained.onnx, "--ckpt", trained.checkpoint, "--json")
    assert (result.status, result.json[0]["signature"]) == (0, None)
