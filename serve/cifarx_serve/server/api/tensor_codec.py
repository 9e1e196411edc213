"""The numbers of a tensor as the Open Inference Protocol carries them: in JSON, flat or nested, or as raw bytes."""

import math
import struct
from collections.abc import Sequence
from http import HTTPStatus
from itertools import chain
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.server.errors import RequestError

Tensor: TypeAlias = NDArray[np.float32] | NDArray[np.uint8]

DTYPES: Final[dict[str, np.dtype[Any]]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
"""NumPy's, of the protocol's data types: binary tensor data is little-endian."""


def from_binary(raw: memoryview, datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor from raw bytes, row-major, without padding: a view of them where they are aligned, else a copy.

    Raises:
        RequestError: there are more or fewer bytes than the shape takes, or a number that is not finite.
    """
    dtype = DTYPES[datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise RequestError(
            HTTPStatus.BAD_REQUEST,
            f"{len(raw)} bytes of binary data",
            f"{datatype} {list(shape)} takes {expected} bytes",
        )
    # The length of the JSON before it decides where a tensor begins: it may be at an odd address.
    tensor: Tensor = np.require(np.frombuffer(raw, dtype), requirements="A").reshape(shape)
    if dtype.kind == "f" and not (finite := np.isfinite(tensor)).all():
        place = int(finite.argmin())
        raise _not_finite(f"number {place} of the binary data is {tensor.flat[place]}")
    return tensor


def from_numbers(data: Sequence[Any], datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor from the numbers of a JSON array, read-only.

    Args:
        data: numbers in row-major order, or nested in lists as the shape has it; of bytes, none is out of range.

    Raises:
        RequestError: they do not have the shape, or one is too large for a float32.
    """
    numbers = _flat(data, shape) if data and isinstance(data[0], list) else data
    if len(numbers) != math.prod(shape):
        raise _wrong_shape(f"{len(numbers)} numbers", shape)
    if datatype == "UINT8":
        return np.frombuffer(bytes(numbers), np.uint8).reshape(shape)
    try:
        packed = struct.pack(f"<{len(numbers)}f", *numbers)  # three times as fast as NumPy takes a list
    except OverflowError as error:
        raise _not_finite(f"the data has {max(numbers, key=abs)}, which no float32 holds") from error
    return np.frombuffer(packed, DTYPES["FP32"]).reshape(shape)


def _flat(nested: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """The numbers of nested lists; the outermost may be of any length."""
    rows = list(nested)
    for depth, length in enumerate(shape[1:], start=1):
        lengths = set(map(len, rows))
        if lengths != {length}:
            raise _wrong_shape(f"lists of {', '.join(map(str, sorted(lengths)[:5]))} elements at depth {depth}", shape)
        rows = list(chain.from_iterable(rows))
    return rows


def _wrong_shape(found: str, shape: Sequence[int]) -> RequestError:
    return RequestError(
        HTTPStatus.BAD_REQUEST,
        f"the data has {found}",
        f"its shape is {list(shape)}, so give {math.prod(shape)} numbers, flat or nested as the shape has it",
    )


def _not_finite(problem: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, problem, "give numbers that are finite as float32")
