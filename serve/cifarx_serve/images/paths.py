"""Expands what a user names (files, folders, patterns, standard input) to the paths of image files."""

import glob
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from cifarx_serve.errors import FallbackWarning, UsageError
from cifarx_serve.images.suffixes import SUFFIXES, LeftOutFiles, is_image

STANDARD_INPUT: Final = "-"


def find_images(names: Iterable[str]) -> Iterator[str]:
    """Yield the paths of the images that the names stand for, in the given order.

    A folder stands for its images and those in its subfolders, sorted by name, without hidden ones; images are known by
    their suffixes, and a FallbackWarning counts the other files. A name with `*`, `?` or `[` that is not a file is a
    pattern, in which `**` matches any number of folders. Any other name is yielded unchanged, even if it does not exist
    or has no suffix; reading it reports that.

    Raises:
        UsageError: a folder has no images, a pattern matches no file, or standard input is named twice.
    """
    for position, name in enumerate(given := list(names)):
        if name == STANDARD_INPUT:
            if STANDARD_INPUT in given[:position]:
                raise UsageError("standard input was named twice", "give - once")
            yield name
        elif Path(name).is_dir():
            yield from _images_in(name)
        elif _is_pattern(name):
            # `Path.glob` does not accept absolute patterns.
            matches = sorted(glob.iglob(name, recursive=True))  # noqa: PTH207
            files = [path for path in matches if not Path(path).is_dir()]
            if not files:
                raise UsageError(f"no file matches {name}", "check the pattern, and quote it")
            yield from files
        else:
            yield name


def _is_pattern(name: str) -> bool:
    if not glob.has_magic(name) or os.path.lexists(name):
        return False
    from cifarx_serve.images.urls import is_url  # few names have the characters of a pattern

    return not is_url(name)


def _images_in(folder: str) -> Iterator[str]:
    found, left_out = False, LeftOutFiles()
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(file for file in files if not file.startswith(".")):
            if is_image(name):
                found = True
                yield str(Path(parent, name))
            else:
                left_out.add(name)
    number = "1 file" if len(left_out) == 1 else f"{len(left_out):,} files"
    counted = f"left out {number}: {', '.join(left_out.describe())}"
    if not found:
        problem = f"no images in {folder}" + (f" ({counted})" if len(left_out) else "")
        raise UsageError(problem, f"supported suffixes are {', '.join(SUFFIXES)}")
    if len(left_out):
        warnings.warn(f"{folder}: {counted}", FallbackWarning, stacklevel=3)
