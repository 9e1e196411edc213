"""CIFAR-10 in its own files, read by torchvision, which checks their MD5 before it unpickles them."""

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
from cifarx_serve.images.preprocess import resize
from cifarx_serve.spec import InputSpec
from cifarx_train.data import decoded_cache
from cifarx_train.data.dataset import Dataset, LabeledImages, Split
from cifarx_train.data.decoded_cache import Decoded, Pixels

ROOT: Final = Path("cifar10")
"""Where the notes keep it: a folder below the current one."""

_TIMEOUT_S: Final = 10


class Cifar10Set(Dataset):
    """The 60,000 images, from a folder that holds `cifar-10-batches-py`."""

    kind = "cifar10"
    name = "CIFAR-10"

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self._read("test").classes)

    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        read = self._read(split)
        images = np.asarray(read.data, np.uint8)
        if images.shape[1:3] == (spec.height, spec.width):
            return LabeledImages(images, np.asarray(read.targets, np.int64))
        # The files were just found to be those with these checksums.
        key = decoded_cache.cache_key((self.name, split, CIFAR10.train_list, CIFAR10.test_list), spec)
        if kept := decoded_cache.find(key, spec):
            return kept[0]

        def fill(pixels: Pixels) -> Decoded:
            for position, image in enumerate(images):
                pixels.write(position, resize(Image.fromarray(image), spec))
            return Decoded(tuple(read.classes), list(read.targets))

        return decoded_cache.decode(key, len(images), spec, fill)[0]

    def _read(self, split: Split) -> CIFAR10:
        try:
            return CIFAR10(str(self.root), train=split == "train", download=False)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{self.root / CIFAR10.base_folder} is not CIFAR-10 as published ({error})".replace("\n", " "),
                "remove it and use --data cifar10, which downloads it",
            ) from error


def has_batches(folder: Path) -> bool:
    """Whether a folder holds CIFAR-10's own files."""
    return (folder / str(CIFAR10.base_folder)).is_dir()


def download() -> Cifar10Set:
    """CIFAR-10 under `./cifar10`, fetched when it is not there.

    Raises:
        DataError: it is not there and cannot be fetched.
    """
    if has_batches(ROOT):
        return Cifar10Set(ROOT)
    try:
        # Asked first, with a time limit: torchvision's own download has none, and leaves a folder behind.
        request = urllib.request.Request(CIFAR10.url, method="HEAD")
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        _fetch()
    except (OSError, RuntimeError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is the response too, and holds the connection
        reason = getattr(error, "reason", error)
        raise DataError(
            f"CIFAR-10 is not in ./{ROOT} and cannot be downloaded ({reason})",
            "use --data builtin, or --data DIR with a folder or .tar.gz of images",
        ) from error
    return Cifar10Set(ROOT)


def _fetch() -> None:
    new = not ROOT.exists()
    try:
        CIFAR10(str(ROOT), download=True)
    except BaseException:
        if new:
            shutil.rmtree(ROOT, ignore_errors=True)
        raise
