"""The original CIFAR-10 files, read by torchvision, which checks their MD5 before it unpickles them."""

import shutil
import urllib.request
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.error import HTTPError

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from cifarx_serve.errors import DataError
from cifarx_serve.images.preprocess import is_unchanged, resize
from cifarx_serve.spec import InputSpec
from cifarx_train.data import decoded_cache
from cifarx_train.data.dataset import Dataset, LabeledImages, Picture, Split, evenly_spaced
from cifarx_train.data.decoded_cache import DecodedSplit, ImageBuffer

DEFAULT_ROOT: Final = Path("cifar10")
"""Where CIFAR-10 is looked for and downloaded to, relative to the current folder."""

_TIMEOUT_S: Final = 10


class Cifar10Dataset(Dataset):
    """The 60,000 images of CIFAR-10.

    Args:
        root: a folder that contains `cifar-10-batches-py`.
    """

    kind = "cifar10"
    name = "CIFAR-10"

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self._read("test").classes)

    def sample(self, split: Split, count: int) -> list[Picture]:
        source = self._read(split)
        images = np.asarray(source.data, np.uint8)
        return [Picture(images[position], source.targets[position]) for position in evenly_spaced(len(images), count)]

    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        source = self._read(split)
        images = np.asarray(source.data, np.uint8)
        if is_unchanged(images.shape[1:], spec):
            return LabeledImages(images, np.asarray(source.targets, np.int64))
        # The lists contain the MD5 of every file, and torchvision has just checked the files against them.
        key = decoded_cache.cache_key((self.name, split, CIFAR10.train_list, CIFAR10.test_list), spec)
        if cached := decoded_cache.find(key, spec):
            return cached[0]

        def resize_all(buffer: ImageBuffer) -> DecodedSplit:
            for position, image in enumerate(images):
                buffer.write(position, resize(Image.fromarray(image), spec))
            return DecodedSplit(tuple(source.classes), list(source.targets))

        return decoded_cache.decode(key, len(images), spec, resize_all)[0]

    def _read(self, split: Split) -> CIFAR10:
        try:
            return CIFAR10(str(self.root), train=split == "train", download=False)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{self.root / CIFAR10.base_folder} is not CIFAR-10 as published ({error})".replace("\n", " "),
                "remove it and use --data cifar10, which downloads it",
            ) from error


def contains_cifar10(folder: Path) -> bool:
    """Return whether a folder contains the original files of CIFAR-10."""
    return (folder / str(CIFAR10.base_folder)).is_dir()


def download_cifar10() -> Cifar10Dataset:
    """Return CIFAR-10 from `./cifar10`, and download it first if it is not there.

    Raises:
        DataError: CIFAR-10 is not there and cannot be downloaded.
    """
    if contains_cifar10(DEFAULT_ROOT):
        return Cifar10Dataset(DEFAULT_ROOT)
    try:
        # torchvision's download has no timeout and leaves an empty folder behind, so try the server first.
        request = urllib.request.Request(CIFAR10.url, method="HEAD")
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        _download()
    except (OSError, RuntimeError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # the error is also the response, which keeps the connection open
        reason = getattr(error, "reason", error)
        raise DataError(
            f"CIFAR-10 is not in ./{DEFAULT_ROOT} and cannot be downloaded ({reason})",
            "use --data builtin, or --data DIR with a folder or .tar.gz of images",
        ) from error
    return Cifar10Dataset(DEFAULT_ROOT)


def _download() -> None:
    created = not DEFAULT_ROOT.exists()
    try:
        CIFAR10(str(DEFAULT_ROOT), download=True)
    except BaseException:
        if created:
            shutil.rmtree(DEFAULT_ROOT, ignore_errors=True)
        raise
