"""Check that a file with embedded preprocessing resizes and crops as Pillow does."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_export.parity.checks import Check
from cifarx_export.parity.predictions import predictions_differ
from cifarx_serve.backends.base import Backend
from cifarx_serve.errors import DeviceMemoryError, error_message
from cifarx_serve.images.preprocess import model_input, model_pixels, resize

SCALE_FACTORS: Final = (1.5, 3.0)
"""How many times larger than the network's input the images are."""

TOLERANCE: Final = 1e-4
"""Absolute tolerance of a logit, at every precision: both runs use the same network, so only the resize can differ."""

_BATCH_SIZE: Final = 64


def check_resize(artifact: Backend, images: NDArray[np.uint8]) -> list[Check]:
    """Run the artifact on enlarged images, and on the same images resized by Pillow, and compare the logits.

    Args:
        artifact: the opened artifact.
        images: uint8 (N, height, width, channels) at the network's input size.

    Returns:
        One check; no check if the artifact has no embedded preprocessing.
    """
    if not artifact.spec.embedded_preprocessing:
        return []
    largest, flips = 0.0, 0
    for factor in SCALE_FACTORS:
        for start in range(0, len(images), _BATCH_SIZE):
            try:
                embedded, pillow = _run_both(artifact, images[start : start + _BATCH_SIZE], factor)
            except DeviceMemoryError:
                raise
            except Exception as error:  # the errors of the runtimes have no common base class
                return [Check("resize", False, f"does not run: {error_message(error)}")]
            largest = max(largest, float(np.nan_to_num(np.abs(embedded - pillow), nan=np.inf).max()))
            flips += int(predictions_differ(embedded, pillow, artifact.spec).sum())
    factors = " and ".join(f"{factor:g}x" for factor in SCALE_FACTORS)
    found = f"{len(images)} images enlarged {factors}: max |Δ| {largest:.2e} from Pillow's resize, {flips} flips"
    return [Check("resize", largest <= TOLERANCE and not flips, found)]


def _run_both(
    artifact: Backend, images: NDArray[np.uint8], factor: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the logits with the artifact's own resize, and with Pillow's, both (N, output size)."""
    spec = artifact.spec
    size = (int(spec.input.width * factor), int(spec.input.height * factor))
    enlarged = [_picture(image).resize(size, Image.Resampling.BICUBIC) for image in images]
    embedded = artifact.run(np.stack([model_pixels(picture, spec) for picture in enlarged]))
    resized = np.stack([resize(picture, spec.input) for picture in enlarged])
    return embedded, artifact.run(model_input(resized, spec))


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return an RGB image of RGB or grayscale pixels (height, width, channels)."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
