import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import Dataset, Split, fingerprint
from cifarx_train.data.image_folder import open_image_files
from tests.support.drawn_images import COLOURS, draw, draw_folder, pack

SPEC = InputSpec(height=32, width=32)
SPLITS: tuple[Split, Split] = ("train", "test")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept where the user's own decoded images are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """5 training and 3 test images of three classes, to be altered."""
    return draw_folder(tmp_path / "colours", train=5, test=3)


@pytest.fixture(params=["folder", "archive"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Dataset]:
    """Opens a folder as it is, and as an archive."""

    def open_folder(folder: Path) -> Dataset:
        return open_image_files(folder)

    def open_archive(folder: Path) -> Dataset:
        return open_image_files(pack(folder, tmp_path / f"{folder.name}.tar.gz"))

    return open_folder if request.param == "folder" else open_archive


def prints(data: Dataset, spec: InputSpec = SPEC) -> list[str]:
    return [fingerprint(data.load(split, spec), data.class_names) for split in SPLITS]


def failing(data: Dataset) -> DataError:
    """The error of a data set that can be opened and not read."""
    with pytest.raises(DataError) as caught:
        prints(data)
    assert caught.value.exit_status == 2
    return caught.value


# --- what is read


def test_every_image_has_the_label_of_its_class(opened: Callable[[Path], Dataset], folder: Path) -> None:
    data = opened(folder)
    for split, count in zip(SPLITS, (5, 3), strict=True):
        read = data.load(split, SPEC)
        assert (read.images.shape, read.images.dtype) == ((3 * count, 32, 32, 3), np.uint8)
        assert read.labels.dtype == np.int64
        assert read.labels.tolist() == [0] * count + [1] * count + [2] * count
        paths = [
            folder / split / name / f"{number}.png" for name in ("blue", "green", "red") for number in range(count)
        ]
        assert np.array_equal(read.images, np.stack([np.asarray(Image.open(path)) for path in paths]))


def test_classes_are_in_the_order_of_their_names(opened: Callable[[Path], Dataset], tmp_path: Path) -> None:
    names = ["zebra", "Ant", "ant", "10", "9", "übergang", "two words"]
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for name in names:
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            Image.fromarray(draw((0, 0, 0), rng)).save(place / "0.png")
    assert opened(tmp_path / "data").class_names == ("10", "9", "Ant", "ant", "two words", "zebra", "übergang")


def test_files_are_in_the_order_of_their_names(opened: Callable[[Path], Dataset], folder: Path) -> None:
    for name in COLOURS:
        Image.new("RGB", (32, 32), (1, 2, 3)).save(folder / "train" / name / "10.png")
    images = opened(folder).load("train", SPEC).images
    # As text: 0, 1, 10, 2 …
    assert (images[2] == (1, 2, 3)).all()
    assert not (images[5] == (1, 2, 3)).all()


def test_a_folder_and_its_archives_are_the_same_data(folder: Path, tmp_path: Path) -> None:
    plain = open_image_files(folder)
    expected = prints(plain)
    for top in (".", "colours", "./colours"):
        archive = open_image_files(pack(folder, tmp_path / "colours.tar.gz", top))
        assert archive.class_names == plain.class_names
        assert prints(archive) == expected
        for split in SPLITS:
            assert np.array_equal(archive.load(split, SPEC).images, plain.load(split, SPEC).images)


def test_the_order_of_an_archives_members_does_not_count(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "backwards.tar", "w") as archive:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            archive.add(path, path.relative_to(folder))
    assert prints(open_image_files(tmp_path / "backwards.tar")) == prints(open_image_files(folder))


def test_of_a_file_twice_in_an_archive_the_later_one_counts(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        archive.add(folder, "colours")
        Image.new("RGB", (32, 32), "white").save(folder / "train" / "blue" / "0.png")
        archive.add(folder / "train" / "blue" / "0.png", "colours/train/blue/0.png")
    assert prints(open_image_files(tmp_path / "twice.tar")) == prints(open_image_files(folder))


def test_every_splits_print_is_its_own(folder: Path) -> None:
    before = prints(open_image_files(folder))
    Image.new("RGB", (32, 32), "white").save(folder / "test" / "blue" / "0.png")
    after = prints(open_image_files(folder))
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_other_files_are_ignored(opened: Callable[[Path], Dataset], folder: Path) -> None:
    expected = prints(open_image_files(folder))
    for place in (folder, folder / "train", folder / "train" / "blue", folder / "test" / "red"):
        (place / "README.md").write_text("about")
        (place / "labels.csv").write_text("0,blue")
        (place / ".DS_Store").write_bytes(b"\0")
        (place / "._0.png").write_bytes(b"\0")
        (place / "no-suffix").write_bytes(b"\0")
    (folder / "train" / "empty").mkdir()
    (folder / "train" / "blue" / "folder.png").mkdir()
    (folder / "validation" / "blue").mkdir(parents=True)
    shutil.copy(folder / "test" / "blue" / "0.png", folder / "validation" / "blue")
    shutil.copy(folder / "test" / "blue" / "0.png", folder / "train" / "0.png")
    assert prints(opened(folder)) == expected


def test_kinds_of_images_may_be_mixed(opened: Callable[[Path], Dataset], folder: Path) -> None:
    picture = Image.new("RGB", (32, 32), (250, 250, 250))
    for suffix in ("jpg", "JPEG", "bmp", "webp", "PNG"):
        picture.save(folder / "test" / "green" / f"x.{suffix}")
    picture.convert("L").save(folder / "test" / "green" / "grey.png")
    picture.convert("RGBA").save(folder / "test" / "green" / "alpha.png")
    read = opened(folder).load("test", SPEC)
    assert read.labels.tolist() == [0] * 3 + [1] * 10 + [2] * 3
    assert read.images[6:13].min() >= 245


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_other_sizes_are_resized_as_everywhere(
    opened: Callable[[Path], Dataset], tmp_path: Path, resample: str
) -> None:
    folder = draw_folder(tmp_path / "large", train=1, test=1, width=50, height=41)
    spec = InputSpec(height=24, width=20, resize=resample)
    images = opened(folder).load("test", spec).images
    assert images.shape == (3, 24, 20, 3)
    for image, name in zip(images, ("blue", "green", "red"), strict=True):
        assert np.array_equal(image, resize(Image.open(folder / "test" / name / "0.png"), spec))


def test_the_name_is_that_of_the_file_and_no_path(
    opened: Callable[[Path], Dataset], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(folder)
    assert data.kind == "folder"
    assert data.name in {"colours", "colours.tar.gz"}
    monkeypatch.chdir(folder)
    assert open_image_files(Path()).name == "colours"
    assert open_image_files(Path("train/..")).name == "colours"


def test_nothing_is_unpacked(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder, tmp_path / "colours.tar.gz")
    before = sorted(tmp_path.rglob("*"))
    prints(open_image_files(archive))
    assert sorted(tmp_path.rglob("*")) == before


# --- what is refused


def test_no_class_folders(opened: Callable[[Path], Dataset], tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "test").mkdir()
    error = failing(opened(tmp_path / "data"))
    assert "has 0 class folders with images under train/" in error.problem
    assert "train/<class>/<image> and test/<class>/<image>" in error.remedy


def test_one_class(opened: Callable[[Path], Dataset], folder: Path) -> None:
    for split in SPLITS:
        for name in ("blue", "green"):
            shutil.rmtree(folder / split / name)
    assert "has 1 class folders with images under train/" in failing(opened(folder)).problem


def test_no_test_split(opened: Callable[[Path], Dataset], folder: Path) -> None:
    shutil.rmtree(folder / "test")
    assert "has 0 class folders with images under test/" in failing(opened(folder)).problem


@pytest.mark.parametrize("split", SPLITS)
def test_classes_that_differ_between_splits(opened: Callable[[Path], Dataset], folder: Path, split: Split) -> None:
    (folder / split / "red").rename(folder / split / "crimson")
    error = failing(opened(folder))
    assert "classes in one split alone (crimson, red)" in error.problem
    assert "the same class folders" in error.remedy


def test_an_empty_class_is_one_that_is_missing(opened: Callable[[Path], Dataset], folder: Path) -> None:
    for path in (folder / "test" / "green").iterdir():
        path.unlink()
    assert "one split alone (green)" in failing(opened(folder)).problem


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "magic"])
def test_a_broken_image_is_named(opened: Callable[[Path], Dataset], folder: Path, content: bytes) -> None:
    (folder / "test" / "green" / "1.png").write_bytes(content)
    data = opened(folder)
    assert len(data.load("train", SPEC)) == 15
    error = failing(data)
    assert f"1 broken image in {data.path}: test/green/1.png (not an image" in error.problem  # type: ignore[attr-defined]
    assert error.remedy == "repair or remove them, or use --broken skip"


def test_a_truncated_image_is_named(opened: Callable[[Path], Dataset], folder: Path) -> None:
    truncate(folder / "train" / "red" / "4.png")
    assert ": train/red/4.png (truncated or damaged (" in failing(opened(folder)).problem


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_of_many_broken_images_the_first_are_named_and_all_are_counted(
    opened: Callable[[Path], Dataset], folder: Path
) -> None:
    for name in COLOURS:
        for number in (0, 2, 3):
            truncate(folder / "train" / name / f"{number}.png")
    problem = failing(opened(folder)).problem
    assert problem.startswith("9 broken images in ")
    named = ["blue/0.png", "blue/2.png", "blue/3.png", "green/0.png", "green/2.png"]
    assert [part.split(" (")[0] for part in problem.split("train/")[1:]] == named
    assert problem.endswith(", …")


def test_broken_images_are_left_out_on_request_and_named(folder: Path, tmp_path: Path) -> None:
    expected_folder = Path(shutil.copytree(folder, tmp_path / "sound"))
    for file in ("train/blue/0.png", "train/red/4.png", "test/green/1.png"):
        truncate(folder / file)
        (expected_folder / file).unlink()
    expected = open_image_files(expected_folder)
    for path in (folder, pack(folder, tmp_path / "colours.tar")):
        data = open_image_files(path, "skip")
        for split, named in (("train", r"2 broken .*train/blue/0.png \(trunc.*red/4"), ("test", "1 broken .*green/1")):
            with pytest.warns(FallbackWarning, match=f"left out {named}"):
                read = data.load("train" if split == "train" else "test", SPEC)
            sound = expected.load("train" if split == "train" else "test", SPEC)
            assert np.array_equal(read.images, sound.images)
            assert np.array_equal(read.labels, sound.labels)
            assert fingerprint(read, data.class_names) == fingerprint(sound, data.class_names)


def test_sound_images_are_read_without_a_word_when_broken_ones_may_be_skipped(folder: Path) -> None:
    assert prints(open_image_files(folder, "skip")) == prints(open_image_files(folder))


def test_a_class_without_a_sound_image_is_refused_even_then(folder: Path) -> None:
    for path in (folder / "test" / "green").iterdir():
        truncate(path)
    with pytest.raises(DataError, match=r"3 broken images in .*; no image is left of green: repair them"):
        open_image_files(folder, "skip").load("test", SPEC)


def test_of_a_broken_and_a_later_sound_file_of_one_name_the_sound_one_counts(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("train/blue/0.png"), io.BytesIO())
        archive.add(folder, ".")
    assert prints(open_image_files(tmp_path / "twice.tar")) == prints(open_image_files(folder))


@pytest.mark.parametrize("name", ["val", "valid"])
def test_validation_images_take_the_place_of_missing_test_images(
    opened: Callable[[Path], Dataset], folder: Path, name: str
) -> None:
    expected = prints(open_image_files(folder))
    (folder / "test").rename(folder / name)
    assert prints(opened(folder)) == expected
    truncate(folder / name / "red" / "0.png")
    shutil.rmtree(folder / name / "blue")
    error = failing(opened(folder))
    assert "classes in one split alone (blue)" in error.problem
    assert f"train/ and {name}/" in error.remedy


def test_test_images_go_before_validation_images(opened: Callable[[Path], Dataset], folder: Path) -> None:
    expected = prints(open_image_files(folder))
    draw_folder(folder / "other", train=1, test=2, seed=1)
    (folder / "other" / "test").rename(folder / "val")
    shutil.rmtree(folder / "other")
    assert prints(opened(folder)) == expected


def test_files_that_change_while_they_are_read_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_and_alter(source: Path) -> Image.Image:
        (folder / "train" / "red" / "0.png").touch()
        return read_image(source)

    monkeypatch.setattr("cifarx_train.data.image_folder.read_image", read_and_alter)
    with pytest.raises(DataError, match="colours changed while it was read"):
        open_image_files(folder).load("train", SPEC)


@given(st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_truncated_archive_is_refused(drawn_once: Path, tmp_path: Path, part: float) -> None:
    archive = tmp_path / "colours.tar.gz"
    if not archive.exists():
        pack(drawn_once, archive)
    content = archive.read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError, match=r"cut\.tar\.gz is (truncated|not a folder or a)"):
        prints(open_image_files(cut))


def test_an_archive_that_lost_its_last_byte_is_refused(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder, tmp_path / "cut.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"cut\.tar\.gz is truncated or damaged"):
        prints(open_image_files(archive))


def test_a_truncated_plain_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, ".")
    (tmp_path / "cut.tar").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(DataError, match=r"cut\.tar is truncated or damaged .*copy or download it again"):
        prints(open_image_files(tmp_path / "cut.tar"))


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_an_altered_byte_of_an_archive_is_found_or_changes_nothing(
    drawn_once: Path, tmp_path: Path, place: float, change: int
) -> None:
    archive = tmp_path / "colours.tar.gz"
    if not archive.exists():
        pack(drawn_once, archive)
    content = bytearray(archive.read_bytes())
    content[int(place * len(content))] ^= change
    altered = tmp_path / "altered.tar.gz"
    altered.write_bytes(content)
    try:
        read = prints(open_image_files(altered))
    except DataError:
        return
    assert read == prints(open_image_files(archive))


@pytest.mark.parametrize("content", [b"", b"a text\n" * 200, bytes(3)], ids=["empty", "text", "zeros"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.tar\.gz is not a folder or a \.tar\.gz of one .*train/<class>/<image>"):
        open_image_files(tmp_path / "data.tar.gz")


def test_a_deeper_layout_is_not_guessed_at(folder: Path, tmp_path: Path) -> None:
    archive = open_image_files(pack(folder, tmp_path / "deep.tar.gz", "one/two"))
    assert "has 0 class folders" in failing(archive).problem


# --- CIFAR-10 as image files


@pytest.mark.slow
def test_the_copy_of_cifar10_is_whole(cifar10_jpeg: Path) -> None:
    data = open_image_files(cifar10_jpeg)
    test = data.load("test", SPEC)
    assert data.class_names == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    assert test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
