"""Files of `torch.save` in both formats: their tensors, and damaged and hostile files."""

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from cifarx_serve.errors import CifarxError, ModelFileError
from cifarx_train.checkpoints.external.pickle_machine import Global, ObjectStub
from cifarx_train.checkpoints.external.torch_file import as_dtype, load_torch_file
from tests.support.external_checkpoints import both_formats, save
from tests.support.hostile_pickles import Call, assert_refused, imported_names, shell_command, with_pickle

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn),
]


def loaded(path: Path, content: Any, zipped: bool = True) -> Any:
    return load_torch_file(save(content, path, zipped))


@both_formats
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_type(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    tensor = torch.arange(12).to(dtype).reshape(3, 4)
    read = loaded(tmp_path / "x.pth", {"a": tensor}, zipped)["a"]
    assert read.dtype is dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


@both_formats
def test_views_and_shared_storages(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24.0)
    content = {
        "base": base,
        "part": base[3:9],
        "transposed": base.reshape(4, 6).T,
        "every other": base[::2],
        "expanded": torch.ones(1).expand(5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    read = loaded(tmp_path / "x.pth", content, zipped)
    for name, tensor in content.items():
        assert type(read[name]) is torch.Tensor
        assert not read[name].requires_grad
        assert read[name].stride() == tensor.stride()
        assert torch.equal(read[name], tensor)
    assert read["part"].untyped_storage().data_ptr() == read["base"].untyped_storage().data_ptr()


@both_formats
def test_special_tensors_become_stubs(tmp_path: Path, zipped: bool) -> None:
    content = {
        "sparse": torch.eye(2).to_sparse(),
        "conjugated": torch.ones(1, dtype=torch.complex64).conj(),
        "meta": torch.ones(1, device="meta"),
    }
    read = loaded(tmp_path / "x.pth", content, zipped)
    assert all(type(value) is ObjectStub for value in read.values())


@both_formats
def test_plain_values_keep_their_types(tmp_path: Path, zipped: bool) -> None:
    content = {
        "list": [1, 2.5, "a", None, True],
        "tuple": (1, (2,)),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "set": {"a", (1, 2)},
        "frozenset": frozenset({1}),
        "bytes": b"\x00\xff",
        "number": 2**70,
        1: "an integer key",
    }
    assert loaded(tmp_path / "x.pth", content, zipped) == content


def test_the_versions_in_a_state_dict_are_kept(tmp_path: Path) -> None:
    state_dict = models.mnasnet0_5(num_classes=3).state_dict()
    state_dict._metadata[""]["other"] = object
    read = loaded(tmp_path / "x.pth", state_dict)
    assert read._metadata[""] == {"version": 2}
    assert read._metadata["layers"] == {"version": 1}


@both_formats
def test_the_device_of_a_storage_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save({"a": torch.ones(3)}, tmp_path / "x.pth", zipped)
    assert b"cuda:0" in (tmp_path / "x.pth").read_bytes()
    assert torch.equal(load_torch_file(tmp_path / "x.pth")["a"], torch.ones(3))


def test_the_names_of_dtypes() -> None:
    assert as_dtype(Global("torch.float16")) is torch.float16
    for other in (Global("torch.nn.float16"), Global("torch.load"), Global("torch.float"), "torch.float16", None):
        assert as_dtype(other) is (torch.float32 if other == Global("torch.float") else None)


# --- damaged and hostile files


def test_a_changed_byte_is_detected(tmp_path: Path) -> None:
    path = save({"a": torch.arange(1000.0)}, tmp_path / "x.pth")
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ModelFileError, match="not a readable checkpoint"):
        load_torch_file(path)


def test_two_pickles_with_the_same_name_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bad = pickle.dumps(Call(os.system, shell_command(marker)), 2)
    for number, pickles in enumerate([(bad, pickle.dumps({}, 2)), (pickle.dumps({}, 2), bad)]):
        path = with_pickle(tmp_path / f"{number}.pth", *pickles)
        assert "os.system" in imported_names(path)
        assert_refused(path)
    assert not marker.exists()


def test_a_torchscript_archive_is_not_a_checkpoint(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(Twice(), torch.zeros(1)), tmp_path / "x.pth")
    assert any(name.startswith("__torch__") for name in imported_names(tmp_path / "x.pth"))
    assert_refused(tmp_path / "x.pth", "is a TorchScript archive, not a checkpoint")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02\x8b\xff\xff\xff\x7f",  # LONG4 of 2 GiB
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string of 2 GiB
        b"\x80\x02" + b"(" * 10**5 + b".",
        b"\x80\x02" + b"]" + b"\x85" * 10**5 + b".",
        b"\x80\x02" + b"K\x01r\xff\xff\xff\x7f" + b"j\xfe\xff\xff\x7f.",
        b"\x80\x02ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
        b"\x80\x02R.",
        b"\x80\x02N" * 1000,
        b"",
    ],
    ids=["long", "string", "marks", "nested tuples", "memo", "tensor", "empty stack", "no stop", "empty"],
)
def test_pickles_that_would_exhaust_the_memory_are_refused(tmp_path: Path, data: bytes) -> None:
    assert_refused(with_pickle(tmp_path / "x.pth", data))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_in_the_old_format_is_refused(tmp_path: Path, fraction: float) -> None:
    path = save(models.squeezenet1_1(num_classes=10), tmp_path / "x.pth", zipped=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    assert_refused(path, "not a readable checkpoint")


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuM\x04\x00tQ%b\x89Ntb."
)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (b"K\x00", b"K\x05\x85", b"K\x01\x85"),
        (b"K\x04", b"K\x01\x85", b"K\x01\x85"),
        (b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85"),
        (b"K\x00", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
        (b"K\x00", b"\x8a\x06\x00\x00\x00\x00\x00\x10\x85", b"K\x01\x85"),
        (b"K\x00", b"K\x02K\x02\x86", b"K\x01\x85"),
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path: Path, offset: bytes, size: bytes, stride: bytes) -> None:
    save({"a": torch.ones(4)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    tensor = TENSOR.replace(b"%b", offset + size + stride).replace(b"tb.", b"tR.")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, b"\x80\x02" + tensor if name.endswith("data.pkl") else content)
    with pytest.raises(ModelFileError, match="not a readable checkpoint"):
        load_torch_file(tmp_path / "x.pth")


def test_an_old_file_cannot_declare_more_weights_than_it_has(tmp_path: Path) -> None:
    path = save({"a": torch.ones(4)}, tmp_path / "x.pth", zipped=False)
    content = re.sub(rb"(cpuq.)K\x04", lambda match: match[1] + b"J\xff\xff\xff\x7f", path.read_bytes())
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="larger than the file"):
        load_torch_file(path)


def test_a_key_that_would_take_forever_to_hash_is_refused(tmp_path: Path) -> None:
    """Each tuple contains the one before twice, so a hash of the last one would visit 2**60 items."""
    nested = b"K\x01" + b"2\x86" * 60
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02}" + nested + b"K\x01s.")
    assert_refused(path, "a key of more than 1000 items")
    counter = b"ccollections\nCounter\n](" + nested + b"K\x01ta\x85R."  # Counter([(nested, 1)])
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02" + counter)
    assert_refused(path, "a Counter that is not made from a dict")


@given(st.binary(max_size=300))
def test_random_pickles_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = with_pickle(tmp_path_factory.getbasetemp() / "random.pth", b"\x80\x02" + content)
    try:
        load_torch_file(path)
    except CifarxError as error:
        assert "random.pth" in str(error)
