"""Holds out images of each class as the test split of a dataset that has no splits."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from cifarx_train.data.catalog import Entry

_LARGEST: Final = 1 << 64
_MAX_DEVIATION: Final = 0.1
"""The part by which the number of test images of a class can differ from the requested one, beside rounding."""


def hold_out(entries: Iterable[Entry], fraction: float) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Split images into training and test images of every class, each in the given order.

    A hash of its class and name decides about an image, so that it stays where it is when others are added or removed.
    So the number of test images varies by chance. Where it would differ from the requested number by more than a tenth,
    as it often does in small classes, the images whose hashes are closest to the limit change sides.

    Args:
        entries: the images, at least two of each class.
        fraction: the part of the images of a class that become test images, between 0 and 1.

    Returns:
        The training images and the test images. Every class has at least one of each.
    """
    entries = list(entries)
    classes: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        classes[entry.class_name].append(entry)
    held_out = {entry for images in classes.values() for entry in _hold_out_class(images, fraction)}
    train = tuple(entry for entry in entries if entry not in held_out)
    return train, tuple(entry for entry in entries if entry in held_out)


def _hold_out_class(images: list[Entry], fraction: float) -> list[Entry]:
    expected = fraction * len(images)
    deviation = max(0.5, _MAX_DEVIATION * expected)
    low = max(1, math.ceil(expected - deviation))
    high = min(len(images) - 1, max(low, math.floor(expected + deviation)))
    count = sum(_position(image) < fraction for image in images)
    return sorted(images, key=_position)[: min(max(count, low), high)]


def _position(entry: Entry) -> float:
    """Return a number from 0 to 1 that depends on nothing but the class and the name."""
    digest = hashlib.sha256(f"{entry.class_name}/{entry.name}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / _LARGEST
