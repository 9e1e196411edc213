import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import Dataset, LabeledImages, fingerprint
from cifarx_train.data.image_folder import open_image_files
from tests.support.drawn_images import draw_folder, pack

SPEC = InputSpec(height=32, width=32)
DAY_S = 24 * 3600


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where decoded images are kept; even a few are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cifarx_train.data.decoded_cache._FEWEST_IMAGES", 1)
    return tmp_path / "cache" / "cifarx" / "decoded"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "colours", train=5, test=3)


@pytest.fixture(params=["folder", "archive"])
def source(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    return folder if request.param == "folder" else pack(folder, tmp_path / "colours.tar.gz")


class Reads(NamedTuple):
    """How often an image was decoded."""

    sources: list[object]

    def __call__(self, source: Path | bytes) -> Image.Image:
        self.sources.append(source)
        return read_image(source)

    def count(self) -> int:
        """Since it was last asked."""
        count = len(self.sources)
        self.sources.clear()
        return count


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads([])
    monkeypatch.setattr("cifarx_train.data.image_folder.read_image", reads)
    return reads


def load(path: Path, spec: InputSpec = SPEC) -> LabeledImages:
    return open_image_files(path).load("train", spec)


def files(cache: Path, suffix: str) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix == suffix]


# --- kept and found


def test_what_was_decoded_once_is_mapped_the_second_time(source: Path, cache: Path, reads: Reads) -> None:
    first, second = load(source), load(source)
    assert reads.count() == 15
    assert first.file == second.file == files(cache, ".npy")[0]
    for read in (first, second):
        assert not read.images.flags.writeable
        assert (read.images.shape, read.images.dtype, type(read.images)) == ((15, 32, 32, 3), np.uint8, np.ndarray)
        assert read.labels.dtype == np.int64
        assert read.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert np.array_equal(first.images, second.images)


def test_what_is_kept_is_what_is_decoded_into_memory(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = load(source)
    monkeypatch.setattr("cifarx_train.data.decoded_cache._FEWEST_IMAGES", 1000)
    shutil.rmtree(cache)
    decoded = load(source)
    assert (kept.file is not None, decoded.file) == (True, None)
    assert fingerprint(kept, ("a", "b")) == fingerprint(decoded, ("a", "b"))
    assert not cache.exists()  # a small split is not kept


def test_classes_of_a_kept_archive_need_no_listing(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(folder, tmp_path / "colours.tar.gz")
    load(archive)
    assert cache.exists()
    data = open_image_files(archive)
    monkeypatch.delattr("cifarx_train.data.image_folder.ImageArchiveDataset._read")
    data.load("train", SPEC)
    assert data.class_names == ("blue", "green", "red")


def test_an_archive_is_known_by_its_content(folder: Path, tmp_path: Path, cache: Path, reads: Reads) -> None:
    archive = pack(folder, tmp_path / "colours.tar.gz")
    load(archive)
    moved = archive.rename(tmp_path / "moved.tar.gz")
    os.utime(moved, (0, 0))
    reads.count()
    load(moved)
    assert reads.count() == 0
    assert len(files(cache, ".npy")) == 1


@pytest.mark.parametrize(
    "spec",
    [InputSpec(height=32, width=20), InputSpec(height=20, width=32), InputSpec(height=32, width=32, resize="nearest")],
)
def test_another_size_or_filter_is_another_entry(folder: Path, cache: Path, reads: Reads, spec: InputSpec) -> None:
    load(folder)
    assert load(folder, spec).images.shape[1:3] == (spec.height, spec.width)
    assert reads.count() == 30
    assert len(files(cache, ".npy")) == 2


def test_scaling_makes_no_other_entry(folder: Path, cache: Path) -> None:
    load(folder)
    load(folder, InputSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), value_range=(-1, 1)))
    assert len(files(cache, ".npy")) == 1


def test_another_pillow_decodes_again(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    monkeypatch.setattr("PIL.__version__", "0.0.1")
    load(folder)
    assert len(files(cache, ".npy")) == 2


def _replace(folder: Path) -> None:
    """Another picture with the size and the time of the old one."""
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
def test_any_change_to_the_files_is_seen(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, alter: Callable[[Path], None]
) -> None:
    Image.new("RGB", (32, 32)).save(folder / "train" / "blue" / "0.bmp")
    load(folder)
    time.sleep(0.02)  # longer than a tick of the clock that files are stamped with
    alter(folder)
    data = open_image_files(folder)
    seen = fingerprint(data.load("train", SPEC), data.class_names)
    shutil.rmtree(cache)
    monkeypatch.setattr("cifarx_train.data.decoded_cache._FEWEST_IMAGES", 1000)
    fresh = open_image_files(folder)
    assert seen == fingerprint(fresh.load("train", SPEC), fresh.class_names)


# --- broken images


def test_skipped_images_are_named_again_and_refused_later(
    source: Path, folder: Path, cache: Path, reads: Reads
) -> None:
    broken = folder / "train" / "blue" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-100])
    (folder / "train" / "red" / "2.png").write_bytes(b"")
    if source != folder:
        pack(folder, source)
    with pytest.raises(DataError, match=r"2 broken images in .*train/blue/0\.png .*train/red/2\.png"):
        load(source)
    assert not files(cache, ".npy")
    read: list[LabeledImages] = []
    for _ in range(2):
        with pytest.warns(FallbackWarning, match=r"left out 2 broken images in .*train/blue/0\.png .*train/red/2\.png"):
            read.append(open_image_files(source, "skip").load("train", SPEC))
    assert reads.count() == 30
    for each in read:
        assert each.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4
        assert np.array_equal(each.images[0], np.asarray(Image.open(folder / "train" / "blue" / "1.png")))
        assert np.array_equal(each.images[-1], np.asarray(Image.open(folder / "train" / "red" / "4.png")))
    with pytest.raises(DataError, match=r"2 broken images in .*or use --broken skip"):
        load(source)
    assert reads.count() == 0


# --- damage


@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), suffix=st.sampled_from([".npy", ".record"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_changed_byte_of_a_header_or_record_is_found(
    folder: Path, cache: Path, place: float, change: int, suffix: str
) -> None:
    sound = load(folder).images.copy()
    (damaged,) = files(cache, suffix)
    content = bytearray(damaged.read_bytes())
    content[int(place * (128 if suffix == ".npy" else len(content)))] ^= change
    damaged.write_bytes(content)
    assert np.array_equal(load(folder).images, sound)
    assert np.array_equal(np.load(files(cache, ".npy")[0], allow_pickle=False), sound)


@given(part=st.floats(0, 1, exclude_max=True), suffix=st.sampled_from([".npy", ".record"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_truncated_file_is_made_again(folder: Path, cache: Path, part: float, suffix: str) -> None:
    sound = load(folder).images.copy()
    (cut,) = files(cache, suffix)
    # A new file, as a copy that was cut short leaves it: the old one is mapped still.
    content = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(content[: int(part * len(content))])
    again = load(folder)
    assert np.array_equal(again.images, sound)
    assert again.file is not None


@pytest.mark.parametrize("suffix", [".npy", ".record"])
def test_half_an_entry_is_none(folder: Path, cache: Path, reads: Reads, suffix: str) -> None:
    load(folder)
    files(cache, suffix)[0].unlink()
    load(folder)
    assert reads.count() == 30


def test_images_of_another_shape_are_made_again(folder: Path, cache: Path, reads: Reads) -> None:
    load(folder)
    np.save(files(cache, ".npy")[0], np.zeros((15, 32, 96), np.uint8))
    assert load(folder).images.shape == (15, 32, 32, 3)
    assert reads.count() == 30


# --- no place for it


def falls_back(folder: Path, why: str) -> None:
    with pytest.warns(FallbackWarning, match=f"decoded images are not kept for the next start.*{why}"):
        read = load(folder)
    assert read.file is None
    assert read.images.flags.writeable
    assert len(read) == 15


def test_a_folder_that_cannot_be_made(folder: Path, cache: Path) -> None:
    cache.parents[1].write_text("a file")
    falls_back(folder, "cannot write .*XDG_CACHE_HOME may name another place")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond that."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_fills_up_meanwhile(folder: Path, cache: Path) -> None:
    with file_limit(20_000):
        falls_back(folder, "too large")
    assert list(cache.iterdir()) == []


def test_a_disk_without_enough_space(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = shutil.disk_usage(folder)._replace(free=2 * 15 * 32 * 32 * 3 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: state)
    falls_back(folder, "more than half of the .* GB that are free")
    assert list(cache.iterdir()) == []


def test_without_a_home(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    monkeypatch.setattr(Path, "home", no_home)
    falls_back(folder, "cannot write")
    assert not cache.exists()


def test_the_home_folder_has_it_unless_told_otherwise(
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
import cifarx_train.data.image_folder as image_folder
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import fingerprint

decoded_cache._FEWEST_IMAGES = 1
read = image_folder.read_image
def slowly(source):
    print("reading", flush=True)
    time.sleep(float(sys.argv[2]))
    return read(source)
image_folder.read_image = slowly
data = image_folder.open_image_files(Path(sys.argv[1]))
print(fingerprint(data.load("train", InputSpec(height=32, width=32)), data.class_names))
"""


def start(folder: Path, pause_s: float) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), str(pause_s)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def printed(folder: Path) -> str:
    data: Dataset = open_image_files(folder)
    return fingerprint(data.load("train", SPEC), data.class_names)


def test_processes_that_decode_at_once_all_end_well(source: Path, cache: Path) -> None:
    running = [start(source, 0.02) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert {lines[-1] for lines in outputs} == {printed(source)}
    assert sorted(path.suffix for path in cache.iterdir()) == [".npy", ".record"]


def test_a_killed_process_leaves_nothing_that_is_taken_for_an_entry(folder: Path, cache: Path, reads: Reads) -> None:
    with start(folder, 10) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGKILL)
    (left,) = cache.iterdir()
    assert left.name.startswith(".")
    load(folder)
    assert reads.count() == 15
    assert left.exists()  # it may be another process's, at work
    os.utime(left, (time.time() - 2 * DAY_S,) * 2)
    load(folder, InputSpec(height=8, width=8))
    assert not left.exists()


# --- old entries


def age(cache: Path, days: float) -> set[Path]:
    """Let all entries be that old, and give their files."""
    entries = set(cache.iterdir())
    for path in entries:
        os.utime(path, (time.time() - days * DAY_S,) * 2)
    return entries


def test_entries_not_used_for_long_are_removed_when_one_is_made(folder: Path, cache: Path) -> None:
    load(folder)
    old = age(cache, 31)
    load(folder, InputSpec(height=8, width=8))
    assert not old & set(cache.iterdir())
    assert len(files(cache, ".npy")) == len(files(cache, ".record")) == 1


def test_use_keeps_an_entry(folder: Path, cache: Path) -> None:
    load(folder)
    old = age(cache, 31)
    load(folder)
    load(folder, InputSpec(height=8, width=8))
    assert old < set(cache.iterdir())


def test_beyond_a_total_size_the_longest_unused_goes_first(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, side in ((3, 8), (2, 9)):
        before = set(cache.iterdir()) if cache.exists() else set()
        load(folder, InputSpec(height=side, width=side))
        for path in set(cache.iterdir()) - before:
            os.utime(path, (time.time() - days * DAY_S,) * 2)
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MOST_BYTES", 60_000)
    load(folder)  # 46,080 bytes of images, 3,645 of 9x9 and 2,880 of 8x8, which are the oldest
    assert len(files(cache, ".npy")) == 3
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MOST_BYTES", 55_000)
    load(folder, InputSpec(height=7, width=7))
    assert sorted(np.load(path).shape[1] for path in files(cache, ".npy")) == [7, 9, 32]
