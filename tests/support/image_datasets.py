"""Small datasets of image files: one color per class, with noise, so that a network can learn them."""

import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLORS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


def color_image(
    color: tuple[int, int, int], rng: np.random.Generator, width: int = 32, height: int = 32
) -> NDArray[np.uint8]:
    """Return an image of one color with noise, uint8 (height, width, 3)."""
    return (np.array(color) + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)


def write_image_folder(
    folder: Path, *, train: int = 20, val: int = 0, test: int = 10, width: int = 32, height: int = 32, seed: int = 0
) -> Path:
    """Write `train/<class>/<n>.png`, `test/<class>/<n>.png` and maybe `val/<class>/<n>.png`, and return the folder.

    Args:
        folder: must not exist.
        train: the number of training images per class.
        val: the number of val images per class.
        test: the number of test images per class.
        width: of each image, in pixels.
        height: of each image, in pixels.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test), ("val", val)):
        if not count:
            continue
        for name, color in COLORS.items():
            class_folder = folder / split / name
            class_folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(color_image(color, rng, width, height)).save(class_folder / f"{number}.png")
    return folder


def pack_archive(folder: Path, archive: Path, top: str = ".") -> Path:
    """Pack the content of a folder into an archive, below `top`, and return the archive."""
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, top)
    return archive
