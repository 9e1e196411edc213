"""Test that a document is found after the end of a file, also before a checksum, and nowhere else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.files.checksum import ChecksumState, read_checksum, write_checksum
from cifarx_serve.files.trailing_document import MARKER, append_document, read_document


@given(content=st.binary(max_size=100), document=st.binary(max_size=100), has_checksum=st.booleans())
def test_a_document_is_returned_as_it_was_appended(content: bytes, document: bytes, has_checksum: bool) -> None:
    path = Path("a.pte")
    path.write_bytes(content)
    append_document(path, document)
    if has_checksum:
        write_checksum(path)
        assert read_checksum(path).state is ChecksumState.INTACT
    assert path.read_bytes().startswith(content + document)
    assert read_document(path) == document


@given(content=st.binary(max_size=100))
def test_another_file_has_no_document(content: bytes) -> None:
    Path("a.pte").write_bytes(content)
    assert read_document(Path("a.pte")) is None


@pytest.mark.parametrize("length", [5, 1 << 25, (1 << 64) - 1])
def test_a_document_cannot_be_longer_than_the_file(length: int) -> None:
    Path("a.pte").write_bytes(b"four" + length.to_bytes(8, "little") + MARKER)
    assert read_document(Path("a.pte")) is None
