"""The format of a file is recognized by its content, whatever its name is."""

import io
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cifarx_serve.backends.openvino import GRAPH_FILE, WEIGHTS_FILE
from cifarx_serve.files.file_format import CHECKPOINT_FORMATS, FileFormat, detect_format
from tests.support.color_model import write_onnx
from tests.support.litert_model import write_litert


def write_torch_zip(path: Path, content: Any = None) -> None:
    torch.save({"a": torch.zeros(3)} if content is None else content, path)


def write_torch_pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


def write_torch_pickle_of_protocol_4(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path, pickle_protocol=4, _use_new_zipfile_serialization=False)


def write_torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), path)


def write_exported_program(path: Path) -> None:
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(2),)), buffer := io.BytesIO())
    path.write_bytes(buffer.getvalue())


def write_openvino(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in (GRAPH_FILE, WEIGHTS_FILE):
            archive.writestr(name, "")


def write_executorch(path: Path) -> None:
    path.write_bytes(b"\x3c\0\0\0ET12eh00")


def write_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(3)}, path)


WRITERS: list[tuple[Callable[[Path], Any], FileFormat]] = [
    (write_torch_zip, FileFormat.TORCH_ZIP),
    (lambda path: write_torch_zip(path, nn.Linear(2, 2)), FileFormat.TORCH_ZIP),
    (write_torch_pickle, FileFormat.TORCH_PICKLE),
    (write_torch_pickle_of_protocol_4, FileFormat.TORCH_PICKLE),
    (write_torchscript, FileFormat.TORCHSCRIPT),
    (write_exported_program, FileFormat.EXPORTED_PROGRAM),
    (write_safetensors, FileFormat.SAFETENSORS),
    (write_openvino, FileFormat.OPENVINO),
    (write_litert, FileFormat.LITERT),
    (write_executorch, FileFormat.EXECUTORCH),
    (write_onnx, FileFormat.ONNX),
]


@pytest.mark.parametrize(("write", "expected"), WRITERS)
@pytest.mark.parametrize("name", ["model", "model.pt", "model.onnx", "model.pth.tar"])
def test_the_name_does_not_matter(
    tmp_path: Path, write: Callable[[Path], Any], expected: FileFormat, name: str
) -> None:
    write(tmp_path / "written")
    path = (tmp_path / "written").rename(tmp_path / name)
    assert detect_format(path) is expected


def test_a_compiled_package_is_recognized_by_its_directory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("x/archive_format", "pt2")
        archive.writestr("x/data/aotinductor/model/model.so", "")
    assert detect_format(tmp_path / "x") is FileFormat.AOT_INDUCTOR


def test_a_truncated_checkpoint_is_still_a_checkpoint(tmp_path: Path) -> None:
    write_torch_zip(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[:700])
    assert detect_format(tmp_path / "x") is FileFormat.TORCH_ZIP


def test_a_directory_of_hugging_face_is_recognized_by_its_configuration(tmp_path: Path) -> None:
    assert detect_format(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert detect_format(tmp_path) is FileFormat.HUGGING_FACE


def test_the_formats_of_checkpoints() -> None:
    assert FileFormat.SAFETENSORS in CHECKPOINT_FORMATS
    assert FileFormat.TORCHSCRIPT not in CHECKPOINT_FORMATS


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"PK",
        b"PK\x03\x04",
        b"\x80\x02}q\x00.",
        b"\x89PNG\r\n\x1a\n" + bytes(60),
        b"{}",
        b"\xff" * 8 + b"{}",
        (1000).to_bytes(8, "little") + b"{}",
    ],
)
def test_other_content_is_unknown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert detect_format(tmp_path / "x.pt") is None


def test_a_zip_archive_of_another_kind_is_unknown(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("images/dog.png", "")
    assert detect_format(tmp_path / "x.pt") is None


def test_missing_files_directories_and_pipes_are_unknown(tmp_path: Path) -> None:
    assert detect_format(tmp_path) is None
    assert detect_format(tmp_path / "absent") is None
    os.mkfifo(tmp_path / "pipe")
    assert detect_format(tmp_path / "pipe") is None
    assert detect_format(Path("/dev/zero")) is None


@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x08\x07"]))
def test_no_content_raises(tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pt"
    path.write_bytes(start + content)
    detect_format(path)
