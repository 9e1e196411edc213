"""A folder of image files, `train/<class>/…` and `test/<class>/…`, or a `.tar.gz` of one."""

import os
import tarfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from cifarx_serve.errors import DataError, ImageError
from cifarx_serve.images import read_image
from cifarx_serve.preprocess import resize
from cifarx_serve.spec import InputSpec
from cifarx_serve.threads import available_cpus
from cifarx_train.data.dataset import DataSet, LabelledImages, Split

LAYOUT = "train/<class>/<image> and test/<class>/<image>"

_CHUNK = 1 << 20

# What tarfile and the decompressor below it raise for a file that is cut short or altered.
_DAMAGE = (OSError, tarfile.TarError, EOFError, zlib.error)


class ImageFile(NamedTuple):
    """One file of a split: sorts by class, then by name."""

    class_name: str
    name: str


class _ImageFiles(DataSet):
    """Classes and order come from the sorted names of folders and files, as torchvision's ImageFolder has them."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = Path(os.path.abspath(path)).name  # noqa: PTH100 - `.` has no name, and a link keeps its own

    @cached_property
    @abstractmethod
    def _files(self) -> dict[Split, list[ImageFile]]:
        """Every image file, by split."""

    @abstractmethod
    def _reader(self, split: Split) -> Callable[[ImageFile], Path | bytes]:
        """A function that gives a file of the split as its path or its bytes."""

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        classes = {split: sorted({file.class_name for file in files}) for split, files in self._files.items()}
        for split, names in classes.items():
            if len(names) < 2:
                raise DataError(
                    f"{self.path} has {len(names)} class folders with images under {split}/", f"lay it out as {LAYOUT}"
                )
        if classes["train"] != classes["test"]:
            odd = sorted(set(classes["train"]) ^ set(classes["test"]))
            raise DataError(
                f"{self.path} has classes in one split alone ({', '.join(odd)})",
                "give train/ and test/ the same class folders",
            )
        return tuple(classes["train"])

    def load(self, split: Split, spec: InputSpec) -> LabelledImages:
        index = {name: label for label, name in enumerate(self.class_names)}
        files = sorted(set(self._files[split]))  # an archive may hold a file twice; the later one counts
        read = self._reader(split)
        images = np.empty((len(files), spec.height, spec.width, 3), np.uint8)

        def decode(position: int) -> None:
            file = files[position]
            try:
                images[position] = resize(read_image(read(file)), spec)
            except ImageError as error:
                raise DataError(
                    f"broken image {split}/{file.class_name}/{file.name} in {self.path} ({error.problem})",
                    "repair or remove it",
                ) from error

        with ThreadPoolExecutor(available_cpus()) as pool:
            for _ in pool.map(decode, range(len(files))):
                pass
        return LabelledImages(images, np.array([index[file.class_name] for file in files], np.int64))


class FolderSet(_ImageFiles):
    """A folder on disk."""

    @cached_property
    def _files(self) -> dict[Split, list[ImageFile]]:
        return {"train": self._split_files("train"), "test": self._split_files("test")}

    def _split_files(self, split: Split) -> list[ImageFile]:
        return [
            ImageFile(file.parent.name, file.name)
            for file in self.path.glob(f"{split}/*/*")
            if _is_image(file) and file.is_file()
        ]

    def _reader(self, split: Split) -> Callable[[ImageFile], Path | bytes]:
        return lambda file: self.path / split / file.class_name / file.name


class ArchiveSet(_ImageFiles):
    """A `.tar` archive of such a folder, read in place: nothing is unpacked to the disk."""

    @cached_property
    def _files(self) -> dict[Split, list[ImageFile]]:
        found: dict[Split, list[ImageFile]] = {"train": [], "test": []}
        with self._open() as archive:
            for member in archive:
                if member.isfile() and (place := _place(member.name)):
                    found[place[0]].append(place[1])
        return found

    def _reader(self, split: Split) -> Callable[[ImageFile], Path | bytes]:
        contents: dict[ImageFile, bytes] = {}
        with self._open() as archive:
            for member in archive:
                place = _place(member.name) if member.isfile() else None
                if place and place[0] == split and (file := archive.extractfile(member)):
                    contents[place[1]] = file.read()
        return contents.__getitem__

    @contextmanager
    def _open(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.path) as archive:
                yield archive
                while archive.fileobj and archive.fileobj.read(_CHUNK):
                    pass  # to the end of the file, where gzip's checksum stands
        except _DAMAGE as error:
            raise DataError(f"{self.path} is truncated or damaged ({error})", "copy or download it again") from error


def open_image_files(path: Path) -> DataSet:
    """A folder or an archive of image files.

    Raises:
        DataError: it is neither, or has no classes.
    """
    if path.is_dir():
        return FolderSet(path)
    try:
        with tarfile.open(path) as archive:
            next(islice(archive, 1), None)
    except _DAMAGE as error:
        reason = str(error).split(":\n")[0]  # below it, tarfile lists every compression it tried
        raise DataError(f"{path} is not a folder or a .tar.gz of one ({reason})", f"lay it out as {LAYOUT}") from error
    return ArchiveSet(path)


def _is_image(path: PurePosixPath | Path) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() in Image.registered_extensions()


def _place(member: str) -> tuple[Split, ImageFile] | None:
    """Where a member of an archive belongs, or None; the layout may stand below one folder."""
    path = PurePosixPath(member)
    match path.parts[-3:]:
        case ("train" | "test" as split, class_name, name) if len(path.parts) <= 4 and _is_image(path):
            return split, ImageFile(class_name, name)
    return None
