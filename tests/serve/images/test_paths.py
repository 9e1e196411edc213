from pathlib import Path

import pytest

from cifarx_serve.errors import UsageError
from cifarx_serve.images.paths import find_images


@pytest.fixture(autouse=True)
def _tree(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.PNG", "a/x.jpeg", "a/deep/y.webp", "a/notes.txt", "a/.hidden.png", ".cache/z.png"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_gives_its_images_by_name() -> None:
    assert list(find_images(["tree"])) == ["tree/a/x.jpeg", "tree/a/deep/y.webp", "tree/b/10.PNG", "tree/b/2.png"]


def test_what_is_named_is_taken_in_the_order_given() -> None:
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
def test_a_pattern_gives_the_files_that_fit(pattern: str, expected: list[str]) -> None:
    assert list(find_images([pattern])) == expected
    assert list(find_images([str(Path.cwd() / pattern)])) == [str(Path.cwd() / name) for name in expected]


def test_a_file_whose_name_looks_like_a_pattern_is_itself() -> None:
    for name in ("tree/b/[2].png", "tree/b/2?.png"):
        Path(name).touch()
        assert list(find_images([name])) == [name]


@pytest.mark.parametrize(
    ("names", "words"),
    [(["tree/*.gif"], "nothing fits"), (["empty"], "no images in empty"), (["-", "tree", "-"], "named twice")],
)
def test_what_gives_nothing_is_an_error(names: list[str], words: str) -> None:
    Path("empty").mkdir()
    Path("empty/readme.md").touch()
    with pytest.raises(UsageError, match=words):
        list(find_images(names))
