"""Decode tensors of the Open Inference Protocol: numbers, or image files of type BYTES; as JSON or binary data."""

import math
import struct
from collections.abc import Sequence
from http import HTTPStatus
from itertools import chain
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.server.api.json_images import decode_base64
from cifarx_serve.server.errors import RequestError

Tensor: TypeAlias = NDArray[np.float32] | NDArray[np.uint8]

EncodedImages: TypeAlias = list[bytes]
"""The elements of a BYTES tensor: the contents of image files."""

_LENGTH: Final = struct.Struct("<I")
"""The number of bytes of an element, which precedes it in binary data."""

DTYPES: Final[dict[str, np.dtype[Any]]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
"""NumPy dtypes of the protocol's data types; binary tensor data is little-endian."""


def from_binary(raw: memoryview, datatype: str, shape: Sequence[int]) -> Tensor:
    """Return a tensor from its bytes in row-major order: a view of them if they are aligned, otherwise a copy.

    Raises:
        RequestError: the number of bytes does not match the shape, or a number is not finite (400).
    """
    dtype = DTYPES[datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        problem = f"{len(raw)} bytes of binary data do not match {datatype} {list(shape)}"
        raise RequestError(HTTPStatus.BAD_REQUEST, problem, f"send {expected} bytes")
    # The length of the JSON determines where the tensor starts, so its address can be odd.
    tensor: Tensor = np.require(np.frombuffer(raw, dtype), requirements="A").reshape(shape)
    if dtype.kind == "f" and not (finite := np.isfinite(tensor)).all():
        index = int(finite.argmin())
        raise _not_finite(f"number {index} of the binary data is {tensor.flat[index]}")
    return tensor


def from_numbers(data: Sequence[Any], datatype: str, shape: Sequence[int]) -> Tensor:
    """Return a read-only tensor from the numbers of a JSON array.

    Args:
        data: the numbers in row-major order, or nested in lists like the shape; those of UINT8 are 0 to 255.
        datatype: FP32 or UINT8.
        shape: the shape of the tensor.

    Raises:
        RequestError: the numbers do not match the shape, or one is too large for float32 (400).
    """
    numbers = _flatten(data, shape) if data and isinstance(data[0], list) else data
    if len(numbers) != math.prod(shape):
        raise _wrong_shape(f"{len(numbers)} numbers", shape)
    if datatype == "UINT8":
        return np.frombuffer(bytes(numbers), np.uint8).reshape(shape)
    try:
        packed = struct.pack(f"<{len(numbers)}f", *numbers)  # three times as fast as converting the list with NumPy
    except OverflowError as error:
        raise _not_finite(f"the data has {max(numbers, key=abs)}, which is too large for float32") from error
    return np.frombuffer(packed, DTYPES["FP32"]).reshape(shape)


def images_from_binary(raw: bytes | memoryview, shape: Sequence[int]) -> EncodedImages:
    """Return the elements of a BYTES tensor: each is its length in four bytes, little-endian, and its bytes.

    Raises:
        RequestError: the lengths do not match the bytes or the shape (400).
    """
    images: EncodedImages = []
    position, end, count = 0, len(raw), math.prod(shape)
    while position < end and len(images) < count:
        start = position + _LENGTH.size
        size = _LENGTH.unpack_from(raw, position)[0] if start <= end else 0
        if start + size > end:
            problem = f"element {len(images)} has {size} bytes and {max(0, end - start)} follow its length"
            raise RequestError(HTTPStatus.BAD_REQUEST, problem, "send four bytes of length before each image file")
        position = start + size
        images.append(bytes(raw[start:position]))
    if len(images) != count or position != end:
        found = f"more than {count}" if position != end else str(len(images))
        problem = f"the binary data has {found} elements and the shape is {list(shape)}"
        raise RequestError(HTTPStatus.BAD_REQUEST, problem, f"send {count} image files")
    return images


def images_from_strings(data: Sequence[Any], shape: Sequence[int]) -> EncodedImages:
    """Return the elements of a BYTES tensor from the base64 strings of a JSON array, flat or nested like the shape.

    Raises:
        RequestError: a string is not base64, or their number does not match the shape (400).
    """
    strings = _flatten(data, shape) if data and isinstance(data[0], list) else data
    if len(strings) != math.prod(shape):
        problem = f"the data has {len(strings)} strings and the shape is {list(shape)}"
        raise RequestError(HTTPStatus.BAD_REQUEST, problem, f"send {math.prod(shape)} images in base64")
    return [decode_base64(text, f"element {index}") for index, text in enumerate(strings)]


def _flatten(nested: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """Return the numbers of nested lists. The length of the outermost list is not checked."""
    rows = list(nested)
    for depth, length in enumerate(shape[1:], start=1):
        lengths = set(map(len, rows))
        if lengths != {length}:
            found = ", ".join(map(str, sorted(lengths)[:5]))
            raise _wrong_shape(f"lists of {found} elements at depth {depth}", shape)
        rows = list(chain.from_iterable(rows))
    return rows


def _wrong_shape(found: str, shape: Sequence[int]) -> RequestError:
    return RequestError(
        HTTPStatus.BAD_REQUEST,
        f"the data has {found} and the shape is {list(shape)}",
        f"send {math.prod(shape)} numbers, flat or nested like the shape",
    )


def _not_finite(problem: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, problem, "send numbers that are finite in float32")
