import pytest
from PIL import Image

from cifarx_serve.images.image_format import FORMATS_VARIABLE, missing_reader
from cifarx_serve.images.suffixes import SUFFIXES, LeftOutFiles, is_image, suffix_of


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "a.b.jfif", "a.tiff", "a.ppm", "a.avif", "a.HEIC", "d.x/a.png"])
def test_images_are_known_by_their_suffix(name: str) -> None:
    assert is_image(name)


@pytest.mark.parametrize("name", ["", "jpg", ".jpg", "a.jpg.txt", "a.jp2", "a.pdf", "folder.png/a"])
def test_other_files(name: str) -> None:
    assert not is_image(name)


def test_every_suffix_is_one_that_pillow_or_pillow_heif_knows() -> None:
    known = {*Image.registered_extensions(), ".heic", ".heif", ".hif"}
    assert set(SUFFIXES) <= known
    assert [suffix_of(f"x{suffix.upper()}") for suffix in SUFFIXES] == list(SUFFIXES)


def test_the_variable_adds_the_suffixes_of_its_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORMATS_VARIABLE, "JPEG2000")
    assert is_image("scan.jp2")
    assert not is_image("scan.tga")


def test_left_out_files_are_counted_by_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    missing_reader.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    left_out = LeftOutFiles()
    try:
        for name in ["a.HEIC", "b.heic", "c.heic", "scan1", "scan2", "notes.md"]:
            assert not is_image(name)
            left_out.add(name)
        assert left_out.describe() == ["3 .heic (install pillow-heif)", "2 without a suffix", "1 .md"]
    finally:
        missing_reader.cache_clear()
    assert len(left_out) == 6


def test_only_the_most_frequent_suffixes_are_named() -> None:
    left_out = LeftOutFiles()
    for number in range(9):
        for _ in range(9 - number):
            left_out.add(f"x.s{number}")
    assert left_out.describe() == ["9 .s0", "8 .s1", "7 .s2", "6 .s3", "5 .s4", "10 with other suffixes"]
