"""What an ONNX file says, read from its bytes: no session, no ONNX library, no weight loaded.

The file is a protobuf message; what is read of it is found by its field numbers in `onnx.proto`. Every message that
can hold a tensor is visited, so that what would be dangerous to open is refused here: weights in other files, tensors
that claim more elements than they hold, nesting without end. Time and memory do not grow with the weights.
"""

import mmap
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from cifarx_serve.errors import ModelFileError, UsageError

_MAX_DEPTH: Final = 100
"""Messages inside one another; the limit of protobuf's own readers."""

_MAX_FIELDS: Final = 500_000
"""Fields outside weights; the ONNX file of a ResNet-152 has some 10,000."""

_MAX_METADATA: Final = 4 << 20
"""Bytes; a spec has some thousands."""

_EXTERNAL: Final = 1
"""`TensorProto.DataLocation.EXTERNAL`"""

# ONNX Runtime release, the highest opset it implements, the highest IR version it reads.
_RELEASES: Final = (
    ("1.14", 18, 8),
    ("1.15", 19, 8),
    ("1.16", 19, 9),
    ("1.17", 20, 9),
    ("1.18", 21, 10),
    ("1.21", 22, 10),
    ("1.23", 23, 11),
    ("1.24", 25, 13),
)


class OnnxFile(NamedTuple):
    """What a file says about itself.

    Attributes:
        ir_version: of the format.
        opsets: version by domain; "" is ONNX's own.
        metadata: `metadata_props`; of several entries of one key the last, as ONNX Runtime has it.
    """

    ir_version: int
    opsets: dict[str, int]
    metadata: dict[bytes, bytes]


def read_onnx(path: Path) -> OnnxFile:
    """Read a file's facts and make sure that it is safe to open.

    Raises:
        ModelFileError: not an ONNX model, weights in another file, or sizes that cannot be.
    """
    try:
        # Mapped, so that the pages of the weights are never touched.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).read()
    except _RefusedError as error:
        raise ModelFileError(f"{path} {error}", "it is not opened; export it again") from error
    except ValueError as error:  # _MalformedError, and mmap's own for an empty file
        raise ModelFileError(f"{path} is not an ONNX model that can be run ({error})", "export it again") from error


def minimum_onnxruntime(ir_version: int, opset: int) -> str:
    """The oldest ONNX Runtime that reads this IR version and implements this opset, as "1.18".

    Source: the table of https://onnxruntime.ai/docs/reference/compatibility.html up to 1.20; after it, by the ONNX
    release that each ONNX Runtime was built with (1.21: ONNX 1.17; 1.23: ONNX 1.18; 1.24: ONNX 1.20) and the table of
    https://github.com/onnx/onnx/blob/main/docs/Versioning.md.

    Raises:
        UsageError: newer than all that are known here.
    """
    for release, highest_opset, highest_ir in _RELEASES:
        if opset <= highest_opset and ir_version <= highest_ir:
            return release
    raise UsageError(
        f"no ONNX Runtime is known here that runs opset {opset} with IR version {ir_version}", "choose a lower opset"
    )


class _RefusedError(Exception):
    """A well-formed file that is not opened; the message goes on after the file's name."""


class _MalformedError(ValueError):
    """Bytes that are no protobuf message, or not the one they should be."""


class _Kind(Enum):
    """Messages of `onnx.proto` that hold a tensor or may hold one that does."""

    MODEL = auto()
    TRAINING = auto()
    FUNCTION = auto()
    GRAPH = auto()
    NODE = auto()
    ATTRIBUTE = auto()
    TENSOR = auto()
    SPARSE = auto()


# Field number to the kind of message in it.
_INSIDE: Final[dict[_Kind, dict[int, _Kind]]] = {
    _Kind.MODEL: {7: _Kind.GRAPH, 20: _Kind.TRAINING, 25: _Kind.FUNCTION},
    _Kind.TRAINING: {1: _Kind.GRAPH, 2: _Kind.GRAPH},
    _Kind.FUNCTION: {7: _Kind.NODE, 11: _Kind.ATTRIBUTE},
    _Kind.GRAPH: {1: _Kind.NODE, 5: _Kind.TENSOR, 15: _Kind.SPARSE},
    _Kind.NODE: {5: _Kind.ATTRIBUTE},
    _Kind.ATTRIBUTE: {
        5: _Kind.TENSOR,
        6: _Kind.GRAPH,
        10: _Kind.TENSOR,
        11: _Kind.GRAPH,
        22: _Kind.SPARSE,
        23: _Kind.SPARSE,
    },
}

# Fields of `TensorProto`: external_data and data_location; float_data to int64_data, raw_data to uint64_data.
_EXTERNAL_FIELDS: Final = frozenset({13, 14})
_DATA_FIELDS: Final = frozenset({4, 5, 6, 7, 9, 10, 11})

# Wire types of protobuf's encoding.
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5

_Field: TypeAlias = tuple[int, int, int, int]
"""Number, wire type, and where the content begins and ends; a varint's value stands in place of the beginning."""


class _Reader:
    """One walk over a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._fields_left = _MAX_FIELDS
        self._metadata_left = _MAX_METADATA

    def read(self) -> OnnxFile:
        ir_version, graphs = 0, 0
        opsets: dict[str, int] = {}
        metadata: dict[bytes, bytes] = {}
        for number, wire, begin, end in self._fields(0, len(self._data)):
            if number == 1 and wire == _VARINT:
                ir_version = begin
            elif wire != _BYTES:
                continue
            elif number == 8:
                domain, version = self._opset(begin, end)
                opsets[domain] = version
            elif number == 14:
                key, value = self._entry(begin, end)
                metadata[key] = value
            elif kind := _INSIDE[_Kind.MODEL].get(number):
                graphs += kind is _Kind.GRAPH
                self._visit(kind, begin, end)
        if not ir_version or not graphs:
            raise _MalformedError("it has no IR version or no graph")
        return OnnxFile(ir_version, opsets, metadata)

    def _visit(self, kind: _Kind, begin: int, end: int) -> None:
        """Every message below, without recursion: a file may nest deeper than Python."""
        waiting = [(kind, begin, end, 1)]
        while waiting:
            kind, begin, end, depth = waiting.pop()
            if depth > _MAX_DEPTH:
                raise _RefusedError(f"nests its graphs more than {_MAX_DEPTH} messages deep")
            if kind is _Kind.SPARSE:
                raise _RefusedError("holds a sparse tensor, of whatever size it says")
            if kind is _Kind.TENSOR:
                self._check_tensor(begin, end)
                continue
            inside = _INSIDE[kind]
            for number, wire, start, stop in self._fields(begin, end):
                if wire == _BYTES and number in inside:
                    waiting.append((inside[number], start, stop, depth + 1))

    def _check_tensor(self, begin: int, end: int) -> None:
        """Its data are here and as many as its dimensions say."""
        elements, held, name = 1, 0, b""
        for number, wire, start, stop in self._fields(begin, end):
            if number == 1:
                for size in [start] if wire == _VARINT else self._varints(start, stop):
                    elements *= _dimension(size)
                    if elements > len(self._data) * 4:
                        raise _RefusedError(f"has a tensor of {elements:,} elements or more, which it cannot hold")
            elif number in _EXTERNAL_FIELDS:
                self._refuse_external(wire, start, stop)
            elif number in _DATA_FIELDS:
                # A number of an unpacked list counts for one byte, an empty string for one too.
                held += 1 if wire == _VARINT else stop - start + (number == 6)
            elif number == 8 and wire == _BYTES:
                name = self._data[start : min(stop, start + 60)]
        if elements > held * 4:  # four 2-bit numbers to a byte; all others take more room
            raise _RefusedError(f"has a tensor {_told(name)} of {elements:,} elements in {held:,} bytes")

    def _refuse_external(self, wire: int, start: int, stop: int) -> None:
        """`external_data`, whose entries say where the data are, or `data_location`, after them."""
        location = b""
        if wire == _BYTES:
            key, location = self._entry(start, stop)
            if key != b"location":
                return
        elif start != _EXTERNAL:
            return
        raise _RefusedError(f"holds its weights in another file ({_told(location)})")

    def _opset(self, begin: int, end: int) -> tuple[str, int]:
        domain, version = "", 0
        for number, wire, start, stop in self._fields(begin, end):
            if number == 1 and wire == _BYTES:
                domain = self._data[start : min(stop, start + 1000)].decode(errors="replace")
            elif number == 2 and wire == _VARINT:
                version = start
        return domain, version

    def _entry(self, begin: int, end: int) -> tuple[bytes, bytes]:
        """A `StringStringEntryProto`."""
        self._metadata_left -= end - begin
        if self._metadata_left < 0:
            raise _RefusedError(f"has more than {_MAX_METADATA:,} bytes of metadata")
        key = value = b""
        for number, wire, start, stop in self._fields(begin, end):
            if number == 1 and wire == _BYTES:
                key = self._data[start:stop]
            elif number == 2 and wire == _BYTES:
                value = self._data[start:stop]
        return key, value

    def _varints(self, begin: int, end: int) -> Iterator[int]:
        while begin < end:
            self._spend()
            value, begin = self._varint(begin, end)
            yield value

    def _spend(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise _RefusedError(f"has more than {_MAX_FIELDS:,} fields beside its weights")

    def _fields(self, begin: int, end: int) -> Iterator[_Field]:
        while begin < end:
            self._spend()
            key, begin = self._varint(begin, end)
            number, wire = key >> 3, key & 7
            if not 0 < number < 1 << 29:
                raise _MalformedError(f"field number {number}")
            if wire == _VARINT:
                value, begin = self._varint(begin, end)
                yield number, wire, value, begin
                continue
            if wire == _BYTES:
                length, begin = self._varint(begin, end)
            elif wire in (_FOUR_BYTES, _EIGHT_BYTES):
                length = 4 if wire == _FOUR_BYTES else 8
            else:
                raise _MalformedError(f"wire type {wire}")
            if begin + length > end:
                raise _MalformedError(f"a field of {length:,} bytes where {end - begin:,} are left")
            yield number, wire, begin, begin + length
            begin += length

    def _varint(self, begin: int, end: int) -> tuple[int, int]:
        """A number of 64 bits, seven a byte and the lowest first, and where it ends."""
        value = shift = 0
        while begin < end and shift < 64 + 6:
            byte = self._data[begin]
            begin += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (1 << 64) - 1, begin
            shift += 7
        raise _MalformedError("a number without an end")


def _dimension(value: int) -> int:
    """Dimensions are signed."""
    if value >> 63:
        raise _RefusedError(f"has a tensor with a dimension of {value - (1 << 64)}")
    return value


def _told(text: bytes) -> str:
    """At most 60 bytes of a name, on one line."""
    return ascii(text[:60].decode(errors="replace")) if text else "of no name"
