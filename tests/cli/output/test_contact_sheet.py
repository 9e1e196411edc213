import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageChops

from cifarx.output.contact_sheet import MAX_COLUMNS, MAX_IMAGES, SUFFIXES, THUMBNAIL_SIZE, ContactSheet, make_thumbnail
from cifarx_serve.errors import ImageError, OutputError, UsageError
from cifarx_serve.images.reader import ImageSource
from cifarx_serve.predictor import Candidate, Prediction

FACTS = "m.onnx (tiny, trained on drawings, test accuracy 99.00%) with onnxruntime on CPUExecutionProvider"
GAP = 20
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)
SCORE, REASON = (0x25, 0x63, 0xEB), (0xB4, 0x23, 0x18)
UNREADABLE = ImageError("torn.png is truncated or damaged (broken data stream)", "save or copy the image again")


def predicted(label: str = "red", score: float = 0.5) -> Prediction:
    return Prediction(label, 0, score, (Candidate(label, 0, score),))


def plain(color: str, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, color)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def drawn(*images: tuple[str, ImageSource, Prediction | ImageError]) -> Image.Image:
    sheet = ContactSheet(Path("sheet.png"))
    for image in images:
        sheet.add(*image)
    return sheet.draw("tiny", FACTS)


def where(page: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return the left, upper, right and lower edge of the pixels with exactly that color."""
    down, across = np.nonzero((np.asarray(page) == color).all(axis=2))
    assert down.size, f"no pixel is {color}"
    return int(across.min()), int(down.min()), int(across.max()) + 1, int(down.max()) + 1


def below(page: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return the caption below an image of one color."""
    left, _, right, lower = where(page, color)
    return page.crop((left, lower, right, lower + 60))


def ink(image: Image.Image) -> int:
    """Return the number of pixels that are not white."""
    return int((np.asarray(image) != 255).any(axis=2).sum())


@pytest.mark.parametrize(("count", "columns", "rows"), [(2, 2, 1), (4, 2, 2), (12, 4, 3), (50, 8, 7), (64, 8, 8)])
def test_the_grid_is_nearly_square(count: int, columns: int, rows: int) -> None:
    page = drawn(*[(f"{number}.png", plain("red"), predicted()) for number in range(count)])
    red = (np.asarray(page) == RED).all(axis=2)
    starts = [np.flatnonzero(np.diff(red.any(axis=axis), prepend=False))[::2] for axis in (0, 1)]
    assert [len(start) for start in starts] == [columns, rows]
    assert columns <= MAX_COLUMNS
    left, upper, right, lower = where(page, RED)
    assert left == page.width - right  # the margins
    assert upper > left
    assert page.height - lower > left
    for start in starts:
        assert len({int(later - earlier) for earlier, later in pairwise(start)}) <= 1


def test_images_keep_their_order() -> None:
    page = drawn(*[(color, plain(color), predicted()) for color in ("red", "blue", "lime")])
    red, blue, green = (where(page, color) for color in (RED, BLUE, GREEN))
    assert red[1] == blue[1] < green[1]
    assert red[0] == green[0] < blue[0]


def test_a_sheet_of_one_image_is_wide_enough_for_the_heading() -> None:
    page = drawn(("a.png", plain("red"), predicted()))
    left, upper, right, lower = where(page, RED)
    assert (right - left, lower - upper) == (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    assert page.width >= 2 * THUMBNAIL_SIZE
    heading = page.crop((0, 0, page.width, upper))
    assert ink(heading) > ink(heading.crop((0, 0, page.width, 45))) > 0  # the title and the facts


def test_a_sheet_without_images() -> None:
    assert drawn().height < THUMBNAIL_SIZE


def test_a_long_heading_stays_within_the_margins() -> None:
    sheet = ContactSheet(Path("sheet.png"))
    sheet.add("a.png", plain("red"), predicted())
    short = sheet.draw("tiny", FACTS)
    long = sheet.draw("name " * 100, f"{'folder/' * 100}m.onnx {FACTS} {FACTS}")
    assert long.width == short.width
    assert where(long, RED)[1] > where(short, RED)[1]
    assert ink(long.crop((long.width - 20, 0, long.width, long.height))) == 0


def test_small_images_are_enlarged_by_an_integer_factor() -> None:
    pixels = noise(32, 30, 3)
    enlarged = pixels.repeat(5, 0).repeat(5, 1)
    assert np.array_equal(np.asarray(make_thumbnail(pixels)), enlarged)
    page = drawn(("red.png", plain("red"), predicted()), ("noise.png", pixels, predicted()))
    _, upper, right, _ = where(page, RED)
    across = right + GAP + (THUMBNAIL_SIZE - 150) // 2  # centered in its square
    assert np.array_equal(np.asarray(page)[upper : upper + 160, across : across + 150], enlarged)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (160, 160)),
        ((3, 2), (159, 106)),
        ((80, 10), (160, 20)),
        ((81, 10), (81, 10)),
        ((160, 160), (160, 160)),
        ((161, 80), (160, 80)),
        ((400, 300), (160, 120)),
        ((1, 2000), (1, 160)),
        ((2000, 1), (160, 1)),
        ((2000, 3000), (107, 160)),
    ],
)
def test_images_of_any_size_fit(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert make_thumbnail(plain("red", size)).size == expected
    left, upper, right, lower = where(drawn(("a.png", plain("red", size), predicted())), RED)
    assert (right - left, lower - upper) == expected


def test_a_large_image_keeps_its_colors_and_aspect_ratio(tmp_path: Path) -> None:
    picture = plain("red", (1500, 1000))
    picture.paste(plain("blue", (750, 1000)), (750, 0))
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.png")
    for source in (tmp_path / "a.jpg", str(tmp_path / "a.png"), (tmp_path / "a.jpg").read_bytes(), picture):
        shown = make_thumbnail(source)
        assert shown.size == (160, 107)
        assert np.abs(np.subtract(shown.getpixel((40, 50)), RED)).max() < 8  # type: ignore[arg-type]
        assert np.abs(np.subtract(shown.getpixel((120, 50)), BLUE)).max() < 8  # type: ignore[arg-type]


def test_a_large_jpeg_is_decoded_at_reduced_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain("red", (4000, 3000)).save(tmp_path / "a.jpg")
    sizes = []
    original = Image.Image.resize

    def resize(image: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
        sizes.append(image.size)
        return original(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    assert make_thumbnail(tmp_path / "a.jpg").size == (160, 120)
    assert sizes[0] == (500, 375)


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain("red", (800, 400)).save(tmp_path / "a.jpg", exif=exif)
    assert make_thumbnail(tmp_path / "a.jpg").size == (80, 160)


def test_an_unreadable_image_has_no_thumbnail(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    for source in (tmp_path / "text.jpg", tmp_path / "absent.jpg", tmp_path, b"\xff\xd8\xff torn", "\0"):
        with pytest.raises(ImageError):
            make_thumbnail(source)


def test_the_source_image_is_not_changed() -> None:
    for picture in (plain("red"), plain("red", (300, 200))):
        before = picture.copy()
        make_thumbnail(picture).paste((0, 0, 0), (0, 0, 20, 20))
        assert picture == before


def bar(page: Image.Image) -> int:
    """Return the length of the score bars in pixels."""
    accent = (np.asarray(page) == SCORE).all(axis=2)
    return int(accent.any(axis=0).sum())


@pytest.mark.parametrize(
    ("score", "length"),
    [
        (1.0, THUMBNAIL_SIZE),
        (0.5, THUMBNAIL_SIZE // 2),
        (0.25, THUMBNAIL_SIZE // 4),
        (1e-4, 1),
        (0.0, 0),
        (float("nan"), 0),
    ],
)
def test_the_bar_is_proportional_to_the_score(score: float, length: int) -> None:
    assert bar(drawn(("a.png", plain("red"), predicted(score=score)))) == length


def test_shows_the_label_and_the_score() -> None:
    shown = {
        below(drawn(("a.png", plain("red"), predicted(label, score))), RED).tobytes()
        for label, score in [("cat", 0.501), ("dog", 0.501), ("cat", 0.503), ("cat", 0.50101)]
    }
    assert len(shown) == 3  # the first and the last score are equal to a tenth of a percent


def test_an_unreadable_image_is_a_cross_with_the_reason() -> None:
    page = drawn(("whole.png", plain("red"), predicted()), ("torn.png", "torn.png", UNREADABLE))
    _, upper, right, lower = where(page, RED)
    pixels = np.asarray(page)[upper:lower, right + GAP : right + GAP + THUMBNAIL_SIZE]
    ground, cross = pixels[0, 0], pixels[80, 80]
    assert not np.array_equal(ground, cross)
    for down, across in [(159, 159), (20, 80), (80, 20), (80, 110)]:
        assert np.array_equal(pixels[down, across], ground)
    for down, across in [(70, 70), (70, 90), (90, 70), (90, 90)]:
        assert np.array_equal(pixels[down, across], cross)
    assert bar(page) == THUMBNAIL_SIZE // 2  # the bar of the other image
    assert where(page, REASON)[0] >= right + GAP


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        ("a.png is not an image", "not an image"),
        ("a.png is a folder", "a folder"),
        ("cannot open image a.png (No such file)", "cannot open image (No such file)"),
    ],
)
def test_the_reason_omits_the_name_of_the_file(problem: str, shown: str) -> None:
    pages = [drawn(("./a.png", "./a.png", ImageError(words, "check"))) for words in (problem, shown, "something else")]
    assert pages[0] == pages[1] != pages[2]


def test_a_long_reason_is_cut_to_two_lines() -> None:
    page = drawn(("a.png", "a.png", ImageError("a.png is " + "more than a line can hold " * 9, "check")))
    left, upper, right, lower = where(page, REASON)
    assert THUMBNAIL_SIZE - 40 < right - left <= THUMBNAIL_SIZE + 1
    assert 20 < lower - upper < 32


def test_a_deleted_image_keeps_its_prediction() -> None:
    page = drawn(("gone.png", "gone.png", predicted(score=0.5)))
    assert bar(page) == THUMBNAIL_SIZE // 2


def test_counts_the_images_that_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = ContactSheet(Path("sheet.png"))
    for _ in range(MAX_IMAGES):
        sheet.add("a.png", plain("red", (2, 2)), predicted())
    full = sheet.draw("tiny", FACTS)
    monkeypatch.setattr("cifarx.output.contact_sheet.read_image", None)  # would fail if another image were read
    pages = []
    for count in (1, 9935):
        for _ in range(count):
            sheet.add("a.png", "never read", predicted())
        pages.append(sheet.draw("tiny", FACTS))
    assert pages[0].size == pages[1].size
    assert pages[0].width == full.width
    footers = [page.crop((0, full.height - 20, page.width, page.height)) for page in pages]
    assert 0 < ink(footers[0]) < ink(footers[1])  # "and 1 more", "and 9,936 more"
    assert pages[0].crop((0, 0, full.width, full.height - 20)) == full.crop((0, 0, full.width, full.height - 20))


def test_keeps_only_thumbnails() -> None:
    sheet = ContactSheet(Path("sheet.png"))
    for size in [(1500, 1000), (160, 160), (32, 32)]:
        picture = plain("red", size)
        known = weakref.ref(picture)
        sheet.add("a.png", picture, predicted())
        del picture
        assert known() is None
    assert where(sheet.draw("tiny", FACTS), RED)


@pytest.mark.parametrize(
    "name",
    [
        "a" * 250 + ".png",
        "W" * 250,
        "Müller's Zoë.png",
        "猫の写真.png",
        "صورة القط.png",
        "😀🏳️‍🌈.png",
        "two\nlines\r\tand\0.png",
        "not \udcff utf-8.png",
        "",
        "..",
    ],
    ids=ascii,
)
def test_names_and_labels_can_have_any_characters(name: str) -> None:
    page = drawn((name, plain("red"), predicted(name)), (name, name, ImageError(f"{name} is not an image", "check")))
    left, _, right, lower = where(page, RED)
    for gap in [(0, left), (right, right + GAP), (page.width - left, page.width)]:
        # Without the outermost pixel: letters such as "t" overlap by one.
        assert ink(page.crop((gap[0] + 1, lower, gap[1] - 1, page.height))) == 0


def test_a_long_name_keeps_its_beginning_and_end() -> None:
    long = "x" * 100
    names = [f"holiday{long}1.png", f"holiday{long}2.png", f"weekday{long}1.png", f"holiday{long}{long}1.png"]
    shown = [drawn((name, plain("red"), predicted())).tobytes() for name in names]
    assert len(set(shown)) == 3
    assert shown[0] == shown[3]


@pytest.mark.parametrize(("name", "shown"), [("Zoé.png", "Zoe.png"), ("ｃａｔ", "cat"), ("a\nb\u202fc\t", "a b c ")])  # noqa: RUF001
def test_accented_letters_are_shown_without_accent(name: str, shown: str) -> None:
    pages = [drawn((text, plain("red"), predicted(text))) for text in (name, shown)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".PNG"])
def test_writes_every_format(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / "new" / f"sheet{suffix}"
    sheet = ContactSheet(target)
    sheet.add("a.png", plain("red"), predicted())
    sheet.write("tiny", FACTS)
    assert list(target.parent.iterdir()) == [target]
    with Image.open(target) as written:
        assert written.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix.lower(), "JPEG")
        drawing = np.asarray(sheet.draw("tiny", FACTS)).astype(int)
        assert np.abs(np.asarray(written.convert("RGB")) - drawing).mean() < 2


@pytest.mark.parametrize("name", ["sheet.gif", "sheet", "png", ".png", "sheet.png.txt"])
def test_an_unknown_format_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UsageError, match=r"cannot write a contact sheet as .*: give a name that ends in \.png, \.jpg, \.jpeg, \.webp"
    ):
        ContactSheet(tmp_path / "new" / name)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_path_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for target in (tmp_path / "file" / "sheet.png", tmp_path / "folder.png"):
        with pytest.raises(OutputError, match="cannot write"):
            ContactSheet(target)


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    sheet = ContactSheet(tmp_path / "sheet.png")
    sheet.add("a.png", plain("red"), predicted())
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        sheet.write("tiny", FACTS)
    assert not list(tmp_path.iterdir())


def test_needs_no_installed_font(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys, builtins; from pathlib import Path; from PIL import ImageFont\n"
        "from cifarx.output.contact_sheet import ContactSheet\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, details: event == 'open' and opened.append(str(details[0])))\n"
        "sheet = ContactSheet(Path(sys.argv[1]))\n"
        "sheet.write('tiny', 'facts')\n"
        "fonts = [name for name in opened if name.endswith(('.ttf', '.otf', '.ttc', '.pfb', '.pcf'))]\n"
        "assert not fonts, fonts\n"
        "assert 'torch' not in sys.modules"
    )
    fresh_python(code, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as written:
        assert ink(written.convert("RGB")) > 0


def test_all_labels_that_apply_are_drawn() -> None:
    """They have the caption of one label with all names, or of `no label`."""
    first, second = Candidate("red", 0, 0.5), Candidate("blue", 1, 0.5)
    for labels, label in (((first, second), "red, blue"), ((first,), "red"), ((), "no label")):
        several = Prediction("red", 0, 0.5, (first,), labels=labels)
        assert (
            ImageChops.difference(
                drawn(("a.png", plain("red"), several)), drawn(("a.png", plain("red"), predicted(label)))
            ).getbbox()
            is None
        )


def test_grayscale_arrays_are_drawn() -> None:
    page = drawn(("a.png", np.full((8, 8, 1), 77, np.uint8), predicted()))
    assert where(page, (77, 77, 77))
