from pathlib import Path

import pytest

from cifarx_train.data.inventory import Inventory
from cifarx_train.data.links import linked_files, normalize, symlink_target


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.png", "a/b.png"),
        ("./a//b.png", "a/b.png"),
        ("/a/b.png", "a/b.png"),
        ("a/../b.png", "b.png"),
        (".", ""),
        ("../b.png", None),
        ("a/../../b.png", None),
    ],
)
def test_paths_are_normalized(path: str, expected: str | None) -> None:
    assert normalize(path) == expected


@pytest.mark.parametrize(
    ("link", "target", "expected"),
    [
        ("a/x", "y", "a/y"),
        ("a/x", "../b/y", "b/y"),
        ("x", "b", "b"),
        ("x", "../b", None),
        ("a/x", "/etc/passwd", None),
        ("a/x", "../../etc/passwd", None),
    ],
)
def test_symbolic_links_are_relative_to_their_folder(link: str, target: str, expected: str | None) -> None:
    assert symlink_target(link, target) == expected


def found(files: set[str], links: dict[str, str | None]) -> tuple[dict[str, str], list[str]]:
    inventory = Inventory(Path("set.tar"))
    return dict(linked_files(files, links, inventory)), inventory.lines()


def test_links_to_links_and_to_folders() -> None:
    files, lines = found(
        {"all/1.png", "all/deep/2.png"},
        {
            "train": "first",
            "first": "all",
            "one.png": "two.png",
            "two.png": "train/1.png",
            "all/3.png": "all/deep/2.png",
        },
    )
    assert files == {
        "one.png": "all/1.png",
        "two.png": "all/1.png",
        "all/3.png": "all/deep/2.png",
        **{f"{link}/1.png": "all/1.png" for link in ("train", "first")},
        **{f"{link}/deep/2.png": "all/deep/2.png" for link in ("train", "first")},
        **{f"{link}/3.png": "all/deep/2.png" for link in ("train", "first")},
    }
    assert lines == []


@pytest.mark.parametrize(
    ("links", "reason"),
    [
        ({"a": "b", "b": "a"}, "2 behind links to files that are not in it (a)"),
        ({"a": "a/b"}, "1 behind links to files that are not in it (a)"),
        ({"a": "missing"}, "1 behind links to files that are not in it (a)"),
        ({"a": None}, "1 behind links to files that are not in it (a)"),
        ({"a": None, "b": "a/x.png"}, "2 behind links to files that are not in it (a)"),
        ({"all/up": "all"}, "1 behind links to a folder that contains them (all/up)"),
        ({"all/top": ""}, "1 behind links to a folder that contains them (all/top)"),
    ],
)
def test_links_that_lead_to_no_file_are_counted(links: dict[str, str | None], reason: str) -> None:
    files, lines = found({"all/1.png"}, links)
    assert files == {}
    assert lines[0].endswith(f"of set.tar: {reason}")
