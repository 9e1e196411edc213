"""Follows hard and symbolic links between the files of an archive."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Final

from cifarx_train.data.inventory import Inventory

_MAX_HOPS: Final = 40  # as many as Linux follows
_NOT_THERE: Final = "behind links to files that are not in it"


def normalize(path: str) -> str | None:
    """Return a path in an archive without `.` and `..`, "" for the top of the archive; None if it leads out of it.

    Leading slashes are removed, as programs that extract archives do.
    """
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def symlink_target(link: str, target: str) -> str | None:
    """Return the path in the archive that a symbolic link leads to, or None if it leads out of it."""
    if target.startswith("/"):
        return None
    folder, _, _ = link.rpartition("/")
    return normalize(f"{folder}/{target}")


def linked_files(files: set[str], links: Mapping[str, str | None], inventory: Inventory) -> Iterator[tuple[str, str]]:
    """Yield the path of each file that exists through links, and the path of the file that it is.

    Args:
        files: the paths of all files of the archive.
        links: the target of each link, None if it leads out of the archive.
        inventory: counts the links that are left out.
    """
    aliases: dict[str, str] = {}
    folders: list[tuple[str, str]] = []
    for link in links:
        target = _follow(link, links)
        if target is None:
            inventory.leave_out(_NOT_THERE, link)
        elif target in files:
            aliases[link] = target
        else:
            folders.append((link, target))
    yield from aliases.items()
    names = sorted({*files, *aliases})
    for link, target in folders:
        prefix = f"{target}/" if target else ""
        if link.startswith(prefix):
            inventory.leave_out("behind links to a folder that contains them", link)
            continue
        first = bisect_left(names, prefix)
        inside = list(_while_prefix(names, first, prefix))
        if not inside:
            inventory.leave_out(_NOT_THERE, link)
        for name in inside:
            yield link + name[len(prefix) - 1 :], aliases.get(name, name)


def _while_prefix(names: list[str], first: int, prefix: str) -> Iterator[str]:
    for position in range(first, len(names)):
        if not names[position].startswith(prefix):
            return
        yield names[position]


def _follow(path: str, links: Mapping[str, str | None]) -> str | None:
    """Return the path without links, or None if it leads out of the archive or in a circle."""
    for _ in range(_MAX_HOPS):
        parts = path.split("/")
        prefixes = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        link = next((prefix for prefix in prefixes if prefix in links), None)
        if link is None:
            return path
        target = links[link]
        if target is None:
            return None
        path = (target + path[len(link) :]).lstrip("/")
    return None
