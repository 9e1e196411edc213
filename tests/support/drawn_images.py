"""Small data sets of real image files, drawn: one colour a class, with noise, so that a network can learn them."""

import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


def draw(
    colour: tuple[int, int, int], rng: np.random.Generator, width: int = 32, height: int = 32
) -> NDArray[np.uint8]:
    """A picture of one colour under noise: uint8 (height, width, 3), no two alike."""
    return (np.array(colour) + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)


def draw_folder(
    folder: Path, *, train: int = 20, test: int = 10, width: int = 32, height: int = 32, seed: int = 0
) -> Path:
    """Write `train/<class>/<n>.png` and `test/<class>/<n>.png`, so many images a class, and give the folder back."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for name, colour in COLOURS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw(colour, rng, width, height)).save(place / f"{number}.png")
    return folder


def pack(folder: Path, archive: Path, top: str = ".") -> Path:
    """The folder as an archive, its content below `top`, and give the archive back."""
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, top)
    return archive
