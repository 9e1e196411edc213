"""Recognize the format of a model file by its content, because names such as `.pt` and `.bin` say little about it.

Only the first bytes and, for a zip archive, its directory are read.
"""

from collections.abc import Collection
from enum import Enum, auto
from pathlib import Path
from typing import Final

from cifarx_serve.files.regular_file import open_regular_file

_HEAD: Final = 64
"""The number of bytes that identify every format but the zip archives."""

_ZIP_START: Final = b"PK\x03\x04"
_PICKLE_START: Final = b"\x80"
# The number that PyTorch wrote first before 1.6, as a little-endian integer: 0x1950a86a20f9469cfc6c.
_TORCH_MAGIC: Final = bytes.fromhex("6cfc9c46f9206aa85019")
# The length of the JSON header is limited by the library that reads the format.
_MAX_SAFETENSORS_HEADER: Final = 100_000_000
_SAFETENSORS_LENGTH: Final = 8
_HUGGING_FACE_CONFIG: Final = "config.json"
# The first field of an ONNX model is `ir_version`, a small number. One of these follows: producer_name,
# producer_version, domain, model_version, doc_string, graph, opset_import or metadata_props.
_ONNX_IR_VERSION: Final = 0x08
_ONNX_SECOND_FIELDS: Final = b"\x12\x1a\x22\x28\x32\x3a\x42\x72"
# The identifiers of the FlatBuffers schemas, which follow the offset of the root table.
_EXECUTORCH_IDENTIFIER: Final = b"ET12"
_LITERT_IDENTIFIER: Final = b"TFL3"
_FLATBUFFERS_IDENTIFIER: Final = slice(4, 8)


class FileFormat(Enum):
    """A format of model files."""

    ONNX = auto()
    TORCHSCRIPT = auto()
    EXPORTED_PROGRAM = auto()
    AOT_INDUCTOR = auto()
    OPENVINO = auto()
    EXECUTORCH = auto()
    LITERT = auto()
    TORCH_ZIP = auto()
    """A file of `torch.save`."""
    TORCH_PICKLE = auto()
    """A file of `torch.save` before PyTorch 1.6."""
    SAFETENSORS = auto()
    HUGGING_FACE = auto()
    """A directory that `save_pretrained` of Hugging Face's transformers wrote."""


CHECKPOINT_FORMATS: Final = frozenset({FileFormat.TORCH_ZIP, FileFormat.TORCH_PICKLE, FileFormat.SAFETENSORS})
"""The formats that contain weights, and are read by `cifarx_train`."""


def detect_format(path: Path) -> FileFormat | None:
    """Return the format of a file or a directory, or None if it is unknown, damaged, no regular file or missing."""
    try:
        with open_regular_file(path) as file:
            head = file.read(_HEAD)
        if head.startswith(_ZIP_START):
            return _archive_format(path)
        return _head_format(head, path.stat().st_size)
    except OSError:
        return FileFormat.HUGGING_FACE if (path / _HUGGING_FACE_CONFIG).is_file() else None


def _head_format(head: bytes, size: int) -> FileFormat | None:
    if head.startswith(_PICKLE_START) and _TORCH_MAGIC in head:
        return FileFormat.TORCH_PICKLE
    if head[_FLATBUFFERS_IDENTIFIER] == _EXECUTORCH_IDENTIFIER:
        return FileFormat.EXECUTORCH
    if head[_FLATBUFFERS_IDENTIFIER] == _LITERT_IDENTIFIER:
        return FileFormat.LITERT
    length = int.from_bytes(head[:_SAFETENSORS_LENGTH], "little")
    fits = length <= min(_MAX_SAFETENSORS_HEADER, size - _SAFETENSORS_LENGTH)
    if fits and head[_SAFETENSORS_LENGTH : _SAFETENSORS_LENGTH + 1] == b"{":
        return FileFormat.SAFETENSORS
    is_onnx = len(head) > 2 and head[0] == _ONNX_IR_VERSION and 0 < head[1] < 0x80 and head[2] in _ONNX_SECOND_FIELDS
    return FileFormat.ONNX if is_onnx else None


def _archive_format(path: Path) -> FileFormat | None:
    """Return the format of a zip archive, from the names of its members."""
    import zipfile  # imported here because ONNX files do not need it

    try:
        with zipfile.ZipFile(path) as archive:
            return _member_format(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeError):
        return FileFormat.TORCH_ZIP if b"/data.pkl" in _first_bytes(path) else None


def _member_format(names: Collection[str]) -> FileFormat | None:
    if {"model.xml", "model.bin"} <= set(names):
        return FileFormat.OPENVINO
    # Every other member is in one directory, whose name is that of the file when it was written.
    members = {name.partition("/")[2] for name in names}
    if any(name.startswith("data/aotinductor/") for name in members):
        return FileFormat.AOT_INDUCTOR
    if "archive_format" in members or any(name.startswith("models/") for name in members):
        return FileFormat.EXPORTED_PROGRAM
    if "constants.pkl" in members:
        return FileFormat.TORCHSCRIPT
    return FileFormat.TORCH_ZIP if "data.pkl" in members else None


def _first_bytes(path: Path) -> bytes:
    """Return the bytes in which a truncated archive of PyTorch names its first member."""
    with path.open("rb") as file:
        return file.read(1024)
