import io
import os
import shutil
import sys
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
from cifarx_serve.spec import InputSpec, Interpolation
from cifarx_train.data.dataset import Dataset, Split, fingerprint
from cifarx_train.data.image_dataset import open_image_dataset
from tests.support.image_datasets import COLORS, color_image, pack_archive, write_image_folder

SPEC = InputSpec(height=32, width=32)
SPLITS: tuple[Split, Split] = ("train", "test")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not use the cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """5 training and 3 test images of three classes, for tests that change them."""
    return write_image_folder(tmp_path / "colors", train=5, test=3)


@pytest.fixture(params=["folder", "archive"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Dataset]:
    """A function that opens a folder, or an archive of it, as a dataset."""

    def open_folder(folder: Path) -> Dataset:
        return open_image_dataset(folder)

    def open_archive(folder: Path) -> Dataset:
        return open_image_dataset(pack_archive(folder, tmp_path / f"{folder.name}.tar.gz"))

    return open_folder if request.param == "folder" else open_archive


def fingerprints(data: Dataset, spec: InputSpec = SPEC) -> list[str]:
    return [fingerprint(data.load(split, spec), data.class_names) for split in SPLITS]


def load_error(data: Dataset) -> DataError:
    """Return the error that a dataset raises when it is loaded."""
    with pytest.raises(DataError) as caught:
        fingerprints(data)
    assert caught.value.exit_status == 2
    return caught.value


# --- images and labels


def test_every_image_has_the_label_of_its_class(opened: Callable[[Path], Dataset], folder: Path) -> None:
    data = opened(folder)
    for split, count in zip(SPLITS, (5, 3), strict=True):
        loaded = data.load(split, SPEC)
        assert (loaded.images.shape, loaded.images.dtype) == ((3 * count, 32, 32, 3), np.uint8)
        assert loaded.labels.dtype == np.int64
        assert loaded.labels.tolist() == [0] * count + [1] * count + [2] * count
        paths = [
            folder / split / name / f"{number}.png" for name in ("blue", "green", "red") for number in range(count)
        ]
        assert np.array_equal(loaded.images, np.stack([np.asarray(Image.open(path)) for path in paths]))


def test_classes_are_sorted_by_name(opened: Callable[[Path], Dataset], tmp_path: Path) -> None:
    names = ["zebra", "Ant", "ant", "10", "9", "übergang", "two words"]
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for name in names:
            class_folder = tmp_path / "data" / split / name
            class_folder.mkdir(parents=True)
            Image.fromarray(color_image((0, 0, 0), rng)).save(class_folder / "0.png")
    assert opened(tmp_path / "data").class_names == ("10", "9", "Ant", "ant", "two words", "zebra", "übergang")


def test_files_are_sorted_by_name(opened: Callable[[Path], Dataset], folder: Path) -> None:
    for name in COLORS:
        Image.new("RGB", (32, 32), (1, 2, 3)).save(folder / "train" / name / "10.png")
    images = opened(folder).load("train", SPEC).images
    # Sorted as text: 0, 1, 10, 2, …
    assert (images[2] == (1, 2, 3)).all()
    assert not (images[5] == (1, 2, 3)).all()


def test_a_folder_and_its_archives_have_the_same_data(folder: Path, tmp_path: Path) -> None:
    plain = open_image_dataset(folder)
    expected = fingerprints(plain)
    for top in (".", "colors", "./colors"):
        archive = open_image_dataset(pack_archive(folder, tmp_path / "colors.tar.gz", top))
        assert archive.class_names == plain.class_names
        assert fingerprints(archive) == expected
        for split in SPLITS:
            assert np.array_equal(archive.load(split, SPEC).images, plain.load(split, SPEC).images)


def test_the_order_of_archive_members_does_not_matter(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "reversed.tar", "w") as archive:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            archive.add(path, path.relative_to(folder))
    assert fingerprints(open_image_dataset(tmp_path / "reversed.tar")) == fingerprints(open_image_dataset(folder))


def test_the_later_of_two_members_with_the_same_name_is_used(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        archive.add(folder, "colors")
        Image.new("RGB", (32, 32), "white").save(folder / "train" / "blue" / "0.png")
        archive.add(folder / "train" / "blue" / "0.png", "colors/train/blue/0.png")
    assert fingerprints(open_image_dataset(tmp_path / "twice.tar")) == fingerprints(open_image_dataset(folder))


def test_each_split_has_its_own_fingerprint(folder: Path) -> None:
    before = fingerprints(open_image_dataset(folder))
    Image.new("RGB", (32, 32), "white").save(folder / "test" / "blue" / "0.png")
    after = fingerprints(open_image_dataset(folder))
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_other_files_are_counted_and_left_out(opened: Callable[[Path], Dataset], folder: Path) -> None:
    expected = fingerprints(open_image_dataset(folder))
    for parent in (folder, folder / "train", folder / "train" / "blue", folder / "test" / "red"):
        (parent / "README.md").write_text("about")
        (parent / "labels.csv").write_text("0,blue")
        (parent / ".DS_Store").write_bytes(b"\0")
        (parent / "._0.png").write_bytes(b"\0")
        (parent / "no-suffix").write_bytes(b"\0")
    (folder / "train" / "blue" / "folder.png").mkdir()
    (folder / "drafts" / "blue").mkdir(parents=True)
    shutil.copy(folder / "test" / "blue" / "0.png", folder / "drafts" / "blue")
    shutil.copy(folder / "test" / "blue" / "0.png", folder / "train" / "0.png")
    data = opened(folder)
    with pytest.warns(FallbackWarning, match=r"^left out 22 files of ") as caught:
        assert fingerprints(data) == expected
    assert [str(warning.message) for warning in caught] == list(data.left_out)
    assert data.left_out == (
        f"left out 22 files of {data.name}: 4 without a suffix, 4 .csv, 4 .md, 8 hidden (.DS_Store), "
        "1 outside the folders of splits and classes (drafts), 1 outside class folders (train/0.png)",
    )


def test_image_formats_can_be_mixed(opened: Callable[[Path], Dataset], folder: Path) -> None:
    image = Image.new("RGB", (32, 32), (250, 250, 250))
    for suffix in ("jpg", "JPEG", "bmp", "webp", "PNG"):
        image.save(folder / "test" / "green" / f"x.{suffix}")
    image.convert("L").save(folder / "test" / "green" / "gray.png")
    image.convert("RGBA").save(folder / "test" / "green" / "alpha.png")
    loaded = opened(folder).load("test", SPEC)
    assert loaded.labels.tolist() == [0] * 3 + [1] * 10 + [2] * 3
    assert loaded.images[6:13].min() >= 245


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_other_sizes_are_resized_as_for_inference(
    opened: Callable[[Path], Dataset], tmp_path: Path, resample: Interpolation
) -> None:
    folder = write_image_folder(tmp_path / "large", train=1, test=1, width=50, height=41)
    spec = InputSpec(height=24, width=20, interpolation=resample)
    images = opened(folder).load("test", spec).images
    assert images.shape == (3, 24, 20, 3)
    for image, name in zip(images, ("blue", "green", "red"), strict=True):
        assert np.array_equal(image, resize(Image.open(folder / "test" / name / "0.png"), spec))


def test_the_name_is_the_file_name_without_the_path(
    opened: Callable[[Path], Dataset], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(folder)
    assert data.kind == "folder"
    assert data.name in {"colors", "colors.tar.gz"}
    monkeypatch.chdir(folder)
    assert open_image_dataset(Path()).name == "colors"
    assert open_image_dataset(Path("train/..")).name == "colors"


def test_archives_are_not_extracted(folder: Path, tmp_path: Path) -> None:
    archive = pack_archive(folder, tmp_path / "colors.tar.gz")
    before = sorted(tmp_path.rglob("*"))
    fingerprints(open_image_dataset(archive))
    assert sorted(tmp_path.rglob("*")) == before


# --- errors


def test_no_class_folders(opened: Callable[[Path], Dataset], tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "test").mkdir()
    error = load_error(opened(tmp_path / "data"))
    assert "data has 0 class folders with images (found " in error.problem.replace(".tar.gz", "")
    assert "train/<class>/<image> and test/<class>/<image>" in error.remedy


def test_one_class(opened: Callable[[Path], Dataset], folder: Path) -> None:
    for split in SPLITS:
        for name in ("blue", "green"):
            shutil.rmtree(folder / split / name)
    assert "has 1 class with training images (red) (found test/, train/)" in load_error(opened(folder)).problem


def test_no_test_split(opened: Callable[[Path], Dataset], folder: Path) -> None:
    shutil.rmtree(folder / "test")
    error = load_error(opened(folder))
    assert "has 3 classes with images (blue, green, red), but no test images (found train/)" in error.problem
    assert "use --split 0.2" in error.remedy


@pytest.mark.parametrize("split", SPLITS)
def test_classes_that_differ_between_splits(opened: Callable[[Path], Dataset], folder: Path, split: Split) -> None:
    (folder / split / "red").rename(folder / split / "crimson")
    error = load_error(opened(folder))
    unknown = "crimson" if split == "test" else "red"
    assert f"has 1 class in the test split without training images ({unknown})" in error.problem
    assert error.remedy == "add training images, or remove the others"


def test_a_class_without_test_images_is_noted(opened: Callable[[Path], Dataset], folder: Path) -> None:
    for path in (folder / "test" / "green").iterdir():
        path.unlink()
    data = opened(folder)
    with pytest.warns(FallbackWarning, match="the test split has no images of 1 class: green"):
        assert data.load("test", SPEC).labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert data.class_names == ("blue", "green", "red")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "magic"])
def test_a_broken_image_is_reported(opened: Callable[[Path], Dataset], folder: Path, content: bytes) -> None:
    (folder / "test" / "green" / "1.png").write_bytes(content)
    data = opened(folder)
    assert len(data.load("train", SPEC)) == 15
    error = load_error(data)
    assert f"1 broken image in {data.path}: test/green/1.png (not an image" in error.problem  # type: ignore[attr-defined]
    assert error.remedy == "repair or remove them, or use --on-error skip"


def test_a_truncated_image_is_reported(opened: Callable[[Path], Dataset], folder: Path) -> None:
    truncate(folder / "train" / "red" / "4.png")
    assert ": train/red/4.png (truncated or damaged (" in load_error(opened(folder)).problem


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_broken_images_are_counted_and_the_first_five_are_listed(
    opened: Callable[[Path], Dataset], folder: Path
) -> None:
    for name in COLORS:
        for number in (0, 2, 3):
            truncate(folder / "train" / name / f"{number}.png")
    problem = load_error(opened(folder)).problem
    assert problem.startswith("9 broken images in ")
    listed = ["blue/0.png", "blue/2.png", "blue/3.png", "green/0.png", "green/2.png"]
    assert [part.split(" (")[0] for part in problem.split("train/")[1:]] == listed
    assert problem.endswith(", …")


def test_broken_images_can_be_skipped_with_a_warning(folder: Path, tmp_path: Path) -> None:
    expected_folder = Path(shutil.copytree(folder, tmp_path / "intact"))
    for file in ("train/blue/0.png", "train/red/4.png", "test/green/1.png"):
        truncate(folder / file)
        (expected_folder / file).unlink()
    expected = open_image_dataset(expected_folder)
    for path in (folder, pack_archive(folder, tmp_path / "colors.tar")):
        data = open_image_dataset(path, "skip")
        for split, listed in (
            ("train", r"2 broken .*train/blue/0.png \(trunc.*red/4"),
            ("test", "1 broken .*green/1"),
        ):
            with pytest.warns(FallbackWarning, match=f"skipped {listed}"):
                loaded = data.load("train" if split == "train" else "test", SPEC)
            intact = expected.load("train" if split == "train" else "test", SPEC)
            assert np.array_equal(loaded.images, intact.images)
            assert np.array_equal(loaded.labels, intact.labels)
            assert fingerprint(loaded, data.class_names) == fingerprint(intact, data.class_names)


def test_skipping_causes_no_warning_without_broken_images(folder: Path) -> None:
    assert fingerprints(open_image_dataset(folder, "skip")) == fingerprints(open_image_dataset(folder))


def test_a_class_with_only_broken_images_is_an_error_even_if_they_are_skipped(folder: Path) -> None:
    for path in (folder / "test" / "green").iterdir():
        truncate(path)
    with pytest.raises(DataError, match=r"3 broken images in .*; no images are left in class green: repair them"):
        open_image_dataset(folder, "skip").load("test", SPEC)


def test_a_broken_member_can_be_replaced_by_a_later_one(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("train/blue/0.png"), io.BytesIO())
        archive.add(folder, ".")
    assert fingerprints(open_image_dataset(tmp_path / "twice.tar")) == fingerprints(open_image_dataset(folder))


@pytest.mark.parametrize("name", ["val", "valid"])
def test_validation_images_are_used_if_there_are_no_test_images(
    opened: Callable[[Path], Dataset], folder: Path, name: str
) -> None:
    expected = fingerprints(open_image_dataset(folder))
    (folder / "test").rename(folder / name)
    assert fingerprints(opened(folder)) == expected
    data = opened(folder)
    assert (data.splits, data.left_out) == (("train", "test"), ())


def test_a_validation_split_beside_a_test_split(
    opened: Callable[[Path], Dataset], folder: Path, tmp_path: Path
) -> None:
    expected = fingerprints(open_image_dataset(folder))
    write_image_folder(tmp_path / "other", train=1, test=2, seed=1)
    (tmp_path / "other" / "test").rename(folder / "Valid")
    data = opened(folder)
    assert fingerprints(data) == expected
    assert data.splits == ("train", "val", "test")
    assert data.load("val", SPEC).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_files_that_change_while_they_are_read_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_and_alter(source: Path) -> Image.Image:
        (folder / "train" / "red" / "0.png").touch()
        return read_image(source)

    monkeypatch.setattr("cifarx_train.data.image_dataset.read_image", read_and_alter)
    with pytest.raises(DataError, match="colors changed while it was read"):
        open_image_dataset(folder).load("train", SPEC)


@given(st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_truncated_archive_is_an_error(color_folder: Path, tmp_path: Path, fraction: float) -> None:
    archive = tmp_path / "colors.tar.gz"
    if not archive.exists():
        pack_archive(color_folder, archive)
    content = archive.read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(DataError, match=r"cut\.tar\.gz is (truncated|not a folder or a)"):
        fingerprints(open_image_dataset(cut))


def test_an_archive_without_its_last_byte_is_an_error(folder: Path, tmp_path: Path) -> None:
    archive = pack_archive(folder, tmp_path / "cut.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"cut\.tar\.gz is truncated or damaged"):
        fingerprints(open_image_dataset(archive))


def test_a_truncated_uncompressed_archive_is_an_error(folder: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, ".")
    (tmp_path / "cut.tar").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(DataError, match=r"cut\.tar is truncated or damaged .*copy or download it again"):
        fingerprints(open_image_dataset(tmp_path / "cut.tar"))


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_changed_byte_of_an_archive_is_detected_or_harmless(
    color_folder: Path, tmp_path: Path, position: float, change: int
) -> None:
    archive = tmp_path / "colors.tar.gz"
    if not archive.exists():
        pack_archive(color_folder, archive)
    content = bytearray(archive.read_bytes())
    content[int(position * len(content))] ^= change
    altered = tmp_path / "altered.tar.gz"
    altered.write_bytes(content)
    try:
        loaded = fingerprints(open_image_dataset(altered))
    except DataError:
        return
    assert loaded == fingerprints(open_image_dataset(archive))


@pytest.mark.parametrize("content", [b"", b"a text\n" * 200, bytes(3)], ids=["empty", "text", "zeros"])
def test_a_file_that_is_not_an_archive_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.tar.gz").write_bytes(content)
    with pytest.raises(
        DataError, match=r"data\.tar\.gz is not a folder or a \.zip or \.tar\.gz of one .*train/<class>/<image>"
    ):
        open_image_dataset(tmp_path / "data.tar.gz")


def test_a_deeper_layout_is_not_supported(folder: Path, tmp_path: Path) -> None:
    archive = open_image_dataset(pack_archive(folder, tmp_path / "deep.tar.gz", "one/two"))
    assert "deep.tar.gz has 1 class with training images (one)" in load_error(archive).problem


# --- CIFAR-10 as image files


@pytest.mark.slow
def test_the_jpeg_copy_of_cifar10_is_complete(cifar10_jpeg: Path) -> None:
    data = open_image_dataset(cifar10_jpeg)
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes need POSIX")
@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "data.tar").symlink_to(target)
    with pytest.raises(DataError, match=r"is not a folder or a .zip or .tar.gz of one \(not a regular file\)"):
        open_image_dataset(tmp_path / "data.tar")


def test_a_sparse_member_is_not_read(folder: Path, tmp_path: Path) -> None:
    """It declares gigabytes of zeros, which take no space in the archive."""
    header = tarfile.TarInfo("colors/train/blue/huge.png")
    header.size, header.type = 0, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (1 << 33)  # realsize, of the old GNU format of sparse files
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    archive = tmp_path / "colors.tar"
    with tarfile.open(archive, "w") as packed:
        packed.add(folder, "colors")
    content = archive.read_bytes()
    end = len(content.rstrip(b"\0")) + 511 & -512
    archive.write_bytes(content[:end] + block + bytes(1024))
    with pytest.raises(DataError, match=r"huge\.png in .* has 8,589,934,592 bytes, too many for an image: remove it"):
        open_image_dataset(archive).load("train", InputSpec(height=4, width=4))


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system accepts only UTF-8")
def test_a_class_name_that_is_not_utf_8_is_an_error(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "blue").rename(folder / split / os.fsdecode(b"bl\xff"))
    with pytest.raises(DataError, match=r"colors has the class bl., whose name is not valid UTF-8 .*: rename it"):
        _ = open_image_dataset(folder).class_names
