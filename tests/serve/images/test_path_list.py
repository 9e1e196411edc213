import io
import os
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_serve.images.path_list import read_path_list

NAMES = st.lists(st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name and b"\n" not in name))


@given(names=NAMES)
def test_null_separated_paths_are_read_as_they_are(names: list[bytes]) -> None:
    for content in (b"\0".join(names), b"".join(name + b"\0" for name in names)):
        found = list(read_path_list(io.BytesIO(content), null_separated=True))
        assert [os.fsencode(name) for name in found] == names


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a.png\nb c*.png\n", ["a.png", "b c*.png"]),
        (b"a.png\r\n\r\n\n b.png", ["a.png", " b.png"]),
        (b"\xef\xbb\xbfa.png\ncaf\xe9.png", ["a.png", "caf\udce9.png"]),
        (b"", []),
    ],
)
def test_lines_are_paths(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    assert list(read_path_list(tmp_path / "list.txt")) == expected
    assert list(read_path_list(io.BytesIO(content))) == expected


def test_a_list_is_read_as_it_is_written() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as read_end, os.fdopen(writer, "wb", buffering=0) as write_end:
        paths = read_path_list(read_end)
        for name in ("a.png", "b.png"):
            write_end.write(f"{name}\n".encode())
            assert next(paths) == name


@pytest.mark.parametrize(
    ("file", "null_separated", "problem"),
    [
        (Path("absent.txt"), False, r"cannot read the list absent.txt \(No such file or directory\): check the path"),
        (Path(), False, r"cannot read the list \. \(Is a directory\)"),
        (io.BytesIO(b"\x89PNG\0\0"), False, "standard input is not a list of paths in lines: give -0 if"),
        (io.BytesIO(b"a" * 200_000), True, "is not a list of paths: a path has at most 65,536 bytes"),
    ],
)
def test_what_is_no_list_is_a_usage_error(file: Path | IO[bytes], null_separated: bool, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        list(read_path_list(file, null_separated=null_separated))
