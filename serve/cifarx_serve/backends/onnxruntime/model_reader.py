"""Read the metadata of an ONNX file from its bytes, without a session, the ONNX library or its weights.

The file is a protobuf message, whose parts are identified by their field numbers in `onnx.proto`. Every message that
can contain a tensor is visited, so that content that is dangerous to open is refused: weights in other files, tensors
that declare more elements than they contain, functions, which can expand to any number of nodes, and excessive nesting.
Time and memory do not grow with the weights.
"""

import mmap
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from cifarx_serve.errors import ModelFileError, UsageError

_MAX_DEPTH: Final = 100
"""The maximum depth of nested messages, which is also the limit of protobuf's own parsers."""

_MAX_FIELDS: Final = 500_000
"""The maximum number of fields outside weights. The ONNX file of a ResNet-152 has about 10,000."""

_MAX_METADATA: Final = 4 << 20
"""The maximum size of the metadata in bytes. A spec takes a few thousand."""

_EXTERNAL: Final = 1
"""`TensorProto.DataLocation.EXTERNAL`"""

# Release of ONNX Runtime, the highest opset that it implements, the highest IR version that it reads.
_RELEASES: Final = (
    ("1.2", 11, 6),
    ("1.3", 12, 7),
    ("1.6", 13, 7),
    ("1.8", 14, 7),
    ("1.9", 15, 8),
    ("1.11", 16, 8),
    ("1.12", 17, 8),
    ("1.14", 18, 8),
    ("1.15", 19, 8),
    ("1.16", 19, 9),
    ("1.17", 20, 9),
    ("1.18", 21, 10),
    ("1.21", 22, 10),
    ("1.23", 23, 11),
    ("1.24", 25, 13),
)


class OnnxModelInfo(NamedTuple):
    """The metadata of an ONNX file.

    Attributes:
        ir_version: the version of the file format.
        opsets: the opset version by domain; "" is the domain of ONNX itself.
        metadata: `metadata_props`. If a key occurs several times, this is its last value, as in ONNX Runtime.
    """

    ir_version: int
    opsets: dict[str, int]
    metadata: dict[bytes, bytes]


def read_model_info(path: Path) -> OnnxModelInfo:
    """Read the metadata of an ONNX file and check that the file is safe to open.

    Raises:
        ModelFileError: the file is not an ONNX model, stores weights in another file, contains functions, or declares
            impossible sizes.
    """
    try:
        # Memory-mapped, so that the pages of the weights are never read.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).read()
    except _UnsafeModelError as error:
        raise ModelFileError(f"{path} {error}", error.remedy) from error
    except ValueError as error:  # _MalformedError, or from mmap for an empty file
        raise ModelFileError(f"{path} is not a valid ONNX model ({error})", "export it again") from error


def minimum_onnxruntime(ir_version: int, opset: int) -> str:
    """Return the oldest release of ONNX Runtime that supports an IR version and an opset, such as "1.18".

    Source: the table at https://onnxruntime.ai/docs/reference/compatibility.html up to 1.20. For later releases, the
    ONNX release that ONNX Runtime was built with (1.21: ONNX 1.17; 1.23: ONNX 1.18; 1.24: ONNX 1.20) and the table at
    https://github.com/onnx/onnx/blob/main/docs/Versioning.md.

    Raises:
        UsageError: no known release supports them.
    """
    for release, highest_opset, highest_ir in _RELEASES:
        if opset <= highest_opset and ir_version <= highest_ir:
            return release
    raise UsageError(
        f"no known ONNX Runtime supports opset {opset} with IR version {ir_version}", "choose a lower opset"
    )


class _UnsafeModelError(Exception):
    """A well-formed file that must not be opened.

    Args:
        problem: continues a sentence that starts with the path.
        remedy: how to get a file that can be opened.
    """

    def __init__(self, problem: str, remedy: str = "export it again") -> None:
        super().__init__(problem)
        self.remedy = remedy


class _MalformedError(ValueError):
    """Bytes that are not the expected protobuf message."""


class _Message(Enum):
    """The messages of `onnx.proto` that are a tensor or can contain one."""

    MODEL = auto()
    TRAINING = auto()
    FUNCTION = auto()
    GRAPH = auto()
    NODE = auto()
    ATTRIBUTE = auto()
    TENSOR = auto()
    SPARSE = auto()


# Field numbers of a message with the messages that they contain.
_CHILDREN: Final[dict[_Message, dict[int, _Message]]] = {
    _Message.MODEL: {7: _Message.GRAPH, 20: _Message.TRAINING, 25: _Message.FUNCTION},
    _Message.TRAINING: {1: _Message.GRAPH, 2: _Message.GRAPH},
    _Message.FUNCTION: {7: _Message.NODE, 11: _Message.ATTRIBUTE},
    _Message.GRAPH: {1: _Message.NODE, 5: _Message.TENSOR, 15: _Message.SPARSE},
    _Message.NODE: {5: _Message.ATTRIBUTE},
    _Message.ATTRIBUTE: {
        5: _Message.TENSOR,
        6: _Message.GRAPH,
        10: _Message.TENSOR,
        11: _Message.GRAPH,
        22: _Message.SPARSE,
        23: _Message.SPARSE,
    },
}

# Fields of `TensorProto`: external_data and data_location; float_data to int64_data, raw_data to uint64_data.
_EXTERNAL_FIELDS: Final = frozenset({13, 14})
_DATA_FIELDS: Final = frozenset({4, 5, 6, 7, 9, 10, 11})

# Wire types of protobuf's encoding.
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5

_Field: TypeAlias = tuple[int, int, int, int]
"""Field number, wire type, and the start and end of the content. For a varint, its value replaces the start."""


class _Reader:
    """Reads one file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._fields_left = _MAX_FIELDS
        self._metadata_left = _MAX_METADATA

    def read(self) -> OnnxModelInfo:
        ir_version, graphs, functions = 0, 0, 0
        opsets: dict[str, int] = {}
        metadata: dict[bytes, bytes] = {}
        for number, wire_type, start, end in self._fields(0, len(self._data)):
            if number == 1 and wire_type == _VARINT:
                ir_version = start
            elif wire_type != _BYTES:
                continue
            elif number == 8:
                domain, version = self._read_opset(start, end)
                opsets[domain] = version
            elif number == 14:
                key, value = self._read_string_entry(start, end)
                metadata[key] = value
            elif message := _CHILDREN[_Message.MODEL].get(number):
                graphs += message is _Message.GRAPH
                functions += message is _Message.FUNCTION
                self._check_message(message, start, end)
        if functions:
            raise _UnsafeModelError(
                "contains functions, which can expand to any number of nodes",
                "inline them with `cifarx adopt`, or export it again",
            )
        if not ir_version or not graphs:
            raise _MalformedError("it has no IR version or no graph")
        return OnnxModelInfo(ir_version, opsets, metadata)

    def _check_message(self, message: _Message, start: int, end: int) -> None:
        """Check a message and all messages in it. This is not recursive: a file may nest deeper than Python allows."""
        pending = [(message, start, end, 1)]
        while pending:
            message, start, end, depth = pending.pop()
            if depth > _MAX_DEPTH:
                raise _UnsafeModelError(f"nests its graphs more than {_MAX_DEPTH} messages deep")
            if message is _Message.SPARSE:
                raise _UnsafeModelError("contains a sparse tensor, which can declare any size")
            if message is _Message.TENSOR:
                self._check_tensor(start, end)
                continue
            children = _CHILDREN[message]
            for number, wire_type, child_start, child_end in self._fields(start, end):
                if wire_type == _BYTES and number in children:
                    pending.append((children[number], child_start, child_end, depth + 1))

    def _check_tensor(self, start: int, end: int) -> None:
        """Check that a tensor's data is in the file and has as many elements as its dimensions declare."""
        elements, size, name = 1, 0, b""
        for number, wire_type, field_start, field_end in self._fields(start, end):
            if number == 1:
                for dimension in [field_start] if wire_type == _VARINT else self._varints(field_start, field_end):
                    elements *= _require_non_negative(dimension)
                    if elements > len(self._data) * 4:
                        raise _UnsafeModelError(
                            f"has a tensor of at least {elements:,} elements, which do not fit into the file"
                        )
            elif number in _EXTERNAL_FIELDS:
                self._refuse_external(wire_type, field_start, field_end)
            elif number in _DATA_FIELDS:
                # An element of an unpacked list counts as one byte, and so does an empty string.
                size += 1 if wire_type == _VARINT else field_end - field_start + (number == 6)
            elif number == 8 and wire_type == _BYTES:
                name = self._data[field_start : min(field_end, field_start + 60)]
        if elements > size * 4:  # a byte holds four 2-bit elements; all other types take more space
            raise _UnsafeModelError(f"has a tensor ({_printable(name)}) of {elements:,} elements in {size:,} bytes")

    def _refuse_external(self, wire_type: int, start: int, end: int) -> None:
        """Refuse the location in `external_data`, or a `data_location` of EXTERNAL, which follows it."""
        location = b""
        if wire_type == _BYTES:
            key, location = self._read_string_entry(start, end)
            if key != b"location":
                return
        elif start != _EXTERNAL:
            return
        raise _UnsafeModelError(
            f"stores its weights in another file ({_printable(location)})",
            "put them into the file with `cifarx adopt`, or export it again",
        )

    def _read_opset(self, start: int, end: int) -> tuple[str, int]:
        """Read an `OperatorSetIdProto`: domain and version."""
        domain, version = "", 0
        for number, wire_type, field_start, field_end in self._fields(start, end):
            if number == 1 and wire_type == _BYTES:
                domain = self._data[field_start : min(field_end, field_start + 1000)].decode(errors="replace")
            elif number == 2 and wire_type == _VARINT:
                version = field_start
        return domain, version

    def _read_string_entry(self, start: int, end: int) -> tuple[bytes, bytes]:
        """Read a `StringStringEntryProto`: key and value."""
        self._metadata_left -= end - start
        if self._metadata_left < 0:
            raise _UnsafeModelError(f"has more than {_MAX_METADATA:,} bytes of metadata")
        key = value = b""
        for number, wire_type, field_start, field_end in self._fields(start, end):
            if number == 1 and wire_type == _BYTES:
                key = self._data[field_start:field_end]
            elif number == 2 and wire_type == _BYTES:
                value = self._data[field_start:field_end]
        return key, value

    def _varints(self, start: int, end: int) -> Iterator[int]:
        while start < end:
            self._count_field()
            value, start = self._read_varint(start, end)
            yield value

    def _count_field(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise _UnsafeModelError(f"has more than {_MAX_FIELDS:,} fields outside its weights")

    def _fields(self, start: int, end: int) -> Iterator[_Field]:
        while start < end:
            self._count_field()
            tag, start = self._read_varint(start, end)
            number, wire_type = tag >> 3, tag & 7
            if not 0 < number < 1 << 29:
                raise _MalformedError(f"invalid field number {number}")
            if wire_type == _VARINT:
                value, start = self._read_varint(start, end)
                yield number, wire_type, value, start
                continue
            if wire_type == _BYTES:
                length, start = self._read_varint(start, end)
            elif wire_type in (_FOUR_BYTES, _EIGHT_BYTES):
                length = 4 if wire_type == _FOUR_BYTES else 8
            else:
                raise _MalformedError(f"invalid wire type {wire_type}")
            if start + length > end:
                raise _MalformedError(f"a field of {length:,} bytes where only {end - start:,} are left")
            yield number, wire_type, start, start + length
            start += length

    def _read_varint(self, start: int, end: int) -> tuple[int, int]:
        """Return a 64-bit varint, whose bytes hold seven bits each in little-endian order, and the offset after it."""
        value = shift = 0
        while start < end and shift < 64 + 6:
            byte = self._data[start]
            start += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (1 << 64) - 1, start
            shift += 7
        raise _MalformedError("an unterminated varint")


def _require_non_negative(dimension: int) -> int:
    """Return a dimension of a tensor. Dimensions are signed 64-bit integers."""
    if dimension >> 63:
        raise _UnsafeModelError(f"has a tensor with a dimension of {dimension - (1 << 64)}")
    return dimension


def _printable(name: bytes) -> str:
    """Return the first 60 bytes of a name on one line."""
    return ascii(name[:60].decode(errors="replace")) if name else "unnamed"
