import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cifarx.output.contact_sheet import COLUMNS, LIMIT, SIDE, SUFFIXES, ContactSheet, thumbnail
from cifarx_serve.errors import ImageError, OutputError, UsageError
from cifarx_serve.images.reader import ImageSource
from cifarx_serve.predictor import Candidate, Prediction

FACTS = "m.onnx (tiny, trained on builtin, 99.00% there) by onnxruntime on CPUExecutionProvider"
GAP = 20
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)
SCORE, REASON = (0x25, 0x63, 0xEB), (0xB4, 0x23, 0x18)
BROKEN = ImageError("torn.png is truncated or damaged (broken data stream)", "save or copy the image again")


def found(label: str = "red", score: float = 0.5) -> Prediction:
    return Prediction(label, 0, score, (Candidate(label, 0, score),))


def plain(colour: str, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def drawn(*images: tuple[str, ImageSource, Prediction | ImageError]) -> Image.Image:
    sheet = ContactSheet(Path("sheet.png"))
    for image in images:
        sheet.add(*image)
    return sheet.draw("tiny", FACTS)


def where(page: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The left, upper, right and lower edge of what has exactly that colour."""
    down, across = np.nonzero((np.asarray(page) == colour).all(axis=2))
    assert down.size, f"no pixel is {colour}"
    return int(across.min()), int(down.min()), int(across.max()) + 1, int(down.max()) + 1


def below(page: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """What stands below a picture of one colour: its caption."""
    left, _, right, lower = where(page, colour)
    return page.crop((left, lower, right, lower + 60))


def ink(image: Image.Image) -> int:
    """Pixels that are not of the paper."""
    return int((np.asarray(image) != 255).any(axis=2).sum())


@pytest.mark.parametrize(("count", "columns", "rows"), [(2, 2, 1), (4, 2, 2), (12, 4, 3), (50, 8, 7), (64, 8, 8)])
def test_the_grid_is_near_square(count: int, columns: int, rows: int) -> None:
    page = drawn(*[(f"{number}.png", plain("red"), found()) for number in range(count)])
    red = (np.asarray(page) == RED).all(axis=2)
    starts = [np.flatnonzero(np.diff(red.any(axis=axis), prepend=False))[::2] for axis in (0, 1)]
    assert [len(start) for start in starts] == [columns, rows]
    assert columns <= COLUMNS
    left, upper, right, lower = where(page, RED)
    assert left == page.width - right  # the margins
    assert upper > left
    assert page.height - lower > left
    for start in starts:
        assert len({int(later - earlier) for earlier, later in pairwise(start)}) <= 1


def test_images_stand_in_their_order() -> None:
    page = drawn(*[(colour, plain(colour), found()) for colour in ("red", "blue", "lime")])
    red, blue, green = (where(page, colour) for colour in (RED, BLUE, GREEN))
    assert red[1] == blue[1] < green[1]
    assert red[0] == green[0] < blue[0]


def test_one_image_has_room_for_what_stands_above_it() -> None:
    page = drawn(("a.png", plain("red"), found()))
    left, upper, right, lower = where(page, RED)
    assert (right - left, lower - upper) == (SIDE, SIDE)
    assert page.width >= 2 * SIDE
    heading = page.crop((0, 0, page.width, upper))
    assert ink(heading) > ink(heading.crop((0, 0, page.width, 45))) > 0  # the title, and the facts below it


def test_no_image() -> None:
    assert drawn().height < SIDE


def test_a_heading_of_any_length_stays_on_the_page() -> None:
    sheet = ContactSheet(Path("sheet.png"))
    sheet.add("a.png", plain("red"), found())
    short = sheet.draw("tiny", FACTS)
    long = sheet.draw("name " * 100, f"{'folder/' * 100}m.onnx {FACTS} {FACTS}")
    assert long.width == short.width
    assert where(long, RED)[1] > where(short, RED)[1]
    assert ink(long.crop((long.width - 20, 0, long.width, long.height))) == 0


def test_small_pictures_are_enlarged_so_that_their_pixels_show() -> None:
    pixels = noise(32, 30, 3)
    enlarged = pixels.repeat(5, 0).repeat(5, 1)
    assert np.array_equal(thumbnail(pixels), enlarged)
    page = drawn(("red.png", plain("red"), found()), ("noise.png", pixels, found()))
    _, upper, right, _ = where(page, RED)
    across = right + GAP + (SIDE - 150) // 2  # in the middle of its square
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
def test_a_picture_of_any_size_fits(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert thumbnail(plain("red", size)).size == expected
    left, upper, right, lower = where(drawn(("a.png", plain("red", size), found())), RED)
    assert (right - left, lower - upper) == expected


def test_a_large_picture_keeps_its_colours_and_its_proportions(tmp_path: Path) -> None:
    picture = plain("red", (1500, 1000))
    picture.paste(plain("blue", (750, 1000)), (750, 0))
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.png")
    for source in (tmp_path / "a.jpg", str(tmp_path / "a.png"), (tmp_path / "a.jpg").read_bytes(), picture):
        shown = thumbnail(source)
        assert shown.size == (160, 107)
        assert np.abs(np.subtract(shown.getpixel((40, 50)), RED)).max() < 8  # type: ignore[arg-type]
        assert np.abs(np.subtract(shown.getpixel((120, 50)), BLUE)).max() < 8  # type: ignore[arg-type]


def test_a_photograph_is_not_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain("red", (4000, 3000)).save(tmp_path / "a.jpg")
    sizes = []
    original = Image.Image.resize

    def resize(image: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
        sizes.append(image.size)
        return original(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    assert thumbnail(tmp_path / "a.jpg").size == (160, 120)
    assert sizes[0] == (500, 375)


def test_a_photograph_stands_as_the_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain("red", (800, 400)).save(tmp_path / "a.jpg", exif=exif)
    assert thumbnail(tmp_path / "a.jpg").size == (80, 160)


def test_what_is_no_image_has_no_thumbnail(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    for source in (tmp_path / "text.jpg", tmp_path / "absent.jpg", tmp_path, b"\xff\xd8\xff torn", "\0"):
        with pytest.raises(ImageError):
            thumbnail(source)


def test_a_picture_that_was_given_is_not_changed() -> None:
    for picture in (plain("red"), plain("red", (300, 200))):
        before = picture.copy()
        thumbnail(picture).paste((0, 0, 0), (0, 0, 20, 20))
        assert picture == before


def bar(page: Image.Image) -> int:
    """How long the bars of the score are, in pixels."""
    accent = (np.asarray(page) == SCORE).all(axis=2)
    return int(accent.any(axis=0).sum())


@pytest.mark.parametrize(
    ("score", "length"), [(1.0, SIDE), (0.5, SIDE // 2), (0.25, SIDE // 4), (1e-4, 1), (0.0, 0), (float("nan"), 0)]
)
def test_the_bar_is_as_long_as_the_score(score: float, length: int) -> None:
    assert bar(drawn(("a.png", plain("red"), found(score=score)))) == length


def test_the_label_and_the_score_are_told() -> None:
    shown = {
        below(drawn(("a.png", plain("red"), found(label, score))), RED).tobytes()
        for label, score in [("cat", 0.501), ("dog", 0.501), ("cat", 0.503), ("cat", 0.50101)]
    }
    assert len(shown) == 3  # in tenths of a per cent the first and the last are one


def test_a_broken_image_is_a_cross_and_a_reason() -> None:
    page = drawn(("whole.png", plain("red"), found()), ("torn.png", "torn.png", BROKEN))
    _, upper, right, lower = where(page, RED)
    pixels = np.asarray(page)[upper:lower, right + GAP : right + GAP + SIDE]
    ground, cross = pixels[0, 0], pixels[80, 80]
    assert not np.array_equal(ground, cross)
    for down, across in [(159, 159), (20, 80), (80, 20), (80, 110)]:
        assert np.array_equal(pixels[down, across], ground)
    for down, across in [(70, 70), (70, 90), (90, 70), (90, 90)]:
        assert np.array_equal(pixels[down, across], cross)
    assert bar(page) == SIDE // 2  # that of the other
    assert where(page, REASON)[0] >= right + GAP


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("a.png is not an image", "not an image"),
        ("a.png is a folder", "a folder"),
        ("cannot open image a.png (No such file)", "cannot open image (No such file)"),
    ],
)
def test_a_reason_does_not_name_the_file_again(problem: str, told: str) -> None:
    pages = [drawn(("./a.png", "./a.png", ImageError(words, "check"))) for words in (problem, told, "something else")]
    assert pages[0] == pages[1] != pages[2]


def test_a_long_reason_has_two_lines() -> None:
    page = drawn(("a.png", "a.png", ImageError("a.png is " + "more than a line can hold " * 9, "check")))
    left, upper, right, lower = where(page, REASON)
    assert SIDE - 40 < right - left <= SIDE + 1
    assert 20 < lower - upper < 32


def test_an_image_that_has_gone_keeps_its_answer() -> None:
    page = drawn(("gone.png", "gone.png", found(score=0.5)))
    assert bar(page) == SIDE // 2


def test_of_more_than_can_be_drawn_the_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = ContactSheet(Path("sheet.png"))
    for _ in range(LIMIT):
        sheet.add("a.png", plain("red", (2, 2)), found())
    full = sheet.draw("tiny", FACTS)
    monkeypatch.setattr("cifarx.output.contact_sheet.read_image", None)  # nothing is read any more
    pages = []
    for count in (1, 9935):
        for _ in range(count):
            sheet.add("a.png", "never read", found())
        pages.append(sheet.draw("tiny", FACTS))
    assert pages[0].size == pages[1].size
    assert pages[0].width == full.width
    footers = [page.crop((0, full.height - 20, page.width, page.height)) for page in pages]
    assert 0 < ink(footers[0]) < ink(footers[1])  # "and 1 more", "and 9,936 more"
    assert pages[0].crop((0, 0, full.width, full.height - 20)) == full.crop((0, 0, full.width, full.height - 20))


def test_only_thumbnails_are_kept() -> None:
    """Neither the picture, large or small, nor the bytes of a file."""
    sheet = ContactSheet(Path("sheet.png"))
    for size in [(1500, 1000), (160, 160), (32, 32)]:
        picture = plain("red", size)
        known = weakref.ref(picture)
        sheet.add("a.png", picture, found())
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
def test_names_and_labels_of_any_letters(name: str) -> None:
    page = drawn((name, plain("red"), found(name)), (name, name, ImageError(f"{name} is not an image", "check")))
    left, _, right, lower = where(page, RED)
    for gap in [(0, left), (right, right + GAP), (page.width - left, page.width)]:
        # The outermost pixel aside: letters such as "t" stand out by one.
        assert ink(page.crop((gap[0] + 1, lower, gap[1] - 1, page.height))) == 0


def test_of_a_long_name_the_beginning_and_the_end_are_shown() -> None:
    long = "x" * 100
    names = [f"holiday{long}1.png", f"holiday{long}2.png", f"weekday{long}1.png", f"holiday{long}{long}1.png"]
    shown = [drawn((name, plain("red"), found())).tobytes() for name in names]
    assert len(set(shown)) == 3
    assert shown[0] == shown[3]


@pytest.mark.parametrize(("name", "shown"), [("Zoé.png", "Zoe.png"), ("ｃａｔ", "cat"), ("a\nb\u202fc\t", "a b c ")])  # noqa: RUF001
def test_a_letter_that_has_a_plain_form_is_no_box(name: str, shown: str) -> None:
    pages = [drawn((text, plain("red"), found(text))) for text in (name, shown)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".PNG"])
def test_is_written_whole(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / "new" / f"sheet{suffix}"
    sheet = ContactSheet(target)
    sheet.add("a.png", plain("red"), found())
    sheet.write("tiny", FACTS)
    assert list(target.parent.iterdir()) == [target]
    with Image.open(target) as written:
        assert written.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix.lower(), "JPEG")
        drawing = np.asarray(sheet.draw("tiny", FACTS)).astype(int)
        assert np.abs(np.asarray(written.convert("RGB")) - drawing).mean() < 2


@pytest.mark.parametrize("name", ["sheet.gif", "sheet", "png", ".png", "sheet.png.txt"])
def test_a_name_that_is_no_pictures(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        ContactSheet(tmp_path / "new" / name)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for target in (tmp_path / "file" / "sheet.png", tmp_path / "folder.png"):
        with pytest.raises(OutputError, match="cannot write"):
            ContactSheet(target)


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    sheet = ContactSheet(tmp_path / "sheet.png")
    sheet.add("a.png", plain("red"), found())
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        sheet.write("tiny", FACTS)
    assert not list(tmp_path.iterdir())


def test_needs_no_font_of_the_system(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
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
