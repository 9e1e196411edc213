"""Labeled images that can be resized in many ways: they are decoded once, as far as memory allows."""

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import DataError, ImageError
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.cpus import available_cpus
from cifarx_train.data.dataset import Dataset, OnError, Picture

_MAX_DECODED_PIXELS: Final = 200_000_000
"""The number of decoded pixels that are kept in memory, 600 MB."""


class Pictures:
    """Images of the test split, in a random order: the first ones of it are a sample of all of them.

    Args:
        dataset: the dataset.
        count: the largest number of images.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them.

    Attributes:
        labels: the label of each image, (N,).

    Raises:
        DataError: the dataset or an image cannot be read.
    """

    def __init__(self, dataset: Dataset, count: int, on_error: OnError) -> None:
        stored = dataset.sample("test", count)
        order = np.random.default_rng(0).permutation(len(stored))
        self._decoded: dict[int, Image.Image] = {}
        self._pixels_left = _MAX_DECODED_PIXELS
        self._stored: list[Picture] = []
        for position in order:
            try:
                self._keep(len(self._stored), read_image(stored[position].source))
            except ImageError as error:
                if on_error == "raise":
                    raise DataError(error.problem, "repair or remove it, or use --on-error skip") from error
            else:
                self._stored.append(stored[position])
        self.labels = np.array([picture.label for picture in self._stored], np.int64)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def typical_side(self) -> int:
        """The median of the shorter sides, in pixels."""
        return int(np.median([min(self._image(number).size) for number in range(min(len(self), 100))]))

    def pixels(self, geometry: InputSpec, start: int, stop: int) -> NDArray[np.uint8]:
        """Return images resized for an input, uint8 (stop - start, height, width, channels); see `resize`."""
        with ThreadPoolExecutor(available_cpus()) as pool:
            return np.stack(list(pool.map(lambda number: resize(self._image(number), geometry), range(start, stop))))

    def _keep(self, number: int, image: Image.Image) -> None:
        size = image.width * image.height
        if size <= self._pixels_left:
            self._pixels_left -= size
            self._decoded[number] = image

    def _image(self, number: int) -> Image.Image:
        return self._decoded.get(number) or read_image(self._stored[number].source)
