import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.errors import ModelFileError
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.files.zip_safety import read_member, read_members, require_safe_archive
from tests.support.color_model import SPEC, write_torchscript


def problem(path: Path) -> str:
    with pytest.raises(ModelFileError) as raised:
        require_safe_archive(path)
    assert raised.value.problem.startswith(str(path))
    assert "\n" not in str(raised.value)
    return raised.value.problem


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as writer:
        writer.writestr("archive/data.pkl", b"a" * 50)
        writer.writestr("archive/data/0", b"b" * 500)
    return path


def test_archives_of_pytorch_are_safe(tmp_path: Path) -> None:
    path = write_torchscript(tmp_path / "x.torchscript.pt")
    require_safe_archive(path)
    write_checksum(path)
    require_safe_archive(path)
    assert read_member(path, f"/extra/{SPEC_FILE}") == SPEC.to_json().encode()
    assert read_member(path, "/absent") is None
    assert read_members(path, ".py")


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up", "C:\\x", "a\\b", "nul\0.txt"])
def test_unsafe_paths(archive: Path, name: str) -> None:
    harmless = "x" * len(name)
    with zipfile.ZipFile(archive, "a") as writer:
        writer.writestr(harmless, b"")
    archive.write_bytes(archive.read_bytes().replace(harmless.encode(), name.encode()))
    assert "has an unsafe path" in problem(archive)


def test_a_small_file_that_unpacks_to_a_large_one(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as writer,
        writer.open("archive/data/0", "w", force_zip64=True) as member,
    ):
        for _ in range(64):
            member.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    assert "unpack to 67,108,864 bytes" in problem(path)
    with pytest.raises(ModelFileError, match="too large"):
        read_member(path, "/0")


def test_many_small_members_that_unpack_to_a_large_size(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as writer:
        for number in range(20):
            writer.writestr(f"archive/data/{number}", bytes(1 << 20))
    assert "its compressed members unpack to" in problem(path)


def directory_entry(whole: bytes | bytearray, number: int) -> int:
    place = -1
    for _ in range(number + 1):
        place = whole.index(b"PK\x01\x02", place + 1)
    return place


@pytest.mark.parametrize(
    ("offset", "layout", "value", "words"),
    [
        (24, "<L", 0xFFFFFFF0, "stored in fewer bytes"),  # the unpacked size
        (10, "<H", 12, "compression method 12"),  # bzip2
        (8, "<H", 1, "is encrypted"),
        (42, "<L", 0, "two members overlap"),  # the offset of the header
        (42, "<L", 1 << 30, "extends beyond the end"),
    ],
)
def test_a_directory_that_contradicts_the_members(
    archive: Path, offset: int, layout: str, value: int, words: str
) -> None:
    whole = bytearray(archive.read_bytes())
    struct.pack_into(layout, whole, directory_entry(whole, 1) + offset, value)
    archive.write_bytes(whole)
    assert words in problem(archive)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_with_the_same_name(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as writer:
        writer.writestr("archive/data/0", b"c")
    assert "two members with the same name" in problem(archive)
    with pytest.raises(ModelFileError, match="has 2 members that end with /extra/x"):
        write_twice = archive.with_name("twice.zip")
        with zipfile.ZipFile(write_twice, "w") as writer:
            writer.writestr("a/extra/x", b"")
            writer.writestr("b/extra/x", b"")
        read_member(write_twice, "/extra/x")


def test_another_archive_before_or_after(archive: Path) -> None:
    whole = archive.read_bytes()
    archive.write_bytes(whole + whole)
    assert "does not start with a member" in problem(archive)
    archive.write_bytes(whole[:-2] + struct.pack("<H", len(whole)) + whole)
    problem(archive)


def test_a_member_whose_checksum_does_not_match(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes().replace(b"a" * 50, b"a" * 49 + b"b"))
    require_safe_archive(archive)
    with pytest.raises(ModelFileError, match="CRC"):
        read_member(archive, "/data.pkl")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(damage=[], cut=0)
@given(
    damage=st.lists(st.tuples(st.integers(-900, -1), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 900),
)
def test_damage_raises_only_our_own_exceptions(archive: Path, damage: list[tuple[int, int]], cut: int | None) -> None:
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("archive/data.pkl", b"a" * 50)
        writer.writestr("archive/data/0", b"b" * 500)
    whole = bytearray(archive.read_bytes())
    for place, byte in damage:
        whole[place % len(whole)] = byte
    archive.write_bytes(whole[:cut])
    try:
        require_safe_archive(archive)
        assert sum(map(len, read_members(archive, "").values())) <= len(whole)
    except ModelFileError as error:
        assert "\n" not in str(error)
