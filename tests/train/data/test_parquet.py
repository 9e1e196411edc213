import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifarx_serve.errors import CifarxError, DataError, FallbackWarning
from cifarx_serve.spec import InputSpec
from cifarx_train.data.catalog import Entry
from cifarx_train.data.dataset import Split
from cifarx_train.data.parquet import ParquetStore
from cifarx_train.data.selection import DataSource, select_dataset
from cifarx_train.data.splits import Fraction

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SPEC = InputSpec(height=8, width=8)
NAMES = ("zebra", "ant", "bee")  # Hugging Face's labels need not be sorted
COLORS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), COLORS[color]).save(file, "PNG")
    return file.getvalue()


def write(
    path: Path,
    labels: Sequence[Any],
    *,
    names: Sequence[str] | None = NAMES,
    image: str = "image",
    label: str = "label",
    struct: bool = True,
    row_group_size: int = 4,
) -> Path:
    """Write images whose colors are their labels modulo 3, in the way of Hugging Face's datasets."""
    contents = [png(NAMES.index(each) if isinstance(each, str) else (each or 0) % 3) for each in labels]
    images = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(contents)] if struct else contents
    table = pyarrow.table({"extra": [0.5] * len(labels), image: images, label: labels})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def counts(data: DataSource | Path, class_names: tuple[str, ...] = NAMES) -> dict[Split, list[int]]:
    """Return the number of images of each class, all of which have its color."""
    dataset = select_dataset(data if isinstance(data, DataSource) else DataSource(str(data)))
    assert dataset.class_names == class_names
    found: dict[Split, list[int]] = {}
    for split in dataset.splits:
        loaded = dataset.load(split, SPEC)
        colors = [NAMES.index(name) if name in NAMES else int(name) for name in class_names]
        assert (loaded.images[:, 4, 4] == np.array(COLORS)[colors][loaded.labels]).all()
        found[split] = np.bincount(loaded.labels, minlength=len(class_names)).tolist()
    return found


TRAIN, TEST = [0, 1, 2] * 4, [2, 1, 0, 0]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train.parquet", "Validation.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("plain_text/train-00000-of-00001.parquet", "plain_text/valid-00000-of-00001.parquet"),
    ],
)
def test_files_of_splits(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path / "hf" / train, TRAIN)
    write(tmp_path / "hf" / test, TEST)
    assert counts(tmp_path / "hf") == {"train": [4, 4, 4], "test": [2, 1, 1]}


def test_the_order_is_that_of_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "hf" / "train-00001-of-00002.parquet", [2, 2])
    write(tmp_path / "hf" / "train-00000-of-00002.parquet", [1, 0, 2, 0, 1])
    write(tmp_path / "hf" / "test.parquet", TEST)
    data = select_dataset(str(tmp_path / "hf"))
    assert data.load("train", SPEC).labels.tolist() == [1, 0, 2, 0, 1, 2, 2]
    assert [picture.label for picture in data.sample("train", 3)] == [1, 0, 2]


@pytest.mark.parametrize(
    ("labels", "options", "names"),
    [
        (TRAIN, {"names": None}, ("0", "1", "2")),
        (["bee", "ant", "zebra"] * 4, {"names": None}, ("ant", "bee", "zebra")),
        (TRAIN, {"struct": False, "image": "img", "label": "fine_label"}, NAMES),
        (TRAIN, {"names": None, "struct": False, "image": "bytes", "label": "class"}, ("0", "1", "2")),
    ],
    ids=["numbers", "strings", "bytes", "no metadata"],
)
def test_columns(tmp_path: Path, labels: list[Any], options: dict[str, Any], names: tuple[str, ...]) -> None:
    file = write(tmp_path / "all.parquet", labels, **options)
    found = counts(DataSource(str(file), 0.25), names)
    assert [sum(both) for both in zip(*found.values(), strict=True)] == [4, 4, 4]
    assert found["test"] == [1, 1, 1]


def test_rows_without_a_label_are_counted(tmp_path: Path) -> None:
    """Hugging Face's test splits without labels have the label -1."""
    write(tmp_path / "hf" / "train.parquet", [*TRAIN, None])
    write(tmp_path / "hf" / "validation.parquet", TEST)
    write(tmp_path / "hf" / "test.parquet", [-1] * 5)
    (tmp_path / "hf" / "README.md").touch()
    with pytest.warns(FallbackWarning) as caught:
        assert counts(tmp_path / "hf") == {"train": [4, 4, 4], "test": [2, 1, 1]}
    assert [str(warning.message) for warning in caught] == [
        "left out 1 file of hf: 1 .md",
        "left out 6 rows of hf: 6 without a label (test.parquet#0)",
    ]


def test_names_of_classes_without_images_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "hf" / "train.parquet", [0, 2] * 3)
    write(tmp_path / "hf" / "test.parquet", [0, 2])
    with pytest.warns(FallbackWarning) as caught:
        assert counts(tmp_path / "hf") == {"train": [3, 0, 3], "test": [1, 0, 1]}
    assert [str(warning.message) for warning in caught] == [
        f"the {split} split has no images of 1 class: ant" for split in ("train", "test")
    ]


def test_broken_images_are_named_by_file_and_row(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [png(0), b"", None, png(1)], "label": [0, 0, 1, 1]})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table.slice(0, 4), tmp_path / "test.parquet")
    with pytest.raises(
        DataError, match=r"2 broken images .*: train\.parquet#1 \(not an image\), train\.parquet#2 \(not"
    ):
        select_dataset(str(tmp_path)).load("train", SPEC)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label": [0, 1]},
            r"no column of images in all\.parquet, which has the columns label \(int64\) .*: call it image",
        ),
        ({"image": [b"", b""]}, r"no column of labels in all\.parquet, which has the columns image \(binary\)"),
        ({"image": [b"", b""], "label": [[0], [1]]}, r"has list<.*> in column label of all\.parquet"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    pq.write_table(pyarrow.table(columns), tmp_path / "all.parquet")
    with pytest.raises(CifarxError, match=message):
        counts(DataSource(str(tmp_path / "all.parquet"), 0.5))


def test_a_label_without_a_name(tmp_path: Path) -> None:
    file = write(tmp_path / "all.parquet", [0, 1, 2, 3])
    with pytest.raises(CifarxError, match=r"has the label 3 in row all\.parquet#3, which has no name"):
        counts(DataSource(str(file), 0.5))


def test_several_datasets(tmp_path: Path) -> None:
    for name in ("large", "small"):
        write(tmp_path / "hf" / name / "train.parquet", TRAIN)
    with pytest.raises(CifarxError, match=r"has 2 datasets \(large, small\) .*: give one of them: --data .*/hf/large"):
        counts(tmp_path / "hf")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "all.parquet").write_bytes(content)
    with pytest.raises(CifarxError, match=r"all\.parquet is truncated or damaged .*: copy or download it again"):
        counts(tmp_path / "all.parquet")


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "all.parquet", TRAIN)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(CifarxError, match=r"needs pyarrow to read Parquet files: install 'cifarx\[parquet\]'"):
        counts(file)


def test_only_the_groups_with_chosen_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "all.parquet", TRAIN * 20, row_group_size=10)
    groups: list[int] = []

    iter_batches = pq.ParquetFile.iter_batches

    def spy(file: Any, *args: Any, **options: Any) -> Any:
        groups.extend(options.get("row_groups", ()))
        return iter_batches(file, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    store = ParquetStore(file, None)
    entries = [entry for entry in _all_entries(store) if entry.path in ("all.parquet#15", "all.parquet#239")]
    assert len(dict(store.read(entries))) == 2
    assert groups == [1, 23]


def _all_entries(store: ParquetStore) -> list[Entry]:
    catalog = ParquetStore(store.path, Fraction(0.2)).catalog()
    return [entry for entries in catalog.splits.values() for entry in entries]


@pytest.mark.slow
def test_a_large_file_is_not_in_memory_at_once(tmp_path: Path) -> None:
    """One row group of 240 MB, of which 64 images are in memory at a time."""
    rng = np.random.default_rng(0)
    contents = [png(row % 3) + rng.bytes(1_000_000) for row in range(240)]  # trailing bytes are ignored
    table = pyarrow.table({"image": contents, "label": [row % 3 for row in range(240)]})
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=1000, compression="none")
    program = f"""
import resource
import pyarrow.parquet
from pathlib import Path
from cifarx_serve.spec import InputSpec
from cifarx_train.data.selection import DataSource, select_dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
select_dataset(DataSource({str(tmp_path / "all.parquet")!r}, 0.2)).load("train", InputSpec(height=8, width=8))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 200_000  # KiB
