import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifarx_serve.errors import CifarxError, FallbackWarning
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import Split
from cifarx_train.data.selection import DataSource, select_dataset
from cifarx_train.data.webdataset import is_webdataset

SPEC = InputSpec(height=8, width=8)
COLORS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), COLORS[color]).save(file, "PNG")
    return file.getvalue()


def write(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(labels: Iterable[int], *, folder: str = "", start: int = 0) -> list[tuple[str, bytes]]:
    files = []
    for number, label in enumerate(labels, start):
        files += [(f"{folder}{number:06d}.png", png(label % 3)), (f"{folder}{number:06d}.cls", str(label).encode())]
    return files


def counts(
    data: Path, split: float | None = None, class_names: tuple[str, ...] = ("0", "1", "2")
) -> dict[Split, list[int]]:
    """Return the number of images of each class, all of which have its color."""
    dataset = select_dataset(DataSource(str(data), split))
    assert dataset.class_names == class_names
    found: dict[Split, list[int]] = {}
    for name in dataset.splits:
        loaded = dataset.load(name, SPEC)
        assert (loaded.images[:, 4, 4] == np.array(COLORS)[loaded.labels % 3]).all()
        found[name] = np.bincount(loaded.labels, minlength=len(class_names)).tolist()
    return found


TRAIN = [0, 1, 2] * 4


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-{:06d}.tar", "test-{:06d}.tar"),
        ("shards/train-{:06d}.tar.gz", "shards/val-{:06d}.tar.gz"),
        ("train/{:05d}.tar", "validation/{:05d}.tar"),
    ],
)
def test_shards_of_splits(tmp_path: Path, train: str, test: str) -> None:
    for number in range(2):
        write(tmp_path / "wds" / train.format(number), samples(TRAIN[6 * number : 6 * number + 6], start=6 * number))
    write(tmp_path / "wds" / test.format(0), samples([2, 1, 0, 0], folder="sub/"))
    (tmp_path / "wds" / "README.md").touch()
    with pytest.warns(FallbackWarning, match=r"left out 1 file of wds: 1 \.md"):
        assert counts(tmp_path / "wds") == {"train": [4, 4, 4], "test": [2, 1, 1]}


def test_one_shard(tmp_path: Path) -> None:
    shard = write(tmp_path / "train.tar", samples(TRAIN))
    with pytest.raises(
        CifarxError, match=r"3 classes with images \(0, 1, 2\), but no test images \(found train\.tar\)"
    ):
        counts(shard)
    found = counts(shard, 0.25)
    assert found == {"train": [3, 3, 3], "test": [1, 1, 1]}


def test_labels_are_sorted_by_number(tmp_path: Path) -> None:
    shard = write(tmp_path / "all.tar", samples(list(range(12)) * 2))
    counts(shard, 0.5, tuple(str(number) for number in range(12)))


@pytest.mark.parametrize("key", ["label", "cls", "class_name"])
@pytest.mark.parametrize("label", [1, "ant"])
def test_labels_in_json(tmp_path: Path, key: str, label: int | str) -> None:
    files = []
    for number in range(8):
        document = json.dumps({"width": 8, key: label if number % 2 else "0"}).encode()
        files += [(f"{number}.json", document), (f"{number}.png", png(number % 2))]
    dataset = select_dataset(DataSource(str(write(tmp_path / "all.tar", files)), 0.25))
    assert dataset.class_names == ("0", str(label))
    loaded = dataset.load("train", SPEC)
    assert (loaded.images[:, 4, 4] == np.array(COLORS)[loaded.labels]).all()
    assert np.bincount(loaded.labels).tolist() == [3, 3]


def test_a_label_without_training_images(tmp_path: Path) -> None:
    write(tmp_path / "wds" / "train-0.tar", samples([0, 1] * 4))
    write(tmp_path / "wds" / "test-0.tar", samples([0, 1, 2]))
    with pytest.raises(CifarxError, match=r"1 class in the test split without training images \(2\)"):
        counts(tmp_path / "wds")


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    files = [*samples(TRAIN), ("x.png", png(0)), ("000000.txt", b"a caption"), ("000001.json", b"[" * 100_000)]
    shard = write(tmp_path / "all.tar", files)
    with pytest.warns(FallbackWarning) as caught:
        assert counts(shard, 0.25)["test"] == [1, 1, 1]
    assert [str(warning.message) for warning in caught] == [
        "left out 3 files of all.tar: 2 that are neither an image nor a label (all.tar#000000.txt), "
        "1 without a label (all.tar#x.png)"
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([("1.png", b""), ("1.cls", b"0")], True),
        ([("a/1.jpg", b""), ("a/1.cls", b"0")], True),
        ([("1.jpg", b""), ("1.json", b"{}")], True),
        ([("train/ant/1.jpg", b""), ("train/ant/1.json", b"{}")], False),  # of a tool for annotation
        ([("train/ant/1.jpg", b""), ("train/ant/2.jpg", b"")], False),
        ([("1.jpg", b""), ("2.cls", b"0")], False),
    ],
)
def test_shards_are_told_from_other_archives(tmp_path: Path, files: list[tuple[str, bytes]], expected: bool) -> None:
    assert is_webdataset(write(tmp_path / "x.tar", files)) == expected


def test_a_damaged_shard(tmp_path: Path) -> None:
    write(tmp_path / "wds" / "test-0.tar", samples(TRAIN))
    shard = write(tmp_path / "wds" / "train-0.tar.gz", samples(TRAIN * 20))
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(CifarxError, match=r"train-0\.tar\.gz is truncated or damaged"):
        counts(tmp_path / "wds")


def test_the_shards_are_in_the_key_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MIN_IMAGES", 1)
    shard = write(tmp_path / "all.tar", samples(TRAIN))
    first, second = (select_dataset(DataSource(str(shard), 0.25)).load("train", SPEC) for _ in range(2))
    assert first.file == second.file is not None
    write(shard, samples(TRAIN[::-1]))
    third = select_dataset(DataSource(str(shard), 0.25)).load("train", SPEC)
    assert third.file != first.file
