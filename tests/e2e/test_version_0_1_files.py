"""Files of version 0.1.0: the checkpoint and every kind of artifact load, pass the parity check and serve.

The files are written here as that version wrote them: its spec, word for word, with the weights of this test session.
"""

import hashlib
import json
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from tests.support.command_line import Cli
from tests.support.conversion import write_artifact
from tests.support.server_process import start_server, wait_until_ready
from tests.support.trained_model import Trained

SPEC = (
    '{"schema_version":1,"model":"lzh","stem":"own","class_names":["airplane","automobile","bird","cat","deer","dog",'
    '"frog","horse","ship","truck"],"input":{"height":32,"width":32,"channels":3,"layout":"NCHW","dtype":"float32",'
    '"colour":"RGB","value_range":[0.0,1.0],"mean":[0.0,0.0,0.0],"std":[1.0,1.0,1.0],"resize":"bilinear"},'
    '"output":"logits","precision":"fp32","embedded_preprocessing":false,"minimum_onnxruntime":null,"training":{"data":'
    '{"name":"builtin drawings","kind":"builtin","train_images":10000,"test_images":2000,"train_fingerprint":'
    '"40ce663ad6472b8488b2b20e9da963091f61081f28a85c63798693297b423838","test_fingerprint":'
    '"9e9e4f194d6fd289129264271c54c74aed28e36bc2d649315e1bcddec9e63db6"},"recipe":{"name":"fast","epochs":1,'
    '"batch_size":128,"learning_rate":0.05,"optimizer":"sgd","bias_rate":null,"head_rate":null,"momentum":0.9,'
    '"nesterov":true,"weight_decay":0.0005,"schedule":"linear","warm_up":0.2,"label_smoothing":0.1,"clip_norm":1.0,'
    '"ema":0.9,"normalise":false,"flip":true,"crop":2,"cutout":0,"jitter":0.0,"precision":"fp32","channels_last":true,'
    '"compile":false,"patience":null,"max_minutes":null},"epochs":1,"seed":0,"test_accuracy":0.9675,"test_loss":'
    '0.3435202178955078,"device":"cpu","versions":{"torch":"2.15.0","numpy":"2.4.6"}},"checkpoint_sha256":null,'
    '"weights_sha256":null,"exporter":null,"parity":null}'
)
"""The spec of a checkpoint; the artifacts add what they know."""

PARITY = {
    "passed": True,
    "images": 2000,
    "batch_sizes": [1, 3, 64],
    "max_abs_error": 2.86102294921875e-06,
    "mean_abs_error": 3.0920786590925195e-07,
    "p999_abs_error": 1.9073486328125e-06,
    "required_tolerance": 9.946570627387085e-07,
    "atol": 0.0001,
    "rtol": 0.0001,
    "agreement": 1.0,
    "forgiven": 0,
    "reference_accuracy": 0.9675,
    "accuracy": 0.9675,
    "nonfinite": 0,
    "provider": "CPUExecutionProvider",
    "data": "builtin drawings",
    "data_fingerprint": "9e9e4f194d6fd289129264271c54c74aed28e36bc2d649315e1bcddec9e63db6",
}
NEW_FIELDS: dict[str, object] = {
    "agreement_bound": None,
    "test_images": None,
    "training_images": 0,
    "warnings": [],
    "class_rates": None,
    "score_rates": None,
}
"""The fields that later versions added, with the values for older files."""

MARKER = b"cifarx-seal:"


def artifact_spec(kind: str) -> str:
    """Return the spec as version 0.1.0 wrote it into an artifact."""
    exporter = {"format": kind, "torch": "2.15.0", "onnx": "1.23.2"}
    return json.dumps({**json.loads(SPEC), "exporter": exporter, "parity": PARITY}, separators=(",", ":"))


def write_onnx(path: Path, trained: Trained, kind: str = "onnx") -> None:
    model = onnx.load(trained.onnx)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {"cifarx.spec": artifact_spec(kind)})
    key = b"cifarx.seal"
    entry = b"\x0a" + bytes([len(key)]) + key + b"\x12" + bytes([len(MARKER) + 64]) + MARKER
    head = model.SerializeToString() + b"\x72" + bytes([len(entry) + 64]) + entry
    path.write_bytes(head + hashlib.sha256(head).hexdigest().encode())


def write_triton(path: Path, trained: Trained) -> None:
    (path / "lzh" / "1").mkdir(parents=True)
    (path / "lzh" / "config.pbtxt").write_text('name: "lzh"\nbackend: "onnxruntime"\n')
    write_onnx(path / "lzh" / "1" / "model.onnx", trained, "triton")


def write_torchscript(path: Path, trained: Trained) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        module = torch.jit.load(trained.torchscript)
        torch.jit.save(module, path, _extra_files={"cifarx_spec.json": artifact_spec("torchscript")})
    seal_archive(path)


def write_exported_program(path: Path, trained: Trained) -> None:
    new = path.with_name("new.pt2")
    write_artifact(trained.checkpoint, "pt2", new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            is_spec = member.filename.endswith("cifarx_spec.json")
            target.writestr(member, artifact_spec("pt2") if is_spec else source.read(member))
    new.unlink()
    seal_archive(path)


def seal_archive(path: Path) -> None:
    """Store the checksum in the comment of a zip archive."""
    head = path.read_bytes()[:-2] + (len(MARKER) + 64).to_bytes(2, "little") + MARKER
    path.write_bytes(head + hashlib.sha256(head).hexdigest().encode())


WRITERS: dict[str, Callable[[Path, Trained], None]] = {
    "lzh_0.onnx": write_onnx,
    "lzh_0.torchscript.pt": write_torchscript,
    "lzh_0.pt2": write_exported_program,
    "lzh_0.triton": write_triton,
}


@pytest.fixture(scope="module")
def old_files(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one file of each kind. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("version_0_1")
    weights = torch.load(trained.checkpoint, weights_only=True)["model"]
    torch.save({"spec": SPEC, "model": weights, "training": {}}, folder / "lzh_0.pth")
    for name, write in WRITERS.items():
        if not (name.endswith(".torchscript.pt") and sys.version_info >= (3, 14)):  # PyTorch refuses TorchScript there
            write(folder / name, trained)
    return folder


@pytest.fixture
def old_copy(old_files: Path, tmp_path: Path) -> Path:
    """A copy of the old files to write next to."""
    return Path(shutil.copytree(old_files, tmp_path / "old"))


def test_a_checkpoint_is_read_with_the_new_field_names(old_files: Path, cli: Cli) -> None:
    shown: dict[str, Any] = cli("inspect", old_files / "lzh_0.pth", "--json").json
    recipe = shown["training"]["recipe"]
    assert (recipe["warmup_fraction"], recipe["ema_decay"], recipe["max_grad_norm"]) == (0.2, 0.9, 1.0)
    assert shown["input"]["color"] == "RGB"


@pytest.mark.slow
def test_a_checkpoint_is_exported(old_copy: Path, cli: Cli) -> None:
    done = cli("export", "--ckpt", old_copy / "lzh_0.pth", "--format", "onnx", "--data", "builtin", "--out", "new")
    assert done.status == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_an_artifact_is_inspected_and_passes_the_parity_check(name: str, old_files: Path, cli: Cli) -> None:
    path = old_files / name
    if not path.exists():
        pytest.skip("PyTorch has no TorchScript on this Python")
    assert cli("inspect", path, "--check").status == 0
    verified = cli("verify", path, "--ckpt", old_files / "lzh_0.pth", "--data", "builtin")
    assert verified.status == 0, verified.out + verified.err


@pytest.mark.slow
def test_an_artifact_is_served(old_files: Path, tmp_path: Path) -> None:
    with start_server(tmp_path, old_files / "lzh_0.onnx") as server:
        wait_until_ready(server)
        (model,) = server.request("GET", "/v1/models").json["models"]
        assert model["spec"]["parity"] == {**PARITY, **NEW_FIELDS}
