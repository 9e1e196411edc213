"""Images in Parquet files, as Hugging Face's image datasets are stored: a column of image files, and one of labels.

The files are read in parts, by pyarrow.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cifarx_serve.errors import DataError, error_message
from cifarx_train.data.catalog import Catalog, Entry
from cifarx_train.data.dataset import Split
from cifarx_train.data.folder import digest_of_files, take_inventory
from cifarx_train.data.inventory import Inventory, listed
from cifarx_train.data.splits import Fraction, assign_splits_of_files, split_of, split_of_file
from cifarx_train.data.store import ImageStore

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SUFFIX: Final = ".parquet"
_ROWS: Final = 64  # rows in memory at a time
_BUFFER: Final = 1 << 20  # bytes read at a time
_IMAGE_NAMES: Final = ("image", "img", "images", "image_bytes", "bytes", "jpg", "png")
_LABEL_NAMES: Final = ("label", "labels", "class", "category", "target")


class _Columns(NamedTuple):
    """The columns that are read.

    Attributes:
        image: the path of the column with the content of the image files.
        label: the name of the column with the labels.
        names: the names of the labels 0, 1, 2, …; None if the labels are names.
    """

    image: str
    label: str
    names: tuple[str, ...] | None


class ParquetStore(ImageStore):
    """The images in the Parquet files of a folder, or in one file.

    Args:
        path: the folder or file.
        fraction: the part of the images to hold out, if any.
    """

    def __init__(self, path: Path, fraction: Fraction | None) -> None:
        super().__init__(path)
        self._fraction = fraction
        self._root = path if path.is_dir() else path.parent

    def catalog(self) -> Catalog:
        inventory, files = self._inventory, self._files
        for name in inventory.images:
            inventory.leave_out("beside the Parquet files", name)
        names: tuple[str, ...] | None = None
        found: dict[Split | None, list[Entry]] = {}
        for file in files:
            with self._open(file) as table:
                columns = _find_columns(table, file, inventory)
                if names is not None and columns.names != names:
                    raise inventory.error(f"has other class names in {file}", "give files of one dataset")
                names = columns.names
                split = split_of_file(file) if self.path.is_dir() else None
                found.setdefault(split, []).extend(_list_rows(table, file, columns, inventory))
        return assign_splits_of_files(found, self._fraction, inventory, "files", names, unit="rows")

    def identity(self, split: Split, catalog: Callable[[], Catalog]) -> object:
        files = sorted({entry.path.rpartition("#")[0] for entry in catalog().splits[split]})
        digest = digest_of_files(self._root, ((repr(file), file) for file in files))
        return ("parquet", str(self.path.resolve()), catalog().class_names, digest)

    def read(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Path | bytes]]:
        wanted: dict[str, dict[int, Entry]] = {}
        for entry in entries:
            file, _, row = entry.path.rpartition("#")
            wanted.setdefault(file, {})[int(row)] = entry
        for file, rows in wanted.items():
            with self._open(file) as table:
                image = _find_columns(table, file, self._inventory).image
                for number, content in _read_rows(table, image, rows):
                    yield rows[number], content

    @cached_property
    def _inventory(self) -> Inventory:
        if self.path.is_dir():
            return take_inventory(self.path)
        inventory = Inventory(self.path)
        inventory.add(self.path.name)
        return inventory

    @cached_property
    def _files(self) -> list[str]:
        files = self._inventory.take((SUFFIX,))
        datasets = {"/".join(part for part in file.split("/")[:-1] if not split_of(part)) for file in files}
        if len(datasets) > 1:
            raise self._inventory.error(
                f"has {len(datasets)} datasets ({listed(datasets)})",
                f"give one of them: --data {self._root / min(datasets)}",
            )
        return files

    @contextmanager
    def _open(self, file: str) -> Iterator["ParquetFile"]:
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ModuleNotFoundError as error:
            raise DataError(f"{self.path} needs pyarrow to read Parquet files", "install 'cifarx[parquet]'") from error
        path = self._root / file
        try:
            # Without pre-buffering, a row group is not in memory at once.
            with ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as table:
                yield table
        except (OSError, pyarrow.ArrowException) as error:
            problem = f"{path} is truncated or damaged ({error_message(error)})"
            raise DataError(problem, "copy or download it again") from error


def _find_columns(table: "ParquetFile", file: str, inventory: Inventory) -> _Columns:
    """Return the columns of images and labels, by the features that Hugging Face stores, or by type and name."""
    schema = table.schema_arrow
    features = _features(schema.metadata or {})
    columns = {field.name: str(field.type) for field in schema}
    images = [name for name in columns if features.get(name, {}).get("_type") == "Image"]
    images = images or [name for name, type_ in columns.items() if _is_image_type(name, type_)]
    labels = [name for name in columns if features.get(name, {}).get("_type") == "ClassLabel"]
    labels = labels or [name for name in _LABEL_NAMES if name in columns]
    text = ", ".join(f"{name} ({type_})" for name, type_ in columns.items())
    if not images or not labels:
        missing = "images" if not images else "labels"
        raise inventory.error(
            f"has no column of {missing} in {file}, which has the columns {text}",
            "call it image, with bytes of image files" if not images else "call it label",
        )
    image, label = images[0], "label" if "label" in labels else labels[0]
    if not _is_label_type(columns[label]):
        raise inventory.error(f"has {columns[label]} in column {label} of {file}", "give one label per image")
    names = features.get(label, {}).get("names")
    return _Columns(
        f"{image}.bytes" if columns[image].startswith("struct") else image, label, tuple(names) if names else None
    )


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Return the features of the columns in Hugging Face's metadata, or nothing if there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _is_image_type(name: str, type_: str) -> bool:
    if type_.startswith("struct"):
        return "bytes: binary" in type_ or "bytes: large_binary" in type_
    return type_ in ("binary", "large_binary") and name.lower() in _IMAGE_NAMES


def _is_label_type(type_: str) -> bool:
    return "string" in type_ or type_.startswith(("int", "uint"))


def _list_rows(table: "ParquetFile", file: str, columns: _Columns, inventory: Inventory) -> Iterator[Entry]:
    row = 0
    for batch in table.iter_batches(columns=[columns.label]):
        for label in batch.column(0).to_pylist():
            path = f"{file}#{row}"
            row += 1
            if label is None or label in (-1, ""):
                inventory.leave_out("without a label", path, unit="rows")
            elif columns.names is None:
                yield Entry(str(label), path, path)
            elif isinstance(label, int) and label < len(columns.names):
                yield Entry(columns.names[label], path, path)
            else:
                raise inventory.error(f"has the label {label} in row {path}, which has no name", "correct the file")


def _read_rows(table: "ParquetFile", column: str, rows: dict[int, Entry]) -> Iterator[tuple[int, bytes]]:
    """Yield the images of these rows. Groups of rows without any of them are not read."""
    start = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        position, start = start, start + count
        if not any(row in rows for row in range(position, start)):
            continue
        for batch in table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column]):
            images = batch.column(0)
            images = images.field("bytes") if column.endswith(".bytes") else images
            for offset, image in enumerate(images):
                if position + offset in rows:
                    yield position + offset, image.as_py() or b""
            position += len(images)
