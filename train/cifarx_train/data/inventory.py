"""What is in a dataset: the images, and all that is left out, so that messages can say both."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal, TypeAlias

from cifarx_serve.errors import DataError
from cifarx_serve.images.suffixes import LeftOutFiles, is_image
from cifarx_serve.system.terminal import encodable

_MAX_LISTED: Final = 5
HIDDEN: Final = (".", "__")
"""How the names of files and folders start that programs create for themselves, such as `__MACOSX`."""

_Unit: TypeAlias = Literal["files", "rows", "folders"]


class Inventory:
    """The files of a dataset.

    Args:
        path: the folder or file that the user named.

    Attributes:
        name: the name of the folder or file without its path.
        images: the paths of the images, relative to the dataset.
        others: the paths of the files that are no images.
        empty_folders: the paths of the folders that contain nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = encodable(Path(os.path.abspath(path)).name)  # noqa: PTH100 - unlike resolve(), this keeps the name of a link
        self.images: list[str] = []
        self.others: list[str] = []
        self.empty_folders: list[str] = []
        self._reasons: dict[_Unit, Counter[str]] = {"files": Counter(), "rows": Counter(), "folders": Counter()}
        self._examples: dict[str, str] = {}
        self._folders: set[str] = set()
        self._files: list[str] = []

    def add(self, name: str) -> None:
        """Take stock of a file by its path relative to the dataset: an image, or a file that is left out."""
        folder, slash, _ = name.partition("/")
        parts = name.split("/")
        if hidden := next((part for part in parts if part.startswith(HIDDEN)), None):
            self.leave_out("hidden", hidden)
            return
        if slash:
            self._folders.add(folder)
        else:
            self._files.append(name)
        (self.images if is_image(parts[-1]) else self.others).append(name)

    def take(self, suffixes: tuple[str, ...]) -> list[str]:
        """Return the other files whose names end with a suffix, sorted. They are not left out any more."""
        taken = sorted(name for name in self.others if name.lower().endswith(suffixes))
        self.others = [name for name in self.others if not name.lower().endswith(suffixes)]
        return taken

    def leave_out(self, reason: str, example: str, count: int = 1, unit: _Unit = "files") -> None:
        """Count what is not used for a reason, which follows the number in the message."""
        self._reasons[unit][reason] += count
        self._examples.setdefault(reason, example)

    def lines(self) -> list[str]:
        """Return one line about all files that are left out, one about rows of tables, and one about class folders."""
        lines = []
        for unit in self._reasons:
            if total := self._reasons[unit].total() + (len(self.others) if unit == "files" else 0):
                number = f"1 {unit[:-1]}" if total == 1 else f"{total:,} {unit}"
                described = ", ".join(self._left_out(unit))
                lines.append(f"left out {number} of {self.name}: {described}")
        return lines

    def error(self, problem: str, remedy: str) -> DataError:
        """Return the error for a dataset that cannot be used. The message says what is there.

        Args:
            problem: continues the path of the dataset.
            remedy: what to do about it.
        """
        found = [f"{encodable(folder)}/" for folder in sorted(self._folders)[:_MAX_LISTED]]
        if (more := len(self._folders) - _MAX_LISTED) > 0:
            found.append(f"{more:,} more folders")
        if len(self._files) == 1:
            found.append(encodable(self._files[0]))
        elif self._files:
            found.append(f"{len(self._files):,} files")
        left_out = [*self._left_out("files"), *(f"{text} (rows)" for text in self._left_out("rows"))]
        text = f"found {', '.join(found) or 'nothing'}" + (f"; left out {', '.join(left_out)}" if left_out else "")
        return DataError(f"{self.path} {problem} ({text})", remedy)

    def _left_out(self, unit: _Unit) -> list[str]:
        suffixes = LeftOutFiles()
        for name in self.others if unit == "files" else ():
            suffixes.add(name)
        described = suffixes.describe()
        for reason, count in self._reasons[unit].items():
            described.append(f"{count:,} {reason} ({encodable(self._examples[reason])})")
        return described


def listed(names: Iterable[str]) -> str:
    """Return the first names in sorted order, and how many others there are."""
    ordered = sorted(encodable(name) for name in names)
    others = len(ordered) - _MAX_LISTED
    return ", ".join(ordered[:_MAX_LISTED]) + (f" and {others:,} more" if others > 0 else "")
