import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import Dataset, LabeledImages, fingerprint
from cifarx_train.data.decoded_cache import _decode_record, _encode_record, cache_key
from cifarx_train.data.image_dataset import open_image_dataset
from tests.support.file_owner import pretend_other_owner
from tests.support.image_datasets import pack_archive, write_image_folder

SPEC = InputSpec(height=32, width=32)
DAY_S = 24 * 3600


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache. Even small splits are cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MIN_IMAGES", 1)
    return tmp_path / "cache" / "cifarx" / "decoded"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_image_folder(tmp_path / "colors", train=5, test=3)


@pytest.fixture(params=["folder", "archive"])
def source(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    return folder if request.param == "folder" else pack_archive(folder, tmp_path / "colors.tar.gz")


class Reads:
    """Counts how often an image is decoded."""

    def __init__(self) -> None:
        self.sources: list[object] = []

    def __call__(self, source: Path | bytes) -> Image.Image:
        self.sources.append(source)
        return read_image(source)

    def count(self) -> int:
        """Return the number of images decoded since the last call."""
        count = len(self.sources)
        self.sources.clear()
        return count


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads()
    monkeypatch.setattr("cifarx_train.data.image_dataset.read_image", reads)
    return reads


def load(path: Path, spec: InputSpec = SPEC) -> LabeledImages:
    return open_image_dataset(path).load("train", spec)


def files(cache: Path, suffix: str) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix == suffix]


# --- entries


def test_images_are_decoded_once_and_then_mapped(source: Path, cache: Path, reads: Reads) -> None:
    first, second = load(source), load(source)
    assert reads.count() == 15
    assert first.file == second.file == files(cache, ".npy")[0]
    for loaded in (first, second):
        images = loaded.images
        assert not images.flags.writeable
        assert (images.shape, images.dtype, type(images)) == ((15, 32, 32, 3), np.uint8, np.ndarray)
        assert loaded.labels.dtype == np.int64
        assert loaded.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert np.array_equal(first.images, second.images)


def test_a_cached_split_equals_a_decoded_one(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = load(source)
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MIN_IMAGES", 1000)
    shutil.rmtree(cache)
    decoded = load(source)
    assert (cached.file is not None, decoded.file) == (True, None)
    assert fingerprint(cached, ("a", "b")) == fingerprint(decoded, ("a", "b"))
    assert not cache.exists()  # small splits are not cached


def test_a_cached_archive_is_not_listed(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack_archive(folder, tmp_path / "colors.tar.gz")
    load(archive)
    assert cache.exists()
    data = open_image_dataset(archive)
    monkeypatch.delattr("cifarx_train.data.archives.ArchiveStore._positions")
    data.load("train", SPEC)
    assert data.class_names == ("blue", "green", "red")


def test_entries_of_earlier_versions_are_decoded_again(source: Path, cache: Path, reads: Reads) -> None:
    """They did not contain the images in subfolders of classes, and their records do not say what was left out."""
    load(source)
    (record,) = files(cache, ".record")
    decoded = _decode_record(record.read_bytes())
    record.write_bytes(_encode_record(msgspec.structs.replace(decoded, splits=())))
    reads.count()
    load(source)
    assert reads.count() == 15
    assert record.read_bytes() == _encode_record(decoded)
    load(source)
    assert reads.count() == 0


def test_a_cached_split_says_what_is_left_out(folder: Path, tmp_path: Path, cache: Path) -> None:
    (folder / "notes.txt").touch()
    archive = pack_archive(folder, tmp_path / "colors.tar.gz")
    for _ in range(2):
        data = open_image_dataset(archive)
        with pytest.warns(FallbackWarning, match=r"left out 1 file of colors\.tar\.gz: 1 \.txt"):
            data.load("train", SPEC)
        assert (data.splits, len(data.left_out)) == (("train", "test"), 1)
    assert cache.exists()


def test_an_archive_is_identified_by_its_content(folder: Path, tmp_path: Path, cache: Path, reads: Reads) -> None:
    archive = pack_archive(folder, tmp_path / "colors.tar.gz")
    load(archive)
    moved = archive.rename(tmp_path / "moved.tar.gz")
    os.utime(moved, (0, 0))
    reads.count()
    load(moved)
    assert reads.count() == 0
    assert len(files(cache, ".npy")) == 1


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(height=32, width=20),
        InputSpec(height=20, width=32),
        InputSpec(height=32, width=32, interpolation="nearest"),
        InputSpec(height=32, width=32, antialias=False),
        InputSpec(height=32, width=32, resize_to=(40, 40)),
        InputSpec(height=32, width=32, resize="shorter_side", resize_to=40),
        InputSpec(height=32, width=32, crop_offset="floor"),
        InputSpec(height=32, width=32, resize="shorter_side"),
        InputSpec(height=32, width=32, resize="letterbox"),
        InputSpec(height=32, width=32, channels=1, color="L"),
    ],
)
def test_another_way_to_resize_is_another_entry(folder: Path, cache: Path, reads: Reads, spec: InputSpec) -> None:
    load(folder)
    assert load(folder, spec).images.shape[1:] == (spec.height, spec.width, spec.channels)
    assert reads.count() == 30
    assert len(files(cache, ".npy")) == 2


def test_every_field_of_the_input_decides_about_the_entry_or_not() -> None:
    """A field that is added to the spec must be added to one of the two sets here, and to the key if it matters."""
    later = {"layout", "dtype", "value_range", "mean", "std"}
    size = {"height", "width", "channels", "color"}
    resizing = {"resize", "resize_to", "crop_offset", "interpolation", "antialias", "fill"}
    assert set(InputSpec.__struct_fields__) == later | size | resizing


def test_the_fill_value_is_part_of_the_key_in_the_order_of_the_pixels() -> None:
    def key(color: Any, fill: Any) -> str:
        return cache_key("x", InputSpec(height=32, width=32, resize="letterbox", color=color, fill=fill))

    assert key("RGB", (1, 2, 3)) == key("BGR", (3, 2, 1))
    assert len({key("RGB", 0), key("RGB", 1), key("RGB", (1, 2, 3)), key("BGR", (1, 2, 3))}) == 4
    assert key("RGB", 7) == key("RGB", (7, 7, 7))


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), value_range=(-1, 1)),
        InputSpec(height=32, width=32, color="BGR", layout="NHWC"),
    ],
)
def test_what_happens_to_the_pixels_afterwards_does_not_change_the_entry(
    folder: Path, cache: Path, spec: InputSpec
) -> None:
    load(folder)
    load(folder, spec)
    assert len(files(cache, ".npy")) == 1


@pytest.mark.usefixtures("cache")
def test_grayscale_images_are_mapped(folder: Path, reads: Reads) -> None:
    spec = InputSpec(height=20, width=32, channels=1, color="L")
    first, second = load(folder, spec), load(folder, spec)
    assert reads.count() == 15
    assert first.images.shape == (15, 20, 32, 1)
    assert not first.images.flags.writeable
    assert np.array_equal(first.images, second.images)
    with Image.open(folder / "train" / "blue" / "0.png") as image:
        assert np.array_equal(first.images[0], resize(image, spec))


def test_another_version_of_pillow_is_another_entry(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    monkeypatch.setattr("PIL.__version__", "0.0.1")
    load(folder)
    assert len(files(cache, ".npy")) == 2


def _replace(folder: Path) -> None:
    """Replace an image by another one of the same size and time."""
    path = folder / "train" / "blue" / "0.bmp"
    state = path.stat()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)


def _add(folder: Path) -> None:
    shutil.copy(folder / "train" / "red" / "0.png", folder / "train" / "red" / "9.png")


def _rename(folder: Path) -> None:
    (folder / "train" / "blue" / "0.bmp").rename(folder / "train" / "blue" / "z.bmp")


def _move(folder: Path) -> None:
    (folder / "train" / "blue" / "0.bmp").rename(folder / "train" / "green" / "0.bmp")


def _rename_class(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "red").rename(folder / split / "a red")


@pytest.mark.parametrize("alter", [_replace, _add, _rename, _move, _rename_class])
def test_any_change_to_the_files_is_detected(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, alter: Callable[[Path], None]
) -> None:
    Image.new("RGB", (32, 32)).save(folder / "train" / "blue" / "0.bmp")
    load(folder)
    time.sleep(0.02)  # longer than the resolution of file times
    alter(folder)
    data = open_image_dataset(folder)
    loaded = fingerprint(data.load("train", SPEC), data.class_names)
    shutil.rmtree(cache)
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MIN_IMAGES", 1000)
    fresh = open_image_dataset(folder)
    assert loaded == fingerprint(fresh.load("train", SPEC), fresh.class_names)


# --- broken images


def test_broken_images_are_reported_from_the_cache_too(source: Path, folder: Path, cache: Path, reads: Reads) -> None:
    broken = folder / "train" / "blue" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-100])
    (folder / "train" / "red" / "2.png").write_bytes(b"")
    if source != folder:
        pack_archive(folder, source)
    with pytest.raises(DataError, match=r"2 broken images in .*train/blue/0\.png .*train/red/2\.png"):
        load(source)
    assert not files(cache, ".npy")
    splits: list[LabeledImages] = []
    for _ in range(2):
        with pytest.warns(FallbackWarning, match=r"skipped 2 broken images in .*train/blue/0\.png .*train/red/2\.png"):
            splits.append(open_image_dataset(source, "skip").load("train", SPEC))
    assert reads.count() == 30
    for split in splits:
        assert split.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4
        assert np.array_equal(split.images[0], np.asarray(Image.open(folder / "train" / "blue" / "1.png")))
        assert np.array_equal(split.images[-1], np.asarray(Image.open(folder / "train" / "red" / "4.png")))
    with pytest.raises(DataError, match=r"2 broken images in .*or use --on-error skip"):
        load(source)
    assert reads.count() == 0


# --- damage


@given(
    position=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), suffix=st.sampled_from([".npy", ".record"])
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_changed_byte_of_a_header_or_record_is_detected(
    folder: Path, cache: Path, position: float, change: int, suffix: str
) -> None:
    original = load(folder).images.copy()
    (damaged,) = files(cache, suffix)
    content = bytearray(damaged.read_bytes())
    content[int(position * (128 if suffix == ".npy" else len(content)))] ^= change
    damaged.write_bytes(content)
    assert np.array_equal(load(folder).images, original)
    assert np.array_equal(np.load(files(cache, ".npy")[0], allow_pickle=False), original)


@given(fraction=st.floats(0, 1, exclude_max=True), suffix=st.sampled_from([".npy", ".record"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_truncated_file_is_replaced(folder: Path, cache: Path, fraction: float, suffix: str) -> None:
    original = load(folder).images.copy()
    (truncated,) = files(cache, suffix)
    # A new file, because the old one is still mapped.
    content = truncated.read_bytes()
    truncated.unlink()
    truncated.write_bytes(content[: int(fraction * len(content))])
    again = load(folder)
    assert np.array_equal(again.images, original)
    assert again.file is not None


@pytest.mark.parametrize("suffix", [".npy", ".record"])
def test_half_of_an_entry_is_ignored(folder: Path, cache: Path, reads: Reads, suffix: str) -> None:
    load(folder)
    files(cache, suffix)[0].unlink()
    load(folder)
    assert reads.count() == 30


def test_a_changed_pixel_is_detected(folder: Path, cache: Path, reads: Reads) -> None:
    expected = load(folder).images.copy()  # the file is mapped
    reads.count()
    (images,) = files(cache, ".npy")
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    assert np.array_equal(load(folder).images, expected)
    assert reads.count() == 15
    assert np.array_equal(load(folder).images, expected)
    assert reads.count() == 0


def test_the_fingerprint_of_a_cached_split_is_not_computed_again(folder: Path, cache: Path) -> None:
    del cache
    names = open_image_dataset(folder).class_names
    decoded, cached = load(folder), load(folder)
    for split in (decoded, cached):
        assert split.known_fingerprint == (names, fingerprint(replace(split, known_fingerprint=None), names))
        assert fingerprint(split, names) == split.known_fingerprint.sha256
        assert fingerprint(split, names[::-1]) != split.known_fingerprint.sha256


@pytest.mark.parametrize("owned", ["cifarx", "decoded", ".npy", ".record"])
def test_files_of_another_user_are_not_used(
    folder: Path, cache: Path, reads: Reads, owned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(folder)
    reads.count()
    path = files(cache, owned)[0] if owned.startswith(".") else {"cifarx": cache.parent, "decoded": cache}[owned]
    pretend_other_owner(monkeypatch, path)
    with pytest.warns(FallbackWarning, match="belongs to another user, who could change what is cached"):
        assert np.array_equal(load(folder).images, expected.images)
    assert reads.count() >= 15


def test_the_folder_is_private(folder: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    load(folder)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, cache.parent)] == [0o700, 0o700]


def test_images_of_another_shape_are_replaced(folder: Path, cache: Path, reads: Reads) -> None:
    load(folder)
    np.save(files(cache, ".npy")[0], np.zeros((15, 32, 96), np.uint8))
    assert load(folder).images.shape == (15, 32, 32, 3)
    assert reads.count() == 30


# --- the cache cannot be written


def assert_falls_back(folder: Path, reason: str) -> None:
    with pytest.warns(FallbackWarning, match=f"decoded images are not cached, so the next run will.*{reason}"):
        loaded = load(folder)
    assert loaded.file is None
    assert loaded.images.flags.writeable
    assert len(loaded) == 15


def test_a_folder_that_cannot_be_created(folder: Path, cache: Path) -> None:
    cache.parents[1].write_text("a file")
    assert_falls_back(folder, "cannot write .*; set XDG_CACHE_HOME to use another folder")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Limit the size of the files that this process writes, in bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_fills_up_during_decoding(folder: Path, cache: Path) -> None:
    with file_limit(20_000):
        assert_falls_back(folder, "too large")
    assert list(cache.iterdir()) == []


def test_a_disk_without_enough_space(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = shutil.disk_usage(folder)._replace(free=2 * 15 * 32 * 32 * 3 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: state)
    assert_falls_back(folder, "more than half of the .* GB that are free")
    assert list(cache.iterdir()) == []


def test_without_a_home_directory(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    monkeypatch.setattr(Path, "home", no_home)
    assert_falls_back(folder, "cannot write")
    assert not cache.exists()


def test_the_default_is_in_the_home_directory(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = load(folder).file
    assert file is not None
    assert file.parent == tmp_path / "home" / ".cache" / "cifarx" / "decoded"
    assert not cache.exists()


# --- several processes

PROGRAM = """
import sys, time
from pathlib import Path
import cifarx_train.data.decoded_cache as decoded_cache
import cifarx_train.data.image_dataset as image_dataset
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import fingerprint

decoded_cache._MIN_IMAGES = 1
read = image_dataset.read_image
def slowly(source):
    print("reading", flush=True)
    time.sleep(float(sys.argv[2]))
    return read(source)
image_dataset.read_image = slowly
data = image_dataset.open_image_dataset(Path(sys.argv[1]))
print(fingerprint(data.load("train", InputSpec(height=32, width=32)), data.class_names))
"""


def start(folder: Path, pause_s: float) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), str(pause_s)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def expected_fingerprint(folder: Path) -> str:
    data: Dataset = open_image_dataset(folder)
    return fingerprint(data.load("train", SPEC), data.class_names)


def test_several_processes_can_decode_the_same_split(source: Path, cache: Path) -> None:
    running = [start(source, 0.02) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert {lines[-1] for lines in outputs} == {expected_fingerprint(source)}
    assert sorted(path.suffix for path in cache.iterdir()) == [".npy", ".record"]


def test_a_killed_process_leaves_no_entry(folder: Path, cache: Path, reads: Reads) -> None:
    with start(folder, 10) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGKILL)
    (left,) = cache.iterdir()
    assert left.name.startswith(".")
    load(folder)
    assert reads.count() == 15
    assert left.exists()  # another process may still be writing it
    os.utime(left, (time.time() - 2 * DAY_S,) * 2)
    load(folder, InputSpec(height=8, width=8))
    assert not left.exists()


# --- old entries


def age(cache: Path, days: float) -> set[Path]:
    """Change the time of all entries to `days` ago and return their files."""
    entries = set(cache.iterdir())
    for path in entries:
        os.utime(path, (time.time() - days * DAY_S,) * 2)
    return entries


def test_a_new_entry_removes_unused_ones(folder: Path, cache: Path) -> None:
    load(folder)
    old = age(cache, 31)
    load(folder, InputSpec(height=8, width=8))
    assert not old & set(cache.iterdir())
    assert len(files(cache, ".npy")) == len(files(cache, ".record")) == 1


def test_a_used_entry_is_kept(folder: Path, cache: Path) -> None:
    load(folder)
    old = age(cache, 31)
    load(folder)
    load(folder, InputSpec(height=8, width=8))
    assert old < set(cache.iterdir())


def test_the_least_recently_used_entry_is_removed_beyond_the_size_limit(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, side in ((3, 8), (2, 9)):
        before = set(cache.iterdir()) if cache.exists() else set()
        load(folder, InputSpec(height=side, width=side))
        for path in set(cache.iterdir()) - before:
            os.utime(path, (time.time() - days * DAY_S,) * 2)
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MAX_BYTES", 60_000)
    load(folder)  # 46,080 bytes of images, 3,645 of 9x9 and 2,880 of 8x8, which are the oldest
    assert len(files(cache, ".npy")) == 3
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MAX_BYTES", 55_000)
    load(folder, InputSpec(height=7, width=7))
    assert sorted(np.load(path).shape[1] for path in files(cache, ".npy")) == [7, 9, 32]
