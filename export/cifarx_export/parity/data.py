"""The images of a proof: the test split of what the model was trained on, or of what the user names."""

import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.compare import ParityData
from cifarx_serve.spec import ModelSpec
from cifarx_train.data.dataset import Broken, fingerprint
from cifarx_train.data.selection import select_data_like


def parity_data(spec: ModelSpec, name: str, broken: Broken = "refuse") -> ParityData:
    """Read a test split at the model's input size.

    Args:
        spec: of the model to be proved.
        name: as `--data` has it; `auto` is what the model was trained on where that can be found.
        broken: refuse a data set with broken images, or skip them.

    Raises:
        DataError: what was asked for is absent or damaged.
    """
    data = select_data_like(spec.training.data if spec.training else None, name, broken)
    split = data.load("test", spec.input)
    labels = split.labels if data.class_names == spec.class_names else None
    return ParityData(split.images, labels, data.name, fingerprint(split, data.class_names))


def training_images(spec: ModelSpec, name: str, count: int, broken: Broken = "refuse") -> NDArray[np.uint8]:
    """Images of the training split, spread over it: uint8 (count, height, width, 3), or all where there are fewer.

    Raises:
        DataError: what was asked for is absent or damaged.
    """
    data = select_data_like(spec.training.data if spec.training else None, name, broken)
    images = data.load("train", spec.input).images
    positions = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(np.int64)
    return images[positions]
