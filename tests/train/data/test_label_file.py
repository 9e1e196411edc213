from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifarx_serve.errors import CifarxError, FallbackWarning
from cifarx_serve.spec import DataRecord, InputSpec
from cifarx_train.data.dataset import Dataset, Split
from cifarx_train.data.selection import DataSource, select_dataset, select_dataset_for_model
from tests.support.image_datasets import pack_archive

SPEC = InputSpec(height=8, width=8)
COLORS = {"ant": (200, 40, 40), "bee": (40, 200, 40)}
NAMES = [f"{number:02d}" for number in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in one folder, of which every second is red and the others are green."""
    images = tmp_path / "set" / "images"
    images.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", (8, 8), list(COLORS.values())[number % 2]).save(images / f"{name}.png")
    return images.parent


def label(number: int) -> str:
    return list(COLORS)[number % 2]


def rows(template: str) -> str:
    """Return a line for each image. The fields are name, label and split."""
    return "".join(
        template.format(name=name, label=label(number), split=["train", "Test", "valid"][number // 2 % 3]) + "\n"
        for number, name in enumerate(NAMES)
    )


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def counts(data: Dataset) -> dict[Split, list[int]]:
    """Return the number of images of each class, all of which have its color."""
    found: dict[Split, list[int]] = {}
    for split in data.splits:
        loaded = data.load(split, SPEC)
        assert (loaded.images[:, 4, 4] == np.array(list(COLORS.values()))[loaded.labels]).all()
        found[split] = np.bincount(loaded.labels, minlength=2).tolist()
    return found


@pytest.mark.parametrize(
    "text",
    [
        rows("images/{name}.png,{label}"),
        "path,label\n" + rows("images/{name}.png,{label}"),
        "label,path\n" + rows("{label},images/{name}.png"),
        "id,breed\n" + rows("{name},{label}"),
        "image_id;category;author\n" + rows("{name}.png;{label};me"),
        "filename\twidth\tclass\n" + rows("{name}.png\t8\t{label}"),
        "\ufeffImage,Target\n\n" + rows('"./images/{name}.png"," {label} "'),
        "image,label\n" + rows("images\\{name}.png,{label}"),
        "file_name,label\n" + rows("{name}.png,{label}").replace("\n", "\r\n"),
    ],
)
def test_formats(folder: Path, text: str) -> None:
    labels = write(folder.parent / "labels.csv", text)
    data = select_dataset(DataSource(str(folder), 0.2, labels))
    assert data.class_names == ("ant", "bee")
    assert (data.labels, data.split_fraction) == ("labels.csv", 0.2)
    assert counts(data) == {"train": [4, 4], "test": [1, 1]}
    assert data.left_out == ()


def test_paths_relative_to_the_file(folder: Path) -> None:
    labels = write(folder / "images" / "labels.csv", rows("../images/{name}.png,{label}"))
    with pytest.warns(FallbackWarning, match=r"left out 1 file of set: 1 \.csv"):
        assert counts(select_dataset(DataSource(str(folder), 0.2, labels))) == {"train": [4, 4], "test": [1, 1]}


def test_images_in_an_archive(folder: Path) -> None:
    labels = write(folder.parent / "labels.csv", "id,label\n" + rows("{name},{label}"))
    archive = pack_archive(folder, folder.parent / "set.tar.gz", "set")
    data = select_dataset(DataSource(str(archive), 0.2, labels))
    assert counts(data) == {"train": [4, 4], "test": [1, 1]}


def test_a_column_of_splits(folder: Path) -> None:
    labels = write(folder.parent / "labels.csv", "path,label,split\n" + rows("{name}.png,{label},{split}"))
    data = select_dataset(DataSource(str(folder), labels=labels))
    assert counts(data) == {"train": [2, 2], "val": [1, 1], "test": [2, 2]}
    assert [picture.label for picture in data.sample("train", 9)] == [0, 1, 0, 1]  # the order of the file


def test_splits_by_the_first_folder(folder: Path) -> None:
    (folder / "images").rename(folder / "train")
    (folder / "test").mkdir()
    for name in NAMES[6:]:
        (folder / "train" / f"{name}.png").rename(folder / "test" / f"{name}.png")
    labels = write(folder.parent / "labels.csv", "id,label\n" + rows("{name},{label}"))
    assert counts(select_dataset(DataSource(str(folder), labels=labels))) == {"train": [3, 3], "test": [2, 2]}


def test_a_competition(folder: Path) -> None:
    """The test images have no labels, and the same names as some training images."""
    (folder / "images").rename(folder / "train")
    (folder / "test").mkdir()
    for name in NAMES[:4]:
        Image.new("RGB", (8, 8)).save(folder / "test" / f"{name}.png")
    labels = write(folder / "train_labels.csv", "id,label\n" + rows("{name},{label}"))
    with pytest.raises(CifarxError, match=r"has 2 classes with images \(ant, bee\), but no test images .*--split 0\.2"):
        counts(select_dataset(DataSource(str(folder), labels=labels)))
    with pytest.warns(FallbackWarning, match=r"5 files of set: 1 \.csv, 4 without a label in train_labels\.csv"):
        assert counts(select_dataset(DataSource(str(folder), 0.2, labels))) == {"train": [4, 4], "test": [1, 1]}


def test_what_is_left_out_is_counted(folder: Path) -> None:
    text = "id,label\n" + rows("{name},{label}").replace("09,bee\n", "09,\n") + "99,ant\n../../secret,ant\n00,ant\n"
    data = select_dataset(DataSource(str(folder), 0.2, write(folder.parent / "labels.csv", text)))
    with pytest.warns(FallbackWarning):
        assert sum(counts(data)["train"]) == 7
    assert data.left_out == (
        "left out 1 file of set: 1 without a label in labels.csv (images/09.png)",
        "left out 3 rows of set: 1 without a label (labels.csv, row 11), 2 without an image (99)",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "labels.csv is empty"),
        ("id,healthy,rust,scab\n00,1,0,0\n", "no known column of labels among healthy, id, rust, scab"),
        ("label,x,y\nant,1,2\n", "no known column of paths among label, x, y"),
        ("x.png,ant\ny.png,bee\n", r"set has no image of .*labels\.csv, whose first path is x\.png"),
        ("id,label\n", "set has no labels in"),
        ("id,label\n00,ant\n00,bee\n", r"has an image with the labels ant and bee in labels\.csv, row 3"),
        ("id,label\n00,ant\n01,ant\n", r"has 1 class with training images \(ant\)"),
    ],
)
def test_files_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    labels = write(folder.parent / "labels.csv", text)
    with pytest.raises(CifarxError, match=message):
        counts(select_dataset(DataSource(str(folder), 0.2, labels)))


def test_names_that_mean_several_images(folder: Path) -> None:
    (folder / "more").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "more" / "00.png")
    labels = write(folder.parent / "labels.csv", "id,label\n" + rows("{name},{label}"))
    match = r"has 2 images that labels\.csv, row 2 can mean \(images/00\.png, more/00\.png\) .*: give the paths"
    with pytest.raises(CifarxError, match=match):
        counts(select_dataset(DataSource(str(folder), 0.2, labels)))


def test_a_missing_file(folder: Path) -> None:
    with pytest.raises(CifarxError, match=r"cannot read .*nowhere\.csv \(No such file or directory\): check --labels"):
        select_dataset(DataSource(str(folder), labels=folder / "nowhere.csv"))


@pytest.mark.parametrize("data", ["builtin", "cifar10", "auto"])
def test_data_that_has_labels(folder: Path, data: str) -> None:
    labels = write(folder.parent / "labels.csv", rows("{name},{label}"))
    with pytest.raises(CifarxError, match=rf"--labels .* does not apply to --data {data}: "):
        select_dataset(DataSource(data, labels=labels))


def test_another_label_is_another_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels are a part of the key of the cache."""
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MIN_IMAGES", 1)
    labels = write(folder.parent / "labels.csv", "id,label\n" + rows("{name},{label}"))
    before = select_dataset(DataSource(str(folder), 0.2, labels)).load("train", SPEC)
    write(labels, labels.read_text().replace("ant", "zebra"))
    data = select_dataset(DataSource(str(folder), 0.2, labels))
    assert data.load("train", SPEC).file != before.file
    assert data.class_names == ("bee", "zebra")


def test_images_of_a_model_are_labeled_and_split_as_for_its_training(folder: Path) -> None:
    record = DataRecord(
        name="set",
        kind="folder",
        train_images=8,
        test_images=2,
        train_fingerprint="0" * 64,
        test_fingerprint="1" * 64,
        split_fraction=0.2,
        labels="labels.csv",
    )
    write(folder.parent / "labels.csv", "id,label\n" + rows("{name},{label}"))
    assert counts(select_dataset_for_model(record, str(folder))) == {"train": [4, 4], "test": [1, 1]}
    half = select_dataset_for_model(record, DataSource(str(folder), 0.5))
    assert sum(counts(half)["test"]) >= 4
