"""From what a user names (files, folders, patterns, standard input) to image files, in order."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from cifarx_serve.errors import UsageError

SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What is taken from a folder; a file that is named is taken whatever its name ends with."""

STANDARD_INPUT: Final = "-"


def find_images(names: Iterable[str]) -> Iterator[str]:
    """The image files behind the names, in the order given; within a folder or pattern by name.

    A folder gives what is in it and in the folders below, hidden ones left out. A name that is no file and has `*`,
    `?` or `[` is a pattern, in which `**` stands for any folders. Any other name is given as it is: whether it can
    be read shows when it is.

    Raises:
        UsageError: a folder without images, a pattern that nothing fits, or standard input twice.
    """
    for position, name in enumerate(given := list(names)):
        if name == STANDARD_INPUT:
            if STANDARD_INPUT in given[:position]:
                raise UsageError("standard input was named twice", "give - once")
            yield name
        elif Path(name).is_dir():
            yield from _some(_in_folder(name), f"no images in {name}", f"known are {', '.join(SUFFIXES)}")
        elif glob.has_magic(name) and not os.path.lexists(name):
            # Not `Path.glob`: it takes no pattern that begins at the root.
            fitting = sorted(glob.iglob(name, recursive=True))  # noqa: PTH207
            found = (path for path in fitting if not Path(path).is_dir())
            yield from _some(found, f"nothing fits {name}", "check the pattern, and quote it")
        else:
            yield name


def _in_folder(folder: str) -> Iterator[str]:
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield str(Path(place, name))


def _some(found: Iterator[str], problem: str, remedy: str) -> Iterator[str]:
    """All of them, at least one."""
    first = next(found, None)
    if first is None:
        raise UsageError(problem, remedy)
    yield first
    yield from found
