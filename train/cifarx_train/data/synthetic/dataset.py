"""The built-in drawings as a data set."""

import numpy as np

from cifarx_serve.images.preprocess import resize
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import Dataset, LabeledImages, Split
from cifarx_train.data.synthetic.draw import CLASS_NAMES, draw


class SyntheticDataset(Dataset):
    """Ten classes of small drawings with CIFAR-10's names; no network, no files."""

    kind = "builtin"
    name = "builtin drawings"

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES

    def load(self, split: Split, spec: InputSpec) -> LabeledImages:
        images, labels = draw(split)
        if images.shape[1:3] != (spec.height, spec.width):
            from PIL import Image

            images = np.stack([resize(Image.fromarray(image), spec) for image in images])
        return LabeledImages(images, labels)
