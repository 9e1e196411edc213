"""Read FlatBuffers that may be damaged or hostile: every offset is checked before it is followed.

The format is described at https://flatbuffers.dev/internals: a table starts with the distance to its vtable, which
lists where in the table each field is; fields that are not numbers hold the distance to a table, vector or string.
"""

import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_MIN_VTABLE: Final = 4
"""The sizes of the vtable and of the table, two bytes each."""


class FlatBufferError(ValueError):
    """Raised when an offset or a size leads out of the buffer. The message says what it belongs to."""


class Table:
    """A table of a FlatBuffer.

    Args:
        data: the whole buffer.
        position: where the table starts.

    Raises:
        FlatBufferError: the table or one of its fields is outside the buffer.
    """

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position
        vtable = position - _number(data, "<i", position)
        size, self._size = _number(data, "<H", vtable), _number(data, "<H", vtable + 2)
        if size < _MIN_VTABLE or size % 2 or vtable + size > len(data) or position + self._size > len(data):
            raise FlatBufferError(f"the table at byte {position} is damaged")
        self._fields = struct.unpack_from(f"<{size // 2 - 2}H", data, vtable + 4)
        if any(0 < field < 4 or field >= self._size for field in self._fields):
            raise FlatBufferError(f"a field of the table at byte {position} is outside the table")

    @property
    def fields(self) -> list[int]:
        """The numbers of the fields that the table has."""
        return [number for number, offset in enumerate(self._fields) if offset]

    def number(self, field: int, code: str, default: int = 0) -> Any:
        """Return a number.

        Args:
            field: the number of the field.
            code: the type, as the module `struct` names it.
            default: the value if the table does not have the field.
        """
        offset = self._offset(field)
        if offset == 0:
            return default
        if offset + struct.calcsize(f"<{code}") > self._size:
            raise FlatBufferError(f"a field of the table at byte {self._position} is outside the table")
        return _number(self._data, f"<{code}", self._position + offset)

    def table(self, field: int) -> "Table | None":
        """Return a table, or None if the table does not have the field."""
        target = self._target(field)
        return None if target is None else Table(self._data, target)

    def tables(self, field: int) -> "list[Table]":
        """Return a vector of tables, which is empty if the table does not have the field."""
        start, length = self._vector(field, 4)
        starts = range(start, start + 4 * length, 4)
        return [Table(self._data, position + _number(self._data, "<I", position)) for position in starts]

    def text(self, field: int) -> bytes:
        """Return a string, which is empty if the table does not have the field."""
        start, length = self._vector(field, 1)
        return self._data[start : start + length]

    def numbers(self, field: int, dtype: str) -> NDArray[Any]:
        """Return a vector of numbers without copying it. It is empty if the table does not have the field.

        Args:
            field: the number of the field.
            dtype: the type, as NumPy names it. All of them are little-endian.
        """
        kind = np.dtype(dtype).newbyteorder("<")
        start, length = self._vector(field, kind.itemsize)
        return np.frombuffer(self._data, kind, length, start if length else 0)

    def _offset(self, field: int) -> int:
        return self._fields[field] if field < len(self._fields) else 0

    def _target(self, field: int) -> int | None:
        offset = self._offset(field)
        if offset == 0:
            return None
        if offset + 4 > self._size:
            raise FlatBufferError(f"a field of the table at byte {self._position} is outside the table")
        position = self._position + offset
        return position + int(_number(self._data, "<I", position))

    def _vector(self, field: int, item_size: int) -> tuple[int, int]:
        """Return where the first item of a vector is, and how many there are."""
        target = self._target(field)
        if target is None:
            return 0, 0
        length = int(_number(self._data, "<I", target))
        if target + 4 + length * item_size > len(self._data):
            raise FlatBufferError(f"the vector at byte {target} extends beyond the end")
        return target + 4, length


def root_table(data: bytes) -> Table:
    """Return the root table of a FlatBuffer.

    Raises:
        FlatBufferError: it is outside the buffer.
    """
    return Table(data, int(_number(data, "<I", 0)))


def _number(data: bytes, code: str, position: int) -> Any:
    if not 0 <= position <= len(data) - struct.calcsize(code):
        raise FlatBufferError(f"byte {position} is outside the file of {len(data)} bytes")
    return struct.unpack_from(code, data, position)[0]
