"""The built-in synthetic dataset: ten classes of drawn icons, so that everything runs offline.

The class names, their order and the image format are those of CIFAR-10: 32x32 pixels, RGB, one byte per channel.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.images.preprocess import is_unchanged, resize
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import Dataset, LabeledImages, Picture, Split, evenly_spaced
from cifarx_train.data.synthetic.draw import SIDE, draw_class
from cifarx_train.data.synthetic.rng import PortableGenerator

CLASS_NAMES: Final[tuple[str, ...]] = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
TRAIN_IMAGES: Final = 10_000
TEST_IMAGES: Final = 2_000

_SEEDS: Final[dict[Split, int]] = {"train": 20_090_408, "test": 19_980_731}
# Images drawn at once, all of one class: few enough for the masks to stay in the CPU's cache, and a divisor of the
# number of images per class.
_CHUNK: Final = 200


class SyntheticDataset(Dataset):
    """The drawings as a dataset. Needs neither files nor a network connection."""

    kind = "builtin"
    name = "builtin drawings"

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES

    def sample(self, split: Split, count: int) -> list[Picture]:
        images, labels = draw_split(split)
        return [Picture(images[position], int(labels[position])) for position in evenly_spaced(len(labels), count)]

    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        images, labels = draw_split(split)
        if not is_unchanged(images.shape[1:], spec):
            from PIL import Image

            images = np.stack([resize(Image.fromarray(image), spec) for image in images])
        return LabeledImages(images, labels)


def draw_split(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw a split of the dataset. The two splits come from different random streams.

    Returns:
        The images, uint8 (N, 32, 32, 3) RGB, and the labels, int64 (N,): shuffled, with the same number of images per
        class.
    """
    count = TRAIN_IMAGES if split == "train" else TEST_IMAGES
    generator = PortableGenerator(_SEEDS[split])
    positions = generator.permutation(count)
    images = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for start in range(0, count, _CHUNK):
        label = start * len(CLASS_NAMES) // count
        chunk = positions[start : start + _CHUNK]
        images[chunk] = draw_class(generator, label, len(chunk))
        labels[chunk] = label
    return images, labels
