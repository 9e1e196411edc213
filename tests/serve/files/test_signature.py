"""Signatures of files and folders with real key pairs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_serve.files.signature import SignatureError, Signer, Verifier, signature_path
from tests.support.key_pairs import KeyPair, create_key_pair


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return create_key_pair(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"weights")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model.openvino"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.xml").write_text("<net/>")
    (folder / "inner" / "model.bin").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("kind", ["P-256", "P-384"])
def test_a_signed_file_is_verified(tmp_path: Path, file: Path, kind: str) -> None:
    keys = create_key_pair(tmp_path, kind=kind)
    assert Signer(keys.private).sign(file) == tmp_path / "model.onnx.sig"
    Verifier(keys.public).verify(file)


def test_a_signed_folder_is_verified(folder: Path, keys: KeyPair) -> None:
    assert Signer(keys.private).sign(folder).name == "model.openvino.sig"
    Verifier(keys.public).verify(folder)


def test_the_format_is_that_of_model_signing(file: Path, folder: Path, keys: KeyPair) -> None:
    for artifact in (file, folder):
        Signer(keys.private).sign(artifact)
        program = [sys.executable, "-W", "ignore", "-m", "model_signing", "verify", "key", str(artifact)]
        options = ["--signature", str(signature_path(artifact)), "--public_key", str(keys.public)]
        assert "succeeded" in subprocess.run([*program, *options], check=True, capture_output=True, text=True).stdout
        signature_path(artifact).unlink()
        program[program.index("verify")] = "sign"
        options = ["--signature", str(signature_path(artifact)), "--private_key", str(keys.private)]
        subprocess.run([*program, *options], check=True, capture_output=True)
        Verifier(keys.public).verify(artifact)


def test_an_artifact_may_be_renamed_with_its_signature(file: Path, keys: KeyPair) -> None:
    signature = Signer(keys.private).sign(file)
    renamed = file.with_name("served.onnx")
    file.rename(renamed)
    with pytest.raises(SignatureError, match=r"served\.onnx is not signed \(there is no served\.onnx\.sig\): sign it"):
        Verifier(keys.public).verify(renamed)
    signature.rename(signature_path(renamed))
    Verifier(keys.public).verify(renamed)


def test_a_link_to_a_signed_file_is_verified(file: Path, keys: KeyPair) -> None:
    link = file.with_name("current.onnx")
    link.symlink_to(file.name)
    Signer(keys.private).sign(link)
    Verifier(keys.public).verify(link)


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"X")


CHANGES: dict[str, Callable[[Path], object]] = {
    "changed file": lambda folder: change(folder / "inner" / "model.bin"),
    "added file": lambda folder: (folder / "more.bin").touch(),
    "removed file": lambda folder: (folder / "model.xml").unlink(),
    "renamed file": lambda folder: (folder / "model.xml").rename(folder / "other.xml"),
    "linked file": lambda folder: (folder / "link.xml").symlink_to("model.xml"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_folder_is_refused(folder: Path, keys: KeyPair, kind: str) -> None:
    Signer(keys.private).sign(folder)
    CHANGES[kind](folder)
    with pytest.raises(SignatureError, match=r"is not what model\.openvino\.sig signs: it or its signature"):
        Verifier(keys.public).verify(folder)


def test_a_changed_file_is_refused(file: Path, keys: KeyPair) -> None:
    Signer(keys.private).sign(file)
    change(file)
    with pytest.raises(SignatureError, match=r"model\.onnx is not what model\.onnx\.sig signs: .*: restore both files"):
        Verifier(keys.public).verify(file)


def test_the_signature_of_another_artifact_is_refused(file: Path, folder: Path, keys: KeyPair) -> None:
    Signer(keys.private).sign(folder).rename(signature_path(file))
    with pytest.raises(SignatureError, match="is not what"):
        Verifier(keys.public).verify(file)


def test_the_signature_with_another_key_is_refused(file: Path, keys: KeyPair, tmp_path: Path) -> None:
    Signer(create_key_pair(tmp_path, "other").private).sign(file)
    with pytest.raises(SignatureError, match=r"is signed with another key than that of .*key\.public\.pem: give"):
        Verifier(keys.public).verify(file)


def test_a_claim_to_be_signed_with_the_key_is_not_enough(file: Path, keys: KeyPair, tmp_path: Path) -> None:
    Signer(keys.private).sign(file)
    claimed = json.loads(signature_path(file).read_bytes())["verificationMaterial"]
    change(file)
    Signer(create_key_pair(tmp_path, "other").private).sign(file)
    bundle = json.loads(signature_path(file).read_bytes())
    signature_path(file).write_text(json.dumps({**bundle, "verificationMaterial": claimed}))
    with pytest.raises(SignatureError, match="is not what"):
        Verifier(keys.public).verify(file)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_signature_is_refused(file: Path, keys: KeyPair, data: st.DataObject) -> None:
    content = Signer(keys.private).sign(file).read_bytes()
    kind = data.draw(st.sampled_from(["cut", "garbage", "no signature", "text"]))
    if kind == "cut":
        damaged = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "garbage":
        damaged = data.draw(st.binary(max_size=100))
    elif kind == "text":
        damaged = json.dumps({"verificationMaterial": data.draw(st.recursive(st.none(), st.lists))}).encode()
    else:
        bundle = json.loads(content)
        bundle["dsseEnvelope"]["signatures"] = []
        damaged = json.dumps(bundle).encode()
    signature_path(file).write_bytes(damaged)
    with pytest.raises(SignatureError):
        Verifier(keys.public).verify(file)


@pytest.mark.parametrize("kind", ["RSA", "Ed25519", "secp256k1"])
def test_keys_of_other_kinds(tmp_path: Path, kind: str) -> None:
    keys = create_key_pair(tmp_path, kind=kind)
    for use in (lambda: Signer(keys.private), lambda: Verifier(keys.public)):
        with pytest.raises(UsageError, match=rf"the key in .* is .*{kind}, not on P-256, P-384 or P-521: create a key"):
            use()


def test_a_key_with_a_password(tmp_path: Path) -> None:
    keys = create_key_pair(tmp_path, password="secret")
    with pytest.raises(UsageError, match=r"the private key in .*key\.pem has a password: write one without"):
        Signer(keys.private)


def test_the_wrong_key_of_the_pair(keys: KeyPair) -> None:
    with pytest.raises(UsageError, match=r"public\.pem is a public key: give the PEM file of the private key"):
        Signer(keys.public)
    with pytest.raises(UsageError, match=r"key\.pem is a private key: give its public key: openssl pkey"):
        Verifier(keys.private)


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"-----BEGIN CERTIFICATE-----\n"])
def test_files_without_a_key(keys: KeyPair, content: bytes) -> None:
    keys.private.write_bytes(content)
    with pytest.raises(UsageError, match="is not a private key"):
        Signer(keys.private)
    with pytest.raises(UsageError, match="is not a public key"):
        Verifier(keys.private)


def test_a_damaged_key(keys: KeyPair) -> None:
    for path in keys:
        path.write_bytes(path.read_bytes().replace(b"M", b"?", 1))
    with pytest.raises(UsageError, match="cannot read the private key in"):
        Signer(keys.private)
    with pytest.raises(UsageError, match="cannot read the public key in"):
        Verifier(keys.public)


def test_a_missing_key(tmp_path: Path, keys: KeyPair) -> None:
    assert keys
    with pytest.raises(UsageError, match=r"cannot read the key .*absent\.pem \(.*\): check the path"):
        Signer(tmp_path / "absent.pem")
