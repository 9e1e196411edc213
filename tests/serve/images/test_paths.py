from pathlib import Path

import pytest

from cifarx_serve.errors import FallbackWarning, UsageError
from cifarx_serve.images.paths import find_images


@pytest.fixture(autouse=True)
def _tree(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.PNG", "a/x.jpeg", "a/deep/y.webp", "a/notes.txt", "a/.hidden.png", ".cache/z.png"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_expands_to_its_images_sorted_by_name() -> None:
    with pytest.warns(FallbackWarning, match=r"^tree: left out 1 file: 1 \.txt$"):
        images = list(find_images(["tree"]))
    assert images == ["tree/a/x.jpeg", "tree/a/deep/y.webp", "tree/b/10.PNG", "tree/b/2.png"]


def test_no_warning_without_other_files() -> None:
    assert list(find_images(["tree/b"])) == ["tree/b/10.PNG", "tree/b/2.png"]


def test_names_keep_their_order() -> None:
    names = ["tree/a/notes.txt", "absent.png", "tree/b", "tree/a/x.jpeg", "-"]
    assert list(find_images(names)) == [*names[:2], "tree/b/10.PNG", "tree/b/2.png", *names[3:]]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("tree/b/*", ["tree/b/10.PNG", "tree/b/2.png"]),
        ("tree/**/*.*p*g", ["tree/a/x.jpeg", "tree/b/2.png"]),
        ("tree/[ab]/*.jpeg", ["tree/a/x.jpeg"]),
    ],
)
def test_a_pattern_expands_to_the_files_that_match(pattern: str, expected: list[str]) -> None:
    assert list(find_images([pattern])) == expected
    assert list(find_images([str(Path.cwd() / pattern)])) == [str(Path.cwd() / name) for name in expected]


def test_an_existing_file_is_not_a_pattern() -> None:
    for name in ("tree/b/[2].png", "tree/b/2?.png"):
        Path(name).touch()
        assert list(find_images([name])) == [name]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["tree/*.gif"], "no file matches"),
        (["empty"], r"no images in empty \(left out 1 file: 1 \.md\): supported suffixes are \.apng"),
        (["-", "tree/b", "-"], "named twice"),
    ],
)
def test_names_without_images_are_usage_errors(names: list[str], words: str) -> None:
    Path("empty").mkdir()
    Path("empty/readme.md").touch()
    with pytest.raises(UsageError, match=words):
        list(find_images(names))
