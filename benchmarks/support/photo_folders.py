"""Write some of the classes of a dataset as folders of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import Dataset

_SIZE = InputSpec(height=32, width=32)


def write_class_folders(dataset: Dataset, folder: Path, names: Sequence[str], train_images: int | None = None) -> Path:
    """Write `train/CLASS/N.png` and `test/CLASS/N.png`, 32x32 pixels, and return the folder.

    Args:
        dataset: the dataset.
        folder: is created.
        names: the classes to write.
        train_images: how many training images of each class to write, the first ones. The default is all.
    """
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    for split in splits:
        images = dataset.load(split, _SIZE)
        for name in names:
            place = folder / split / name
            place.mkdir(parents=True)
            own = (images.labels == dataset.class_names.index(name)).nonzero()[0]
            for number in own[: train_images if split == "train" else None]:
                Image.fromarray(images.images[number]).save(place / f"{number:05}.png", compress_level=1)
    return folder
