"""A folder of image files, `train/<class>/…` and `test/<class>/…`, or a `.tar.gz` of one."""

import hashlib
import os
import tarfile
import warnings
import zlib
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

from PIL import Image

from cifarx_serve.errors import DataError, FallbackWarning, ImageError
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.cpus import available_cpus
from cifarx_train.data import decoded_cache
from cifarx_train.data.dataset import Broken, Dataset, LabeledImages, Split
from cifarx_train.data.decoded_cache import BrokenImage, Decoded, Pixels

LAYOUT = "train/<class>/<image> and test/<class>/<image> (or val/ or valid/ in place of test/)"

Place: TypeAlias = Literal["train", "test", "val", "valid"]

_PLACES: Final[dict[Split, tuple[Place, ...]]] = {"train": ("train",), "test": ("test", "val", "valid")}
"""The folders a split may stand in: of several, the first with an image in it."""

_CHUNK: Final = 1 << 20  # bytes
_AT_ONCE: Final = 32  # images a thread is given at a time
_NAMED: Final = 5  # broken images that a message names

# What tarfile and the decompressor below it raise for a file that is cut short or altered.
_DAMAGE = (OSError, tarfile.TarError, EOFError, zlib.error)


class ImageFile(NamedTuple):
    """One file of a split: sorts by class, then by name."""

    class_name: str
    name: str


class _ImageFiles(Dataset):
    """Classes and order come from the sorted names of folders and files, as torchvision's ImageFolder has them.

    Args:
        path: the folder or archive.
        broken: whether a file that cannot be read as an image is refused or left out.
    """

    kind = "folder"

    def __init__(self, path: Path, broken: Broken = "refuse") -> None:
        self.path = path
        self.broken = broken
        self.name = Path(os.path.abspath(path)).name  # noqa: PTH100 - `.` has no name, and a link keeps its own

    @abstractmethod
    def _identity(self, split: Split) -> object:
        """What changes whenever a split's names or images do: plain types, cheap to have."""

    @cached_property
    @abstractmethod
    def _files(self) -> dict[Place, set[ImageFile]]:
        """Every image file, by the folder of its split."""

    @abstractmethod
    def _contents(self, place: Place) -> Iterator[tuple[ImageFile, Path | bytes]]:
        """Every file of a split once, in any order: as its path or its bytes, read one after the other."""

    def _place(self, split: Split) -> Place:
        return next((place for place in _PLACES[split] if self._files[place]), _PLACES[split][0])

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        train, test = self._place("train"), self._place("test")
        classes = {place: {file.class_name for file in self._files[place]} for place in (train, test)}
        for place, names in classes.items():
            if len(names) < 2:
                raise DataError(
                    f"{self.path} has {len(names)} class folders with images under {place}/", f"lay it out as {LAYOUT}"
                )
        if odd := sorted(classes[train] ^ classes[test]):
            raise DataError(
                f"{self.path} has classes in one split alone ({', '.join(odd)})",
                f"give {train}/ and {test}/ the same class folders",
            )
        return tuple(sorted(classes[train]))

    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        """Read a split from what was kept of it, or decode it.

        With `broken="skip"`, files that cannot be read are left out, and a FallbackWarning names them.

        Raises:
            DataError: the layout is wrong, an image is broken (with `broken="refuse"`) or a whole class of them is, or
                the files changed meanwhile.
        """
        identity = self._identity(split)
        key = decoded_cache.cache_key((split, identity), spec)
        if kept := decoded_cache.find(key, spec):
            images, known = kept
            self.class_names = known.class_names  # an archive need not be listed for them
            self._judge(known)
            return images
        count = len(self._files[self._place(split)])
        return decoded_cache.decode(key, count, spec, partial(self._decode, split, spec, identity))[0]

    def _decode(self, split: Split, spec: InputSpec, identity: object, pixels: Pixels) -> Decoded:
        classes = self.class_names
        place = self._place(split)
        files = sorted(self._files[place])
        position = {file: number for number, file in enumerate(files)}
        broken: dict[int, BrokenImage] = {}

        def decode(file: ImageFile, content: Path | bytes) -> None:
            try:
                pixels.write(position[file], resize(read_image(content), spec))
            except ImageError as error:
                reason = error.problem.removeprefix(f"{_subject(content)} is ")
                broken[position[file]] = BrokenImage(_printable(f"{place}/{file.class_name}/{file.name}"), reason)

        _in_threads(decode, self._contents(place))
        if self._identity(split) != identity:
            raise DataError(f"{self.path} changed while it was read", "run it again when its files are all in place")
        label = {name: number for number, name in enumerate(classes)}
        labels = [label[file.class_name] for number, file in enumerate(files) if number not in broken]
        known = Decoded(classes, labels, [broken[number] for number in sorted(broken)])
        self._judge(known)
        pixels.close_gaps(set(broken), len(files))
        return known

    def _judge(self, known: Decoded) -> None:
        """Refuse broken images, or say that they are left out."""
        if not known.broken:
            return
        names = ", ".join(f"{image.file} ({image.reason})" for image in known.broken[:_NAMED])
        more = ", …" if len(known.broken) > _NAMED else ""
        count = "1 broken image" if len(known.broken) == 1 else f"{len(known.broken):,} broken images"
        problem = f"{count} in {self.path}: {names}{more}"
        if self.broken == "refuse":
            raise DataError(problem, "repair or remove them, or use --broken skip")
        left = set(known.labels)
        if empty := [name for number, name in enumerate(known.class_names) if number not in left]:
            raise DataError(f"{problem}; no image is left of {', '.join(empty)}", "repair them")
        warnings.warn(f"left out {problem}", FallbackWarning, stacklevel=3)


class ImageFolderDataset(_ImageFiles):
    """A folder on disk."""

    def _identity(self, split: Split) -> object:
        """Times and sizes instead of contents: reading those takes as long as decoding them.

        The time of the last change to a file's entry counts too, for copies that keep the time of their originals.
        """
        place = self._place(split)
        files = sorted(self._files[place])
        states = hashlib.sha256()
        for file in files:
            try:
                state = (self.path / place / file.class_name / file.name).stat()
            except OSError:
                states.update(b"gone")  # and will be named as broken
            else:
                states.update(repr((file, state.st_size, state.st_mtime_ns, state.st_ctime_ns)).encode())
        return (str(self.path.resolve()), self.class_names, states.hexdigest())

    @cached_property
    def _files(self) -> dict[Place, set[ImageFile]]:
        return {place: set(self._split_files(place)) for place in get_args(Place)}

    def _split_files(self, place: Place) -> Iterator[ImageFile]:
        try:
            for folder in _entries(self.path / place):
                if folder.is_dir():
                    yield from (
                        ImageFile(folder.name, file.name)
                        for file in _entries(Path(folder.path))
                        if _is_image(PurePosixPath(file.name)) and file.is_file()
                    )
        except OSError as error:
            raise DataError(f"cannot list {error.filename} ({error.strerror})", "make it readable") from error

    def _contents(self, place: Place) -> Iterator[tuple[ImageFile, Path | bytes]]:
        for file in sorted(self._files[place]):
            yield file, self.path / place / file.class_name / file.name


class ImageArchiveDataset(_ImageFiles):
    """A `.tar` archive of such a folder, read in place: nothing is unpacked to the disk."""

    def _identity(self, split: Split) -> object:  # noqa: ARG002 - one archive holds both
        """The archive's own sha256: a hundredth of the time that it takes to decode what is in it."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {self.path} ({error.strerror})", "make it readable") from error

    @cached_property
    def _members(self) -> dict[tuple[Place, ImageFile], int]:
        """The number of each image's member; an archive may hold a file twice, and then the later one counts."""
        return {
            found: number for number, (_, member) in enumerate(self._read()) if (found := _place_of(member)) is not None
        }

    @cached_property
    def _files(self) -> dict[Place, set[ImageFile]]:
        found: dict[Place, set[ImageFile]] = {place: set() for place in get_args(Place)}
        for place, file in self._members:
            found[place].add(file)
        return found

    def _contents(self, place: Place) -> Iterator[tuple[ImageFile, Path | bytes]]:
        for number, (archive, member) in enumerate(self._read()):
            found = _place_of(member)
            wanted = found is not None and found[0] == place and self._members.get(found) == number
            if found and wanted and (content := archive.extractfile(member)):
                yield found[1], content.read()

    def _read(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        """Every member in turn, to the very end of the archive."""
        with self._open() as archive:
            while member := archive.next():
                archive.members.clear()  # type: ignore[attr-defined] # it holds on to all of them: maybe millions
                yield archive, member

    @contextmanager
    def _open(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.path) as archive:
                yield archive
                while archive.fileobj and archive.fileobj.read(_CHUNK):
                    pass  # to the end of the file, where gzip's checksum stands
        except _DAMAGE as error:
            raise DataError(f"{self.path} is truncated or damaged ({error})", "copy or download it again") from error


def open_image_files(path: Path, broken: Broken = "refuse") -> Dataset:
    """A folder or an archive of image files.

    Args:
        path: the folder or archive.
        broken: whether files that cannot be read as images are refused, or left out with a warning.

    Raises:
        DataError: it is neither, or has no classes.
    """
    if path.is_dir():
        return ImageFolderDataset(path, broken)
    try:
        with tarfile.open(path) as archive:
            next(islice(archive, 1), None)
    except _DAMAGE as error:
        reason = str(error).split(":\n")[0]  # below it, tarfile lists every compression it tried
        raise DataError(f"{path} is not a folder or a .tar.gz of one ({reason})", f"lay it out as {LAYOUT}") from error
    return ImageArchiveDataset(path, broken)


def _in_threads(
    work: Callable[[ImageFile, Path | bytes], None], contents: Iterator[tuple[ImageFile, Path | bytes]]
) -> None:
    """Do the work on every file, in as many threads as there are CPUs, and with few files waiting in memory."""
    threads = available_cpus()

    def several(part: Iterable[tuple[ImageFile, Path | bytes]]) -> None:
        for file, content in part:
            work(file, content)

    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while part := list(islice(contents, _AT_ONCE)):
            waiting.append(pool.submit(several, part))
            if len(waiting) > 2 * threads:
                waiting.popleft().result()
        for future in waiting:
            future.result()


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    """What is in a folder; nothing where there is none."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_image(path: PurePosixPath) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() in Image.registered_extensions()


def _place_of(member: tarfile.TarInfo) -> tuple[Place, ImageFile] | None:
    """Where a member of an archive belongs, or None; the layout may stand below one folder."""
    path = PurePosixPath(member.name)
    match path.parts[-3:]:
        case ("train" | "test" | "val" | "valid" as place, class_name, name) if member.isfile() and (
            len(path.parts) <= 4 and _is_image(path)
        ):
            return place, ImageFile(class_name, name)
    return None


def _subject(content: Path | bytes) -> str:
    """What an ImageError calls it."""
    return str(content) if isinstance(content, Path) else f"{len(content)} bytes"


def _printable(name: str) -> str:
    """A name that any file may carry, in text that any file may hold."""
    return name.encode("utf-8", "replace").decode()
