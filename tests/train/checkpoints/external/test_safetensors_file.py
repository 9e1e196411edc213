"""Safetensors files are read with their metadata; a damaged one is an error of one line."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cifarx_serve.errors import ModelFileError
from cifarx_train.checkpoints.external.safetensors_file import load_safetensors


def test_tensors_and_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half(), "c": torch.tensor(3)}
    save_file(tensors, tmp_path / "x", {"classes": json.dumps(["cat", "dog"])})
    found = load_safetensors(tmp_path / "x")
    assert found.metadata == {"classes": '["cat", "dog"]'}
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)


def test_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "x")
    tensors = load_safetensors(tmp_path / "x").tensors
    content = (tmp_path / "x").read_bytes()
    with (tmp_path / "x").open("r+b") as file:
        file.write(bytes(len(content)))
    assert torch.equal(tensors["a"], torch.ones(1000))


@pytest.mark.parametrize("cut", [4, 12, 60, -1])
def test_a_truncated_file_is_an_error(tmp_path: Path, cut: int) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:cut])
    with pytest.raises(ModelFileError, match="is not a readable safetensors file"):
        load_safetensors(tmp_path / "x")


HEADERS = [
    '{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
    "{" * 1000,
]


@pytest.mark.parametrize("header", HEADERS)
def test_impossible_headers_are_errors(tmp_path: Path, header: str) -> None:
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(ModelFileError, match="is not a readable safetensors file"):
        load_safetensors(tmp_path / "x")


@given(st.binary(max_size=200))
def test_random_headers_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + b"{" + content)
    with pytest.raises(ModelFileError):
        load_safetensors(path)
