"""Datasets of image files, wherever they are stored."""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Final

from cifarx_serve.errors import DataError, FallbackWarning, ImageError
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.cpus import available_cpus
from cifarx_serve.system.prefetch import batched, prefetch
from cifarx_serve.system.terminal import encodable
from cifarx_train.data import decoded_cache
from cifarx_train.data.archives import ArchiveStore, require_archive
from cifarx_train.data.catalog import Catalog, Entry
from cifarx_train.data.dataset import Dataset, LabeledImages, OnError, Picture, Split, evenly_spaced
from cifarx_train.data.decoded_cache import BrokenImage, DecodedSplit, ImageBuffer
from cifarx_train.data.folder import FolderStore, list_files
from cifarx_train.data.inventory import Inventory
from cifarx_train.data.label_file import LabelFile
from cifarx_train.data.layout import arrange_folders
from cifarx_train.data.parquet import SUFFIX as PARQUET_SUFFIX
from cifarx_train.data.parquet import ParquetStore
from cifarx_train.data.splits import LAYOUT, Fraction
from cifarx_train.data.store import ImageStore
from cifarx_train.data.webdataset import SHARD_SUFFIXES, WebDatasetStore, is_webdataset

_BATCH_SIZE: Final = 32  # images that a thread decodes at a time
_MAX_LISTED: Final = 5  # broken images that a message lists


class ImageFileDataset(Dataset):
    """A dataset of image files.

    Args:
        store: where the files are, and which split and class each belongs to.
        on_error: "raise" a `DataError` for a file that cannot be read as an image, or "skip" it with a warning.
        fraction: the part of the images to hold out as the test split, if any.
        labels: the file with the labels, if they are not the names of folders.
    """

    kind = "folder"

    def __init__(
        self,
        store: ImageStore,
        on_error: OnError = "raise",
        fraction: Fraction | None = None,
        labels: LabelFile | None = None,
    ) -> None:
        self.store = store
        self.path = store.path
        self.on_error = on_error
        self.name = encodable(Path(os.path.abspath(store.path)).name)  # noqa: PTH100 - unlike resolve(), this keeps the name of a symbolic link
        self.split_fraction = fraction.value if fraction else None
        self.labels = encodable(labels.path.name) if labels else None
        self._labels = labels
        self._noted: set[str] = set()

    @cached_property
    def _catalog(self) -> Catalog:
        return self.store.catalog()

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return self._catalog.class_names

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._catalog.splits)

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        return self._catalog.left_out

    def sample(self, split: Split, count: int) -> list[Picture]:
        label = {name: index for index, name in enumerate(self.class_names)}
        entries = self._catalog.splits[split]
        chosen = [entries[position] for position in evenly_spaced(len(entries), count)]
        contents = dict(self.store.read(chosen))
        self._note_left_out()
        return [Picture(contents[entry], label[entry.class_name]) for entry in chosen]

    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        """Read a split from the cache, or decode it. A FallbackWarning says what of the dataset is left out.

        With `on_error="skip"`, files that cannot be read are skipped, and a FallbackWarning lists them.

        Raises:
            DataError: the layout is wrong, an image is broken (with `on_error="raise"`), all images of a class are
                broken, or the files changed during reading.
        """
        identity = self._identity(split)
        key = decoded_cache.cache_key((split, *identity), spec)
        cached = decoded_cache.find(key, spec)
        if cached and cached[1].splits:  # earlier versions wrote none, and did not find all images
            images, decoded = cached
            self.class_names, self.splits, self.left_out = decoded.class_names, decoded.splits, decoded.left_out
            self._note_left_out()
            self._check_broken(decoded)
        else:
            self._note_left_out()  # before an error about broken images
            count = len(self._catalog.splits[split])
            images, _ = decoded_cache.decode(key, count, spec, partial(self._decode, split, spec, identity))
        return images

    def _identity(self, split: Split) -> tuple[object, ...]:
        identity = self.store.identity(split, lambda: self._catalog)
        if self.split_fraction is None and self._labels is None:
            return (identity,)
        return identity, self.split_fraction, self._labels.sha256 if self._labels else None

    def _decode(self, split: Split, spec: InputSpec, identity: object, buffer: ImageBuffer) -> DecodedSplit:
        catalog = self._catalog
        entries = catalog.splits[split]
        positions = {entry: position for position, entry in enumerate(entries)}
        broken: dict[int, BrokenImage] = {}

        def decode(entry: Entry, content: Path | bytes) -> None:
            try:
                buffer.write(positions[entry], resize(read_image(content), spec))
            except ImageError as error:
                # The message starts with the path or the size of the content, but a file in an archive has a name.
                subject = str(content) if isinstance(content, Path) else f"{len(content)} bytes"
                reason = error.problem.removeprefix(f"{subject} is ")
                broken[positions[entry]] = BrokenImage(encodable(entry.path), encodable(reason))

        _for_each_in_threads(decode, self.store.read(entries))
        if self._identity(split) != identity:
            raise DataError(f"{self.path} changed while it was read", "run it again when all files are complete")
        label = {name: index for index, name in enumerate(catalog.class_names)}
        labels = [label[entry.class_name] for position, entry in enumerate(entries) if position not in broken]
        errors = [broken[position] for position in sorted(broken)]
        decoded = DecodedSplit(
            catalog.class_names, labels, errors, splits=tuple(catalog.splits), left_out=catalog.left_out
        )
        remaining = {catalog.class_names[each] for each in set(labels)}
        if emptied := sorted({entry.class_name for entry in entries} - remaining):
            problem = f"{_describe_broken(errors, self.path)}; no images are left in class {', '.join(emptied)}"
            raise DataError(problem, "repair them")
        self._check_broken(decoded)
        buffer.close_gaps(set(broken), len(entries))
        return decoded

    def _check_broken(self, decoded: DecodedSplit) -> None:
        """Raise a DataError for broken images, or warn that they are skipped."""
        if not decoded.broken:
            return
        problem = _describe_broken(decoded.broken, self.path)
        if self.on_error == "raise":
            raise DataError(problem, "repair or remove them, or use --on-error skip")
        warnings.warn(f"skipped {problem}", FallbackWarning, stacklevel=3)

    def _note_left_out(self) -> None:
        """Warn once of what of the dataset is left out."""
        for line in self.left_out:
            if line not in self._noted:
                self._noted.add(line)
                warnings.warn(line, FallbackWarning, stacklevel=3)


def _describe_broken(broken: list[BrokenImage], path: Path) -> str:
    listed = ", ".join(f"{image.file} ({image.reason})" for image in broken[:_MAX_LISTED])
    more = ", …" if len(broken) > _MAX_LISTED else ""
    count = "1 broken image" if len(broken) == 1 else f"{len(broken):,} broken images"
    return f"{count} in {path}: {listed}{more}"


def open_image_dataset(
    path: Path, on_error: OnError = "raise", fraction: Fraction | None = None, labels: LabelFile | None = None
) -> Dataset:
    """Open a folder, an archive, a Parquet file or a WebDataset shard, or a folder of such files or shards.

    Args:
        path: the folder or file.
        on_error: "raise" a `DataError` for files that cannot be read as images, or "skip" them with a warning.
        fraction: the part of the images to hold out as the test split, if they are not split.
        labels: the labels of the images, if they are not the names of folders.

    Raises:
        DataError: the path is none of these.
    """
    return ImageFileDataset(_find_store(path, fraction, labels), on_error, fraction, labels)


def _find_store(path: Path, fraction: Fraction | None, labels: LabelFile | None) -> ImageStore:
    def arrange(inventory: Inventory) -> Catalog:
        return labels.arrange(inventory, fraction) if labels else arrange_folders(inventory, fraction)

    if path.is_dir():
        if not labels and (store := _find_tables(path, fraction)):
            return store
        return FolderStore(path, arrange)
    if path.suffix.lower() == PARQUET_SUFFIX:
        return ParquetStore(path, fraction)
    require_archive(path, f"use the layout {LAYOUT}")
    if not labels and path.name.lower().endswith(SHARD_SUFFIXES) and is_webdataset(path):
        return WebDatasetStore(path, fraction)
    return ArchiveStore(path, arrange)


def _find_tables(folder: Path, fraction: Fraction | None) -> ImageStore | None:
    """Return the Parquet files or shards of a folder that has no images in subfolders."""
    inventory = Inventory(folder)
    for name in list_files(folder, inventory):
        inventory.add(name)
        if inventory.images and "/" in inventory.images[-1]:
            return None
    if inventory.take((PARQUET_SUFFIX,)):
        return ParquetStore(folder, fraction)
    shards = inventory.take(SHARD_SUFFIXES)
    return WebDatasetStore(folder, fraction) if shards and is_webdataset(folder / shards[0]) else None


def _for_each_in_threads(
    function: Callable[[Entry, Path | bytes], None], contents: Iterator[tuple[Entry, Path | bytes]]
) -> None:
    """Call a function for every file, in one thread per CPU, with a limited number of files in memory."""
    threads = available_cpus()

    def process(batch: list[tuple[Entry, Path | bytes]]) -> None:
        for entry, content in batch:
            function(entry, content)

    with ThreadPoolExecutor(threads) as pool:
        for _ in prefetch(pool, process, batched(contents, _BATCH_SIZE), max_pending=2 * threads):
            pass
