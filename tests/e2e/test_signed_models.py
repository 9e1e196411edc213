"""`cifarx serve --require-signature` at the start and on reload, with files and folders."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cifarx_serve.files.signature import Signer, signature_path
from tests.support.color_model import write_onnx
from tests.support.key_pairs import KeyPair, create_key_pair
from tests.support.server_process import PROGRAM, ServerProcess, run_server, start_server, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return create_key_pair(tmp_path)


def replace(model: Path, new: Path) -> None:
    """Rename a file and its signature, if it has one, to those of a model."""
    if signature_path(new).exists():
        signature_path(new).replace(signature_path(model))
    new.replace(model)


def write_signed(path: Path, private_key: Path, order: tuple[int, int, int] = (0, 1, 2)) -> Path:
    Signer(private_key).sign(write_onnx(path, order=order))
    return path


def label(server: ServerProcess) -> str:
    return str(server.predict().json["predictions"][0]["label"])


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (
            "unsigned",
            "colors.onnx is not signed (there is no colors.onnx.sig): sign it with `cifarx export --sign KEY`",
        ),
        (
            "changed",
            "colors.onnx is not what colors.onnx.sig signs: it or its signature has changed",
        ),
        ("other key", "colors.onnx is signed with another key than that of "),
        ("garbage", "colors.onnx.sig is not a signature of model-signing with a key"),
        ("private key", "key.pem is a private key: give its public key: openssl pkey -in PRIVATE.pem -pubout"),
    ],
)
def test_refuses_to_start(tmp_path: Path, keys: KeyPair, kind: str, problem: str) -> None:
    model = write_signed(tmp_path / "colors.onnx", keys.private)
    required = keys.public
    if kind == "unsigned":
        signature_path(model).unlink()
    elif kind == "changed":
        write_onnx(model, order=(1, 0, 2))
    elif kind == "other key":
        write_signed(model, create_key_pair(tmp_path, "other").private)
    elif kind == "garbage":
        signature_path(model).write_text("{}")
    else:
        required = keys.private
    with start_server(tmp_path / "server", model, "--workers", 1, "--require-signature", required) as server:
        assert server.wait() == 2
        [line] = server.err.splitlines()
        assert line.startswith("error: ")
        assert problem in line


def test_a_reload_keeps_the_version_until_the_new_file_is_signed(tmp_path: Path, keys: KeyPair) -> None:
    model = write_signed(tmp_path / "colors.onnx", keys.private)
    with run_server(tmp_path / "server", model, "--workers", 1, "--require-signature", keys.public) as server:
        assert label(server) == "red"
        replace(model, write_onnx(tmp_path / "new.onnx", order=(1, 0, 2)))
        server.signal(signal.SIGHUP)
        server.wait_for("colors.onnx is not what colors.onnx.sig signs")
        assert "kept colors at version" in server.err
        assert label(server) == "red"
        replace(model, write_signed(tmp_path / "new.onnx", keys.private, order=(1, 0, 2)))
        server.signal(signal.SIGHUP)
        server.wait_for("reloaded colors from version")
        assert label(server) == "green"


def test_a_watched_file_is_reloaded_when_its_signature_follows(tmp_path: Path, keys: KeyPair) -> None:
    model = write_signed(tmp_path / "colors.onnx", keys.private)
    options = ("--workers", 1, "--watch", "--require-signature", keys.public)
    with run_server(tmp_path / "server", model, *options) as server:
        new = write_signed(tmp_path / "new.onnx", keys.private, order=(1, 0, 2))
        new.replace(model)
        server.wait_for("colors.onnx is not what colors.onnx.sig signs")
        signature_path(new).replace(signature_path(model))
        server.wait_for("reloaded colors from version")
        assert label(server) == "green"


def test_every_version_and_folder_needs_a_signature(tmp_path: Path, keys: KeyPair) -> None:
    for version in ("1", "2"):
        (tmp_path / "colors" / version).mkdir(parents=True)
        write_signed(tmp_path / "colors" / version / "model.onnx", keys.private)
    repository = tmp_path / "exported.triton"
    (repository / "colors" / "1").mkdir(parents=True)
    write_onnx(repository / "colors" / "1" / "model.onnx")
    Signer(keys.private).sign(repository)
    options = ("--workers", 1, "--require-signature", keys.public)
    arguments = (tmp_path / "colors", f"whole={repository}")
    with run_server(tmp_path / "server", *arguments, *options) as server:
        assert label(server) == "red"
        assert len(server.request("GET", "/v1/models").json["models"]) == 3
    (repository / "colors" / "config.pbtxt").write_text("name: 'other'")
    with start_server(tmp_path / "changed", *arguments, *options) as server:
        assert server.wait() == 2
        assert "exported.triton is not what exported.triton.sig signs" in server.err
    shutil.rmtree(repository)
    signature_path(tmp_path / "colors" / "2" / "model.onnx").unlink()
    with start_server(tmp_path / "unsigned", arguments[0], *options) as server:
        assert server.wait() == 2
        assert "2/model.onnx is not signed" in server.err


def test_without_the_option_a_worker_imports_nothing_for_signatures() -> None:
    program = "import sys, cifarx_serve.server.processes.worker; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    for name in ("model_signing", "cryptography", "sigstore", "opentelemetry", "cifarx_serve.files.signature"):
        assert name not in imported
    assert "httptools" in imported


def test_a_shadow_needs_a_signature(tmp_path: Path, keys: KeyPair) -> None:
    model = write_signed(tmp_path / "colors.onnx", keys.private)
    shadow = write_onnx(tmp_path / "shadow.onnx", order=(1, 0, 2))
    options = (model, "--workers", 1, "--require-signature", keys.public, "--shadow", f"colors={shadow}")
    with start_server(tmp_path / "refused", *options) as server:
        assert server.wait() == 2
        assert "shadow.onnx is not signed" in server.err
    Signer(keys.private).sign(shadow)
    with run_server(tmp_path / "server", *options) as server:
        assert label(server) == "red"


def test_the_documented_commands(tmp_path: Path) -> None:
    create_key_pair(tmp_path)  # skips without model-signing
    section = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8").partition("## Signed artifacts")[2]
    commands = re.findall(r"^\$ (.*)$", section.partition("```console")[2].partition("```")[0], re.MULTILINE)
    model = write_onnx(tmp_path / "lzh_9.onnx")
    environment = {**os.environ, "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(command: str) -> None:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, capture_output=True)

    install, create, publish, export, verify, serve = commands
    assert install.startswith("pip install")
    run(create)
    run(publish)
    assert export.startswith("cifarx export ")
    Signer(tmp_path / shlex.split(export)[shlex.split(export).index("--sign") + 1]).sign(model)
    run(verify)
    arguments = [str(tmp_path / each) if "." in each else each for each in shlex.split(serve)[2:]]
    with run_server(tmp_path / "server", *arguments) as server:
        assert label(server) == "red"


def test_a_model_repository_loads_what_is_signed(tmp_path: Path, keys: KeyPair) -> None:
    repository = tmp_path / "models"
    repository.mkdir()
    write_signed(repository / "colors.onnx", keys.private)
    options = ("--workers", 1, "--model-repository", repository, "--model-control", "poll")
    with run_server(tmp_path / "server", *options, "--require-signature", keys.public) as server:
        assert label(server) == "red"
        new = write_onnx(repository / "swapped.onnx", order=(1, 0, 2))
        server.wait_for("swapped.onnx is not signed")
        Signer(keys.private).sign(new)
        wait_until(lambda: server.request("GET", "/v1/models/swapped").status == 200)
