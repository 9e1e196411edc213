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
from cifarx_serve.files.checksum import MARKER, SealState, damaged_member, read_seal, seal
from tests.support.color_model import SPEC, write_onnx, write_torchscript
from tests.support.trained_model import Trained

CPU = Device("cpu")


@pytest.fixture(params=[write_onnx, write_torchscript], ids=["onnx", "torchscript"])
def sealed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path: Path = request.param(tmp_path / ("x.onnx" if request.param is write_onnx else "x.torchscript.pt"))
    assert read_seal(path).state is SealState.ABSENT
    seal(path)
    return path


def flips(path: Path, count: int) -> list[tuple[int, int]]:
    """Places in a file, each with bits to flip there."""
    generator = random.Random(0)
    size = path.stat().st_size
    return [(generator.randrange(size), generator.randrange(1, 256)) for _ in range(count)]


def flip(path: Path, place: int, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bits]))


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_a_thousand_flips_of_a_trained_model_are_found(kind: str, trained: Trained, tmp_path: Path) -> None:
    made: Path = getattr(trained, kind)
    path = tmp_path / made.name
    shutil.copy(made, path)
    seal(path)
    assert read_seal(path).state is SealState.INTACT
    for place, bits in flips(path, 1000):
        flip(path, place, bits)
        assert read_seal(path).state is not SealState.INTACT, place
        flip(path, place, bits)
    assert read_seal(path).state is SealState.INTACT


def test_every_flip_of_the_seal_itself_is_found(sealed: Path) -> None:
    size = sealed.stat().st_size
    for place in range(size - 120, size):
        for bits in (1, 0x20, 0x80):  # 0x20 turns small letters to capitals
            flip(sealed, place, bits)
            assert read_seal(sealed).state is not SealState.INTACT, place
            flip(sealed, place, bits)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 500), more=st.binary(max_size=5))
def test_a_cut_or_longer_file_is_found(sealed: Path, cut: int, more: bytes) -> None:
    whole = sealed.read_bytes()
    try:
        sealed.write_bytes(whole[:-cut] + more)
        assert read_seal(sealed).state is not SealState.INTACT or sealed.read_bytes() == whole
    finally:
        sealed.write_bytes(whole)


def test_holds_exactly_one_seal_and_sealing_again_changes_nothing(sealed: Path) -> None:
    whole = sealed.read_bytes()
    assert whole.count(MARKER) == 1
    seal(sealed)
    assert sealed.read_bytes() == whole
    flip(sealed, 100, 1)
    assert read_seal(sealed).state is SealState.CHANGED
    seal(sealed)
    assert read_seal(sealed).state is SealState.INTACT
    assert len(sealed.read_bytes()) == len(whole)


def test_an_onnx_file_is_still_what_it_was(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "x.onnx")
    before = path.read_bytes()
    seal(path)
    assert path.read_bytes().startswith(before)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert model.metadata_props.pop().key == "cifarx.seal"
    assert model.SerializeToString() == before
    with OnnxRuntimeBackend(path, CPU) as backend:
        assert backend.spec == SPEC
        assert backend.run(np.ones((1, 3, 4, 6), np.float32)).tolist() == [[10, 10, 10]]


def test_every_reader_of_pytorch_takes_a_sealed_archive(tmp_path: Path) -> None:
    script = write_torchscript(tmp_path / "x.torchscript.pt")
    seal(script)
    with TorchScriptBackend(script, CPU) as backend:
        assert backend.spec == SPEC
    weights = tmp_path / "x.pth"
    torch.save({"weight": torch.arange(3)}, weights)
    seal(weights)
    for mmap in (False, True):
        assert torch.load(weights, weights_only=True, mmap=mmap)["weight"].tolist() == [0, 1, 2]
    program = tmp_path / "x.pt2"
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), program)
    seal(program)
    assert torch.export.load(program).module()(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]
    for path in (script, weights, program):
        assert read_seal(path).state is SealState.INTACT
        assert damaged_member(path) is None
        with zipfile.ZipFile(path) as archive:
            assert archive.comment.startswith(MARKER)


@pytest.mark.parametrize("content", [b"", b"x" * 10, b"x" * 1000, MARKER, MARKER + b"0" * 63])
def test_files_that_carry_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert read_seal(path) == (SealState.ABSENT, "")


@pytest.mark.parametrize("digits", [b"0" * 64, b"g" * 64, b"\xff" * 64, b"A" * 64])
def test_digits_that_are_not_the_files(tmp_path: Path, digits: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"a model" + MARKER + digits)
    assert read_seal(path).state is SealState.CHANGED


def test_files_with_no_place_for_a_seal(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"weights")
    with pytest.raises(ModelFileError, match="no place for a seal"):
        seal(path)
    commented = tmp_path / "x.zip"
    with zipfile.ZipFile(commented, "w") as archive:
        archive.writestr("a", b"")
        archive.comment = b"mine"
    with pytest.raises(ModelFileError, match="with a comment"):
        seal(commented)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(300 << 20)
    code = (
        "import resource, sys; from pathlib import Path; from cifarx_serve.files.checksum import read_seal, seal\n"
        "path = Path(sys.argv[1]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "seal(path); print(read_seal(path).state.value)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 20)"
    )
    assert fresh_python(code, path).split() == ["intact", "True"]


def test_a_flip_of_a_checkpoint_is_found_by_its_checksums_or_changes_no_weight(tmp_path: Path) -> None:
    """Between an archive's members lie dates, padding and attributes, which change nothing that is loaded."""
    path = tmp_path / "x.pth"
    generator = torch.Generator().manual_seed(0)
    saved = {f"layer{n}": torch.rand(64, generator=generator) for n in range(4)}
    torch.save(saved, path)
    found = sum(is_found(path, saved, place, bits) for place, bits in flips(path, 1000))
    assert 100 < found < 1000


def is_found(path: Path, saved: dict[str, torch.Tensor], place: int, bits: int) -> bool:
    """Whether a flip makes the checksums or the reader fail; where not, everything loads as it was saved."""
    flip(path, place, bits)
    try:
        if damaged_member(path):
            return True
        loaded = torch.load(path, weights_only=True)
    except Exception:
        return True
    finally:
        flip(path, place, bits)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    return False
