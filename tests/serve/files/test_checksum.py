import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.backends.torch.torchscript import TorchScriptBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import ModelFileError
from cifarx_serve.files.checksum import MARKER, ChecksumState, damaged_member, read_checksum, write_checksum
from tests.support.color_model import SPEC, write_onnx, write_torchscript
from tests.support.trained_model import Trained

CPU = Device("cpu")


@pytest.fixture(params=[write_onnx, write_torchscript], ids=["onnx", "torchscript"])
def checksummed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path: Path = request.param(tmp_path / ("x.onnx" if request.param is write_onnx else "x.torchscript.pt"))
    assert read_checksum(path).state is ChecksumState.ABSENT
    write_checksum(path)
    return path


def flips(path: Path, count: int) -> list[tuple[int, int]]:
    """Return random offsets in a file, each with the bits to flip there."""
    generator = random.Random(0)
    size = path.stat().st_size
    return [(generator.randrange(size), generator.randrange(1, 256)) for _ in range(count)]


def flip(path: Path, offset: int, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ bits]))


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_a_thousand_flipped_bytes_of_a_trained_model_are_detected(kind: str, trained: Trained, tmp_path: Path) -> None:
    made: Path = getattr(trained, kind)
    path = tmp_path / made.name
    shutil.copy(made, path)
    write_checksum(path)
    assert read_checksum(path).state is ChecksumState.INTACT
    for offset, bits in flips(path, 1000):
        flip(path, offset, bits)
        assert read_checksum(path).state is not ChecksumState.INTACT, offset
        flip(path, offset, bits)
    assert read_checksum(path).state is ChecksumState.INTACT


def test_every_flip_in_the_checksum_itself_is_detected(checksummed: Path) -> None:
    size = checksummed.stat().st_size
    for offset in range(size - 120, size):
        for bits in (1, 0x20, 0x80):  # 0x20 turns small letters to capitals
            flip(checksummed, offset, bits)
            assert read_checksum(checksummed).state is not ChecksumState.INTACT, offset
            flip(checksummed, offset, bits)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 500), more=st.binary(max_size=5))
def test_a_truncated_or_extended_file_is_detected(checksummed: Path, cut: int, more: bytes) -> None:
    whole = checksummed.read_bytes()
    try:
        checksummed.write_bytes(whole[:-cut] + more)
        assert read_checksum(checksummed).state is not ChecksumState.INTACT or checksummed.read_bytes() == whole
    finally:
        checksummed.write_bytes(whole)


def test_writing_the_checksum_again_changes_nothing(checksummed: Path) -> None:
    whole = checksummed.read_bytes()
    assert whole.count(MARKER) == 1
    write_checksum(checksummed)
    assert checksummed.read_bytes() == whole
    flip(checksummed, 100, 1)
    assert read_checksum(checksummed).state is ChecksumState.CHANGED
    write_checksum(checksummed)
    assert read_checksum(checksummed).state is ChecksumState.INTACT
    assert len(checksummed.read_bytes()) == len(whole)


def test_an_onnx_file_with_a_checksum_is_the_same_model(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "x.onnx")
    before = path.read_bytes()
    write_checksum(path)
    assert path.read_bytes().startswith(before)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert model.metadata_props.pop().key == "cifarx.seal"
    assert model.SerializeToString() == before
    with OnnxRuntimeBackend(path, CPU) as backend:
        assert backend.spec == SPEC
        assert backend.run(np.ones((1, 3, 4, 6), np.float32)).tolist() == [[10, 10, 10]]


def test_every_loader_of_pytorch_reads_an_archive_with_a_checksum(tmp_path: Path) -> None:
    script = write_torchscript(tmp_path / "x.torchscript.pt")
    write_checksum(script)
    with TorchScriptBackend(script, CPU) as backend:
        assert backend.spec == SPEC
    weights = tmp_path / "x.pth"
    torch.save({"weight": torch.arange(3)}, weights)
    write_checksum(weights)
    for mmap in (False, True):
        assert torch.load(weights, weights_only=True, mmap=mmap)["weight"].tolist() == [0, 1, 2]
    program = tmp_path / "x.pt2"
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), program)
    write_checksum(program)
    assert torch.export.load(program).module()(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]
    for path in (script, weights, program):
        assert read_checksum(path).state is ChecksumState.INTACT
        assert damaged_member(path) is None
        with zipfile.ZipFile(path) as archive:
            assert archive.comment.startswith(MARKER)


@pytest.mark.parametrize("content", [b"", b"x" * 10, b"x" * 1000, MARKER, MARKER + b"0" * 63])
def test_files_without_a_checksum(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert read_checksum(path) == (ChecksumState.ABSENT, "")


@pytest.mark.parametrize("digits", [b"0" * 64, b"g" * 64, b"\xff" * 64, b"A" * 64])
def test_digits_that_do_not_match(tmp_path: Path, digits: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"a model" + MARKER + digits)
    assert read_checksum(path).state is ChecksumState.CHANGED


def test_files_that_cannot_hold_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"weights")
    with pytest.raises(ModelFileError, match="cannot hold a checksum"):
        write_checksum(path)
    commented = tmp_path / "x.zip"
    with zipfile.ZipFile(commented, "w") as archive:
        archive.writestr("a", b"")
        archive.comment = b"mine"
    with pytest.raises(ModelFileError, match="a zip archive with a comment"):
        write_checksum(commented)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(300 << 20)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from cifarx_serve.files.checksum import read_checksum, write_checksum\n"
        "path = Path(sys.argv[1]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_checksum(path); print(read_checksum(path).state.value)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 20)"
    )
    assert fresh_python(code, path).split() == ["intact", "True"]


def test_a_flip_in_a_checkpoint_is_detected_by_its_crcs_or_changes_no_weight(tmp_path: Path) -> None:
    """The bytes between members are dates, padding and attributes, which do not affect what is loaded."""
    path = tmp_path / "x.pth"
    generator = torch.Generator().manual_seed(0)
    saved = {f"layer{n}": torch.rand(64, generator=generator) for n in range(4)}
    torch.save(saved, path)
    detected = sum(is_detected(path, saved, offset, bits) for offset, bits in flips(path, 1000))
    assert 100 < detected < 1000


def is_detected(path: Path, saved: dict[str, torch.Tensor], offset: int, bits: int) -> bool:
    """Return whether the CRCs or the loader detect a flip. If not, check that all tensors load as they were saved."""
    flip(path, offset, bits)
    try:
        if damaged_member(path):
            return True
        loaded = torch.load(path, weights_only=True)
    except Exception:
        return True
    finally:
        flip(path, offset, bits)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    return False
