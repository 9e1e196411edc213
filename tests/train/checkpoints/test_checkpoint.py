import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifarx_serve.errors import CifarxError, ModelFileError, OutputError, SpecError, UsageError
from cifarx_serve.spec import SCHEMA_VERSION, InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import (
    Checkpoint,
    checkpoint_path,
    file_sha256,
    load_checkpoint,
    save_checkpoint,
)
from cifarx_train.models.registry import get_architecture
from tests.support.checkpoint_assertions import deep_equal

SPEC = ModelSpec(model="lzh", class_names=("cat", "dog", "frog"), input=InputSpec(height=32, width=32))

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and resource limits")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A checkpoint with the training state of two steps of SGD with momentum."""
    torch.manual_seed(0)
    module = get_architecture("lzh").build(3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        module(torch.rand(2, 3, 32, 32)).sum().backward()
        optimizer.step()
    training = {"epoch": 4, "step": 2, "optimizer": optimizer.state_dict(), "random": {"cpu": torch.get_rng_state()}}
    return Checkpoint(SPEC, module.state_dict(), training)


@pytest.fixture(scope="module")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with that checkpoint. Tests must not write to it."""
    path = tmp_path_factory.mktemp("saved") / "lzh_4.pth"
    save_checkpoint(path, checkpoint)
    return path


def leaves(value: Any) -> list[Any]:
    match value:
        case dict():
            return [leaf for item in value.items() for part in item for leaf in leaves(part)]
        case list() | tuple():
            return [leaf for item in value for leaf in leaves(item)]
    return [value]


def test_epochs_in_file_names_count_from_0() -> None:
    assert checkpoint_path(Path("run"), "lzh", 9) == Path("run/lzh_9.pth")


def test_a_checkpoint_round_trips(checkpoint: Checkpoint, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert loaded.spec == checkpoint.spec
    assert deep_equal(loaded.weights, dict(checkpoint.weights))
    assert deep_equal(loaded.training, checkpoint.training)


def test_pytorch_can_load_it_with_weights_only(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert type(content) is dict
    assert all(type(leaf) in {str, int, float, bool, type(None), torch.Tensor} for leaf in leaves(content))
    assert msgspec.json.decode(content["spec"])["class_names"] == ["cat", "dog", "frog"]
    get_architecture("lzh").build(3).load_state_dict(content["model"])
    torch.optim.SGD(get_architecture("lzh").build(3).parameters()).load_state_dict(content["training"]["optimizer"])


def test_build_returns_the_model_in_eval_mode(checkpoint: Checkpoint, saved: Path) -> None:
    module = load_checkpoint(saved).build()
    assert not module.training
    assert deep_equal(dict(module.state_dict()), dict(checkpoint.weights))


def test_the_file_does_not_contain_its_path(saved: Path) -> None:
    assert str(saved.parent).encode() not in saved.read_bytes()


def test_equal_checkpoints_are_equal_files(checkpoint: Checkpoint, saved: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / saved.name, checkpoint)
    assert (tmp_path / saved.name).read_bytes() == saved.read_bytes()


def test_saving_replaces_the_file_and_creates_the_directory(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "new" / "run" / "lzh_0.pth"
    save_checkpoint(path, checkpoint)
    save_checkpoint(path, checkpoint._replace(training={"epoch": 7}))
    assert load_checkpoint(path).training == {"epoch": 7}
    assert [file.name for file in path.parent.iterdir()] == ["lzh_0.pth"]


def test_saving_over_a_directory_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "lzh_0.pth").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        save_checkpoint(tmp_path / "lzh_0.pth", checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == ["lzh_0.pth"]


def test_file_sha256_hashes_the_bytes(saved: Path) -> None:
    assert file_sha256(saved) == hashlib.sha256(saved.read_bytes()).hexdigest()


# --- invalid files


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"a text\n" * 100,
        png(),
        zipped(),
        zipped(readme=b"hello"),
        zipped(**{"archive/data.pkl": b"hello", "archive/version": b"3\n"}),
        random.Random(0).randbytes(5000),
    ],
    ids=["empty", "zip-magic", "text", "png", "empty-zip", "random-zip", "zip-like-ours", "noise"],
)
def test_a_file_that_is_not_a_checkpoint_is_rejected(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lzh_0.pth"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"lzh_0\.pth is not a readable checkpoint.*cifarx train"):
        load_checkpoint(path)


def test_a_missing_file_and_a_directory_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        load_checkpoint(tmp_path / "lzh_0.pth")
    with pytest.raises(ModelFileError, match="is a directory"):
        load_checkpoint(tmp_path)


@given(st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_truncated_checkpoint_is_rejected(saved: Path, tmp_path: Path, part: float) -> None:
    content = saved.read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ModelFileError, match="is not a readable checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_without_its_last_byte_is_rejected(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="is not a readable checkpoint"):
        load_checkpoint(tmp_path / "cut.pth")


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_changed_byte_is_detected_or_has_no_effect(
    saved: Path, checkpoint: Checkpoint, tmp_path: Path, place: float, change: int
) -> None:
    content = bytearray(saved.read_bytes())
    content[int(place * len(content))] ^= change
    path = tmp_path / "changed.pth"
    path.write_bytes(content)
    try:
        loaded = load_checkpoint(path)
    except CifarxError:
        return
    assert loaded.spec == checkpoint.spec
    assert deep_equal(loaded.weights, dict(checkpoint.weights))
    assert deep_equal(loaded.training, checkpoint.training)


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@pytest.mark.filterwarnings("ignore::cifarx_serve.errors.FallbackWarning")  # weights without a spec still load
def test_a_changed_pickle_with_valid_checksums_raises_only_cifarx_errors(
    saved: Path, tmp_path: Path, changes: list[tuple[float, int]]
) -> None:
    path = tmp_path / "changed.pth"
    with zipfile.ZipFile(saved) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            content = bytearray(good.read(name))
            if name.endswith("data.pkl"):
                for place, value in changes:
                    content[int(place * len(content))] = value
            bad.writestr(name, bytes(content))
    try:
        load_checkpoint(path).build()
    except CifarxError as error:
        assert error.exit_status == 2


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": {}, "training": {}},
        {"spec": None, "model": {}, "training": {}},
        {"spec": {"schema_version": 1}, "model": {}, "training": {}},
        [1, 2, 3],
        torch.zeros(3),
    ],
    ids=["empty", "no-spec", "null-spec", "dict-spec", "list", "tensor"],
)
def test_a_pytorch_file_without_a_spec_is_rejected(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match="is not a cifarx checkpoint"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [{"training": {}}, {"model": {}}, {"model": 1, "training": {}}])
def test_a_checkpoint_without_weights_is_rejected(content: dict[str, object], tmp_path: Path) -> None:
    torch.save({"spec": SPEC.to_json(), **content}, tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match="contains no weights"):
        load_checkpoint(tmp_path / "x.pth")


def save_with_spec(path: Path, document: str) -> Path:
    torch.save({"spec": document, "model": {}, "training": {}}, path)
    return path


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 1},
        {"model.8.bias": "zero"},
        {"a": Path("x")},
        {"a": torch.ones(1), 3: torch.ones(1)},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.zeros(1).expand(10**6, 10**6)},
    ],
    ids=["a number", "a text", "an object", "a number as a key", "a sparse tensor", "a view of 4 TB"],
)
def test_a_state_dict_with_other_values_than_tensors_is_rejected(weights: dict[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "lzh_0.pth"
    torch.save({"spec": SPEC.to_json(), "model": weights, "training": {}}, path)
    with pytest.raises(ModelFileError, match=r"lzh_0\.pth"):
        load_checkpoint(path)


def test_complex_and_expanded_tensors_and_extra_state_are_read(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2, dtype=torch.complex64), "b": torch.ones(1).expand(4, 3), "c._extra_state": {"x": 1}}
    torch.save({"spec": SPEC.to_json(), "model": weights, "training": {}}, tmp_path / "net_0.pth")
    assert deep_equal(load_checkpoint(tmp_path / "net_0.pth").weights, weights)


def test_a_newer_spec_schema_is_rejected(tmp_path: Path) -> None:
    newer = msgspec.json.decode(SPEC.to_json()) | {"schema_version": SCHEMA_VERSION + 1, "input": "of another type"}
    path = save_with_spec(tmp_path / "x.pth", msgspec.json.encode(newer).decode())
    with pytest.raises(SpecError, match=rf"x\.pth has spec schema {SCHEMA_VERSION + 1}.*install a newer cifarx"):
        load_checkpoint(path)


@pytest.mark.parametrize("document", ["", "{}", "not json", '{"schema_version": 1}', '{"schema_version": "1"}', "[]"])
def test_a_malformed_spec_is_rejected(document: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"x\.pth contains a malformed model spec"):
        load_checkpoint(save_with_spec(tmp_path / "x.pth", document))


def other_weights() -> dict[str, object]:
    weights = get_architecture("lzh").build(3).state_dict()
    return {
        "nothing": {},
        "another network": torch.nn.Linear(2, 2).state_dict(),
        "other classes": get_architecture("lzh").build(4).state_dict(),
        "one too few": {name: weights[name] for name in list(weights)[1:]},
        "one too many": {**weights, "model.9.weight": torch.zeros(3)},
    }


@pytest.mark.parametrize("kind", list(other_weights()))
def test_weights_of_another_model_are_rejected(kind: str, tmp_path: Path) -> None:
    torch.save({"spec": SPEC.to_json(), "model": other_weights()[kind], "training": {}}, tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match="the weights do not match the model lzh") as caught:
        load_checkpoint(tmp_path / "x.pth").build()
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_not_reported_as_a_damaged_file(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, model="lzh2")
    torch.save({"spec": spec.to_json(), "model": {}, "training": {}}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="unknown model 'lzh2': did you mean 'lzh'"):
        load_checkpoint(tmp_path / "x.pth").build()


class Payload:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"echo > {self.marker}",)


@pytest.mark.parametrize("zipped_format", [True, False])
@pytest.mark.parametrize("place", ["whole", "spec", "model", "training"])
def test_code_in_a_checkpoint_is_never_executed(
    checkpoint: Checkpoint, tmp_path: Path, place: str, zipped_format: bool
) -> None:
    marker = tmp_path / "marker"
    payload = Payload(marker)
    content: Any = {"spec": SPEC.to_json(), "model": dict(checkpoint.weights), "training": {}}
    content = payload if place == "whole" else {**content, place: payload}
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped_format)
    with pytest.raises(ModelFileError, match=r"x\.pth would run code \(os\.system\): it was not loaded"):
        load_checkpoint(path)
    assert not marker.exists()
    # The payload is effective: PyTorch lists its shell command among the unsafe globals of the file.
    if zipped_format:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        assert any(name.endswith(".system") for name in asked)


# --- full disks and killed processes

_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from cifarx_serve.errors import OutputError
from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint

path, size = Path(sys.argv[1]), Path(sys.argv[1]).stat().st_size
checkpoint = load_checkpoint(path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 1, 1000, size // 4, size // 2, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(path, checkpoint)
    except OutputError as error:
        print(error)
    else:
        sys.exit(f"saved with room for {limit} of {size} bytes")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save_checkpoint(path.with_name("after.pth"), checkpoint)
"""


@needs_fork
def test_a_full_disk_is_an_error_and_keeps_the_old_file(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "lzh_4.pth"
    shutil.copy(saved, path)
    ran = subprocess.run([sys.executable, "-c", _FULL_DISK, path], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 6
    assert all(line.startswith(f"cannot write {path} (") and "free some space" in line for line in lines)
    assert path.read_bytes() == saved.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["after.pth", "lzh_4.pth"]


# Importing PyTorch takes seconds, so the child processes are forked.
_KILLED = """
import os, random, signal, sys, time
from itertools import count
from pathlib import Path
from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
checkpoint = load_checkpoint(source)
for kill in range(12):
    child = os.fork()
    if child == 0:
        for number in count():
            training = {"number": number}
            save_checkpoint(folder / f"lzh_{number % 3}.pth", checkpoint._replace(training=training))
    time.sleep(random.uniform(0.01, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in folder.glob("lzh_*.pth"):
        load_checkpoint(path).build()
"""


@pytest.mark.slow
@needs_fork
def test_a_killed_process_leaves_only_complete_files(saved: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", _KILLED, saved, tmp_path], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    paths = list(tmp_path.glob("lzh_*.pth"))
    assert paths
    assert all(deep_equal(load_checkpoint(path).weights, dict(checkpoint.weights)) for path in paths)
    # The partial file of a killed process is hidden, so it cannot be mistaken for a checkpoint.
    assert all(path.name.startswith(".") for path in tmp_path.iterdir() if path not in paths)
