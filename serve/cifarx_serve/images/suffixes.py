"""The suffixes by which image files are found in folders, archives and tables, for training and inference alike.

The suffix only decides whether a file is opened. What it contains is recognized by its first bytes.
"""

import os
from collections import Counter
from typing import Final

from cifarx_serve.images.image_format import extra_formats, missing_reader

_FORMATS: Final = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    ".webp": "WEBP",
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".gif": "GIF",
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    ".avif": "AVIF",
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
}

SUFFIXES: Final = tuple(sorted(_FORMATS))
"""The suffixes of images, in lower case. Those of AVIF and HEIC count only where a reader is installed."""

_MAX_NAMED: Final = 5
"""The number of different suffixes that a message names."""


class LeftOutFiles:
    """Counts files that are not opened as images, by suffix."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    def add(self, name: str) -> None:
        """Count a file."""
        self._counts[suffix_of(name)] += 1

    def describe(self) -> list[str]:
        """Return the number of files of each suffix, such as "30 .heic (install pillow-heif)", the largest first."""
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        described = [_describe(suffix, count) for suffix, count in ordered[:_MAX_NAMED]]
        if others := sum(count for _, count in ordered[_MAX_NAMED:]):
            described.append(f"{others:,} with other suffixes")
        return described


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case, with its dot; "" for a name without one."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - many times faster than a Path, for millions of files


def is_image(name: str) -> bool:
    """Return whether a file with this name is opened as an image.

    Raises:
        UsageError: as for `image_format.extra_formats`.
    """
    suffix = suffix_of(name)
    image_format = _FORMATS.get(suffix)
    if image_format is None:
        return bool(suffix) and suffix in _extra_suffixes()
    return missing_reader(image_format) is None


def _describe(suffix: str, count: int) -> str:
    if not suffix:
        return f"{count:,} without a suffix"
    missing = missing_reader(_FORMATS.get(suffix, ""))
    return f"{count:,} {suffix} ({missing})" if missing else f"{count:,} {suffix}"


def _extra_suffixes() -> set[str]:
    """Return the suffixes of the formats that `CIFARX_IMAGE_FORMATS` names."""
    if not (formats := extra_formats()):
        return set()
    from PIL import Image

    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
