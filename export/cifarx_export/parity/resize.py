"""Whether a file that does its own preprocessing resizes as Pillow does."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_export.parity.checks import Check
from cifarx_serve.backends.base import Backend
from cifarx_serve.images.preprocess import resize

ENLARGEMENTS: Final = (1.5, 3.0)
"""How much larger than the network's input the images are made."""

TOLERANCE: Final = 1e-4
"""Of a logit, at every precision: both sides run the same network, so only the resize can differ."""

_BATCH: Final = 64


def check_resize(artifact: Backend, images: NDArray[np.uint8]) -> list[Check]:
    """Give the artifact enlarged images, and the same ones resized by Pillow; no check where it resizes nothing.

    Args:
        artifact: opened.
        images: uint8 (N, height, width, 3) at the network's size.
    """
    if not artifact.spec.embedded_preprocessing:
        return []
    largest, flips = 0.0, 0
    for enlargement in ENLARGEMENTS:
        for start in range(0, len(images), _BATCH):
            try:
                ours, pillows = _answers(artifact, images[start : start + _BATCH], enlargement)
            except Exception as error:  # a runtime's own errors have no common base; whatever it is, it does not run
                return [Check("resize", False, f"does not run: {str(error).strip().partition(chr(10))[0]}")]
            largest = max(largest, float(np.nan_to_num(np.abs(ours - pillows), nan=np.inf).max()))
            flips += int((ours.argmax(1) != pillows.argmax(1)).sum())
    sizes = " and ".join(f"{enlargement:g}" for enlargement in ENLARGEMENTS)
    found = f"{len(images)} images {sizes} times as large: max |Δ| {largest:.2e} from Pillow's resize, {flips} flips"
    return [Check("resize", largest <= TOLERANCE and not flips, found)]


def _answers(
    artifact: Backend, images: NDArray[np.uint8], enlargement: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    spec = artifact.spec.input
    size = (int(spec.width * enlargement), int(spec.height * enlargement))
    larger = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in images]
    ours = artifact.run(np.stack([np.asarray(picture) for picture in larger]))
    return ours, artifact.run(np.stack([resize(picture, spec) for picture in larger]))
