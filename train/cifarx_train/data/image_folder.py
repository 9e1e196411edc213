"""Datasets of image files: a folder with `train/<class>/…` and `test/<class>/…`, or a `.tar.gz` of one."""

import hashlib
import os
import tarfile
import warnings
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

from PIL import Image

from cifarx_serve.errors import DataError, FallbackWarning, ImageError, error_message
from cifarx_serve.files.regular_file import require_regular_file
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import MAX_BYTES, read_image
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.cpus import available_cpus
from cifarx_serve.system.prefetch import batched, prefetch
from cifarx_serve.system.terminal import encodable
from cifarx_train.data import decoded_cache
from cifarx_train.data.dataset import Dataset, LabeledImages, OnError, Picture, Split, evenly_spaced
from cifarx_train.data.decoded_cache import BrokenImage, DecodedSplit, ImageBuffer

LAYOUT = "train/<class>/<image> and test/<class>/<image> (or val/ or valid/ instead of test/)"

SplitFolder: TypeAlias = Literal["train", "test", "val", "valid"]

_SPLIT_FOLDERS: Final[dict[Split, tuple[SplitFolder, ...]]] = {"train": ("train",), "test": ("test", "val", "valid")}
"""The possible folders of a split. The first one that contains an image is used."""

_READ_SIZE: Final = 1 << 20  # bytes
_BATCH_SIZE: Final = 32  # images that a thread decodes at a time
_MAX_LISTED: Final = 5  # broken images that a message lists

# The exceptions that tarfile and the decompressors raise for a truncated or damaged file.
_DAMAGED_ARCHIVE = (OSError, tarfile.TarError, EOFError, zlib.error)


class ImageFile(NamedTuple):
    """A file of a split. Sorts by class, then by name."""

    class_name: str
    name: str


class _ImageFileDataset(Dataset):
    """Base class of datasets of image files.

    The order of classes and images is that of the sorted names of folders and files, as in torchvision's `ImageFolder`.

    Args:
        path: the folder or archive.
        on_error: "raise" a `DataError` for a file that cannot be read as an image, or "skip" it with a warning.
    """

    kind = "folder"

    def __init__(self, path: Path, on_error: OnError = "raise") -> None:
        self.path = path
        self.on_error = on_error
        self.name = encodable(Path(os.path.abspath(path)).name)  # noqa: PTH100 - unlike resolve(), this keeps the name of a symbolic link

    @abstractmethod
    def _identity(self, split: Split) -> object:
        """Return a value that changes whenever the names or images of a split change, for `decoded_cache.cache_key`."""

    @cached_property
    @abstractmethod
    def _files(self) -> dict[SplitFolder, set[ImageFile]]:
        """All image files, by the folder of their split."""

    @abstractmethod
    def _contents(self, folder: SplitFolder) -> Iterator[tuple[ImageFile, Path | bytes]]:
        """Yield every file of a split with its path or its content, in any order."""

    def _folder(self, split: Split) -> SplitFolder:
        return next((folder for folder in _SPLIT_FOLDERS[split] if self._files[folder]), _SPLIT_FOLDERS[split][0])

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        train, test = self._folder("train"), self._folder("test")
        classes = {folder: {file.class_name for file in self._files[folder]} for folder in (train, test)}
        for folder, names in classes.items():
            if len(names) < 2:
                count = "1 class folder" if names else "0 class folders"
                raise DataError(f"{self.path} has {count} with images in {folder}/", f"use the layout {LAYOUT}")
        if unmatched := sorted(classes[train] ^ classes[test]):
            raise DataError(
                f"{self.path} has classes in only one split ({', '.join(unmatched)})",
                f"create the same class folders in {train}/ and {test}/",
            )
        if unencodable := sorted(name for name in classes[train] if encodable(name) != name):
            raise DataError(
                f"the class folder {encodable(unencodable[0])} of {self.path} has a name that is not valid UTF-8",
                "rename it",
            )
        return tuple(sorted(classes[train]))

    def sample(self, split: Split, count: int) -> list[Picture]:
        folder, label = self._folder(split), {name: index for index, name in enumerate(self.class_names)}
        files = sorted(self._files[folder])
        chosen = {files[position] for position in evenly_spaced(len(files), count)}
        pictures = {
            file: Picture(content, label[file.class_name]) for file, content in self._contents(folder) if file in chosen
        }
        return [pictures[file] for file in sorted(pictures)]

    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        """Read a split from the cache, or decode it.

        With `on_error="skip"`, files that cannot be read are skipped, and a FallbackWarning lists them.

        Raises:
            DataError: the layout is wrong, an image is broken (with `on_error="raise"`), all images of a class are
                broken, or the files changed during reading.
        """
        identity = self._identity(split)
        key = decoded_cache.cache_key((split, identity), spec)
        if cached := decoded_cache.find(key, spec):
            images, decoded = cached
            self.class_names = decoded.class_names  # saves listing an archive
            self._check_broken(decoded)
            return images
        count = len(self._files[self._folder(split)])
        return decoded_cache.decode(key, count, spec, partial(self._decode, split, spec, identity))[0]

    def _decode(self, split: Split, spec: InputSpec, identity: object, buffer: ImageBuffer) -> DecodedSplit:
        classes = self.class_names
        folder = self._folder(split)
        files = sorted(self._files[folder])
        positions = {file: position for position, file in enumerate(files)}
        broken: dict[int, BrokenImage] = {}

        def decode(file: ImageFile, content: Path | bytes) -> None:
            try:
                buffer.write(positions[file], resize(read_image(content), spec))
            except ImageError as error:
                # The message starts with the path or the size of the content, but an archive member has a better name.
                subject = str(content) if isinstance(content, Path) else f"{len(content)} bytes"
                reason = error.problem.removeprefix(f"{subject} is ")
                name = f"{folder}/{file.class_name}/{file.name}"
                broken[positions[file]] = BrokenImage(encodable(name), encodable(reason))

        _for_each_in_threads(decode, self._contents(folder))
        if self._identity(split) != identity:
            raise DataError(f"{self.path} changed while it was read", "run it again when all files are complete")
        label = {name: index for index, name in enumerate(classes)}
        labels = [label[file.class_name] for position, file in enumerate(files) if position not in broken]
        decoded = DecodedSplit(classes, labels, [broken[position] for position in sorted(broken)])
        self._check_broken(decoded)
        buffer.close_gaps(set(broken), len(files))
        return decoded

    def _check_broken(self, decoded: DecodedSplit) -> None:
        """Raise a DataError for broken images, or warn that they are skipped."""
        if not decoded.broken:
            return
        listed = ", ".join(f"{image.file} ({image.reason})" for image in decoded.broken[:_MAX_LISTED])
        more = ", …" if len(decoded.broken) > _MAX_LISTED else ""
        count = "1 broken image" if len(decoded.broken) == 1 else f"{len(decoded.broken):,} broken images"
        problem = f"{count} in {self.path}: {listed}{more}"
        if self.on_error == "raise":
            raise DataError(problem, "repair or remove them, or use --on-error skip")
        remaining = set(decoded.labels)
        if empty := [name for label, name in enumerate(decoded.class_names) if label not in remaining]:
            raise DataError(f"{problem}; no images are left in class {', '.join(empty)}", "repair them")
        warnings.warn(f"skipped {problem}", FallbackWarning, stacklevel=3)


class ImageFolderDataset(_ImageFileDataset):
    """A dataset of image files in a folder."""

    def _identity(self, split: Split) -> object:
        """Return a digest of the sizes and times of the files, because reading their contents is as slow as decoding.

        `st_ctime` is included because a copied file can have the modification time of the original.
        """
        folder = self._folder(split)
        digest = hashlib.sha256()
        for file in sorted(self._files[folder]):
            try:
                status = (self.path / folder / file.class_name / file.name).stat()
            except OSError:
                digest.update(b"gone")  # decoding will report it as broken
            else:
                digest.update(repr((file, status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode())
        return (str(self.path.resolve()), self.class_names, digest.hexdigest())

    @cached_property
    def _files(self) -> dict[SplitFolder, set[ImageFile]]:
        return {folder: set(self._list(folder)) for folder in get_args(SplitFolder)}

    def _list(self, folder: SplitFolder) -> Iterator[ImageFile]:
        try:
            for class_folder in _scan(self.path / folder):
                if class_folder.is_dir():
                    yield from (
                        ImageFile(class_folder.name, file.name)
                        for file in _scan(Path(class_folder.path))
                        if _is_image(PurePosixPath(file.name)) and file.is_file()
                    )
        except OSError as error:
            raise DataError(f"cannot list {error.filename} ({error_message(error)})", "make it readable") from error

    def _contents(self, folder: SplitFolder) -> Iterator[tuple[ImageFile, Path | bytes]]:
        for file in sorted(self._files[folder]):
            yield file, self.path / folder / file.class_name / file.name


class ImageArchiveDataset(_ImageFileDataset):
    """A dataset of image files in a tar archive, compressed or not. Nothing is extracted to disk."""

    def _identity(self, split: Split) -> object:  # noqa: ARG002 - the archive contains both splits
        """Return the SHA-256 of the archive. This takes about 1% of the time to decode its images."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {self.path} ({error_message(error)})", "make it readable") from error

    @cached_property
    def _members(self) -> dict[tuple[SplitFolder, ImageFile], int]:
        """The index of each image's member. If an archive contains a file twice, the later one is used."""
        return {
            image: index
            for index, (_, member) in enumerate(self._read())
            if (image := _parse_member(member)) is not None
        }

    @cached_property
    def _files(self) -> dict[SplitFolder, set[ImageFile]]:
        files: dict[SplitFolder, set[ImageFile]] = {folder: set() for folder in get_args(SplitFolder)}
        for folder, file in self._members:
            files[folder].add(file)
        return files

    def _contents(self, folder: SplitFolder) -> Iterator[tuple[ImageFile, Path | bytes]]:
        for index, (archive, member) in enumerate(self._read()):
            image = _parse_member(member)
            if image is None or image[0] != folder or self._members.get(image) != index:
                continue
            if member.size > MAX_BYTES:  # a sparse member takes no space in the archive
                problem = f"{member.name} in {self.path} has {member.size:,} bytes, too many for an image"
                raise DataError(problem, "remove it")
            if content := archive.extractfile(member):
                yield image[1], content.read()

    def _read(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        """Yield every member, and read the archive to its end."""
        with self._open() as archive:
            while member := archive.next():
                archive.members.clear()  # type: ignore[attr-defined] # a TarFile keeps every member, possibly millions
                yield archive, member

    @contextmanager
    def _open(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.path) as archive:
                yield archive
                while archive.fileobj and archive.fileobj.read(_READ_SIZE):
                    pass  # gzip checks its checksum at the end of the file
        except _DAMAGED_ARCHIVE as error:
            raise DataError(f"{self.path} is truncated or damaged ({error})", "copy or download it again") from error


def open_image_dataset(path: Path, on_error: OnError = "raise") -> Dataset:
    """Open a folder or an archive of image files.

    Args:
        path: the folder or archive.
        on_error: "raise" a `DataError` for files that cannot be read as images, or "skip" them with a warning.

    Raises:
        DataError: the path is neither a folder nor an archive.
    """
    if path.is_dir():
        return ImageFolderDataset(path, on_error)
    try:
        require_regular_file(path)
        with tarfile.open(path) as archive:
            next(islice(archive, 1), None)
    except _DAMAGED_ARCHIVE as error:
        reason = error_message(error).rstrip(":")  # the following lines list every compression that tarfile tried
        raise DataError(f"{path} is not a folder or a .tar.gz of one ({reason})", f"use the layout {LAYOUT}") from error
    return ImageArchiveDataset(path, on_error)


def _for_each_in_threads(
    function: Callable[[ImageFile, Path | bytes], None], contents: Iterator[tuple[ImageFile, Path | bytes]]
) -> None:
    """Call a function for every file, in one thread per CPU, with a limited number of files in memory."""
    threads = available_cpus()

    def process(batch: list[tuple[ImageFile, Path | bytes]]) -> None:
        for file, content in batch:
            function(file, content)

    with ThreadPoolExecutor(threads) as pool:
        for _ in prefetch(pool, process, batched(contents, _BATCH_SIZE), max_pending=2 * threads):
            pass


def _scan(folder: Path) -> list["os.DirEntry[str]"]:
    """Return the entries of a folder, or an empty list if it is not a folder."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_image(path: PurePosixPath) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() in Image.registered_extensions()


def _parse_member(member: tarfile.TarInfo) -> tuple[SplitFolder, ImageFile] | None:
    """Return the split folder and file of an archive member, or None if it is not an image of the dataset.

    The layout can be in one parent folder, as in archives made from outside the dataset's folder.
    """
    path = PurePosixPath(member.name)
    match path.parts[-3:]:
        case ("train" | "test" | "val" | "valid" as folder, class_name, name) if member.isfile() and (
            len(path.parts) <= 4 and _is_image(path)
        ):
            return folder, ImageFile(class_name, name)
    return None
