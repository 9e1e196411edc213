"""What is in a dataset: the images, and all that is left out, so that messages can say both."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cifarx_serve.errors import DataError
from cifarx_serve.images.suffixes import LeftOutFiles, is_image
from cifarx_serve.system.terminal import encodable

_MAX_LISTED: Final = 5
_HIDDEN: Final = (".", "__")
"""How the names of files and folders start that programs create for themselves, such as `__MACOSX`."""


class Inventory:
    """The files of a dataset.

    Args:
        path: the folder or file that the user named.

    Attributes:
        images: the paths of the images, relative to the dataset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: list[str] = []
        self._others: list[str] = []
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._folders: set[str] = set()
        self._files: list[str] = []

    def add(self, name: str) -> None:
        """Take stock of a file by its path relative to the dataset: an image, or a file that is left out."""
        folder, slash, _ = name.partition("/")
        parts = name.split("/")
        if hidden := next((part for part in parts if part.startswith(_HIDDEN)), None):
            self.leave_out("hidden", hidden)
            return
        if slash:
            self._folders.add(folder)
        else:
            self._files.append(name)
        if is_image(parts[-1]):
            self.images.append(name)
        else:
            self._others.append(name)

    def take(self, suffixes: tuple[str, ...]) -> list[str]:
        """Return the other files whose names end with a suffix, and count them as used. They are sorted."""
        taken = sorted(name for name in self._others if name.lower().endswith(suffixes))
        self._others = [name for name in self._others if not name.lower().endswith(suffixes)]
        return taken

    def leave_out(self, reason: str, example: str, count: int = 1) -> None:
        """Count files that are not used for a reason, which follows their number in the message."""
        self._reasons[reason] += count
        self._examples.setdefault(reason, example)

    def lines(self) -> list[str]:
        """Return one line about all files that are left out, or none if there are none."""
        total = len(self._others) + self._reasons.total()
        files = "1 file" if total == 1 else f"{total:,} files"
        return [f"left out {files} of {encodable(self.path.name)}: {self._left_out()}"] if total else []

    def error(self, problem: str, remedy: str) -> DataError:
        """Return the error for a dataset that cannot be used. The message says what is there.

        Args:
            problem: continues the path of the dataset.
            remedy: what to do about it.
        """
        found = [f"{encodable(folder)}/" for folder in sorted(self._folders)[:_MAX_LISTED]]
        if more := len(self._folders) - _MAX_LISTED:
            found += [f"{more:,} more folders"] if more > 0 else []
        match self._files:
            case []:
                pass
            case [name]:
                found.append(encodable(name))
            case files:
                found.append(f"{len(files):,} files")
        left_out = f"; left out {self._left_out()}" if self._left_out() else ""
        text = f"{self.path} {problem} (found {', '.join(found) or 'nothing'}{left_out})"
        return DataError(text, remedy)

    def _left_out(self) -> str:
        others = LeftOutFiles()
        for name in self._others:
            others.add(name)
        reasons = [
            f"{count:,} {reason} ({encodable(self._examples[reason])})" for reason, count in self._reasons.items()
        ]
        return ", ".join([*others.describe(), *reasons])


def listed(names: Iterable[str]) -> str:
    """Return the first names in sorted order, and how many others there are."""
    ordered = sorted(encodable(name) for name in names)
    others = len(ordered) - _MAX_LISTED
    return ", ".join(ordered[:_MAX_LISTED]) + (f" and {others:,} more" if others > 0 else "")
