"""A network whose accuracy depends on every part of the preprocessing, and images for it.

The images are wide. Only their center has the colors of a class; a stretched image mixes them with those of the sides.
The network expects a center crop, ImageNet's mean and standard deviation, and RGB.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cifarx_train.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD

SIDE = 8
CLASSES = ("ash", "beech", "cedar", "elm", "fir", "oak")
LEVELS = ((60, 120), (90, 190), (150, 60), (120, 230), (210, 100), (190, 40))
"""The level of red and of blue of each class."""


class Levels(nn.Module):
    """Chooses the class with the nearest levels of red and blue.

    Args:
        order: the class of each output.
    """

    def __init__(self, order: Sequence[int] = range(len(CLASSES))) -> None:
        super().__init__()
        mean, std = (np.array(values)[[0, 2]] for values in (IMAGENET_MEAN, IMAGENET_STD))
        levels = (np.array(LEVELS)[list(order)] / 255 - mean) / std
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        found = images[:, [0, 2]].mean((2, 3))
        logits: Tensor = -((found[:, None] - self.levels) ** 2).sum(2)  # type: ignore[operator]
        return logits


def write_levels(path: Path, order: Sequence[int] = range(len(CLASSES))) -> Path:
    """Write the network as a TorchScript file, or as an ONNX file."""
    module, example = Levels(order).eval(), torch.zeros(2, 3, SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has deprecated TorchScript and its exporter
        if path.suffix == ".onnx":
            torch.onnx.export(module, (example,), path, dynamo=False, dynamic_axes={"x": {0: "n"}}, input_names=["x"])
        else:
            torch.jit.save(torch.jit.trace(module, example), str(path))
    return path


def write_level_folder(folder: Path, images: int) -> Path:
    """Write one training image and `images` test images per class."""
    random = np.random.default_rng(0)
    for name, (red, blue) in zip(CLASSES, LEVELS, strict=True):
        for split, count in (("train", 1), ("test", images)):
            class_folder = folder / split / name
            class_folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (SIDE, 3 * SIDE, 3))
                pixels[:, :SIDE] = pixels[:, -SIDE:] = random.integers(0, 256, (1, 1, 3))
                center = pixels[:, SIDE : 2 * SIDE]
                center[..., 0] = red + random.integers(-12, 13, center.shape[:2])
                center[..., 2] = blue + random.integers(-12, 13, center.shape[:2])
                Image.fromarray(pixels.astype(np.uint8)).save(class_folder / f"{number:04}.png")
    return folder
