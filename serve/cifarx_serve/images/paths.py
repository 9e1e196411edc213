"""Expands what a user names (files, folders, patterns, standard input) to the paths of image files."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from cifarx_serve.errors import UsageError

SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The suffixes of the files that are taken from a folder. A file named directly can have any suffix."""

STANDARD_INPUT: Final = "-"


def find_images(names: Iterable[str]) -> Iterator[str]:
    """Yield the paths of the images that the names stand for, in the given order.

    A folder stands for its images and those in its subfolders, sorted by name, without hidden ones. A name with `*`,
    `?` or `[` that is not a file is a pattern, in which `**` matches any number of folders. Any other name is yielded
    unchanged, even if it does not exist; reading it reports that.

    Raises:
        UsageError: a folder has no images, a pattern matches no file, or standard input is named twice.
    """
    for position, name in enumerate(given := list(names)):
        if name == STANDARD_INPUT:
            if STANDARD_INPUT in given[:position]:
                raise UsageError("standard input was named twice", "give - once")
            yield name
        elif Path(name).is_dir():
            yield from _require_any(
                _walk_folder(name), f"no images in {name}", f"supported suffixes are {', '.join(SUFFIXES)}"
            )
        elif glob.has_magic(name) and not os.path.lexists(name):
            # `Path.glob` does not accept absolute patterns.
            matches = sorted(glob.iglob(name, recursive=True))  # noqa: PTH207
            files = (path for path in matches if not Path(path).is_dir())
            yield from _require_any(files, f"no file matches {name}", "check the pattern, and quote it")
        else:
            yield name


def _walk_folder(folder: str) -> Iterator[str]:
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield str(Path(parent, name))


def _require_any(paths: Iterator[str], problem: str, remedy: str) -> Iterator[str]:
    """Yield all paths; raise a `UsageError` if there are none."""
    first = next(paths, None)
    if first is None:
        raise UsageError(problem, remedy)
    yield first
    yield from paths
