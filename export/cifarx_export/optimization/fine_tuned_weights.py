"""The weights that are fine-tuned for int8: made once for all formats, and kept in the study."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from cifarx_export.formats.registry import ConversionSource
from cifarx_export.optimization.kept_weights import load_weights, save_weights
from cifarx_serve.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

_IMAGE_BYTES: Final = 2**29
"""The memory that the training images may take."""

_MAX_IMAGES: Final = 20_000
_FACT: Final = "fine-tuned"


class FineTunedWeights(NamedTuple):
    """Weights that replace those of a network.

    Attributes:
        build: returns a new copy of the network with these weights, in eval mode.
        facts: what the specs of its artifacts record about them.
    """

    build: "Callable[[], nn.Module]"
    facts: Mapping[str, str]


def load_or_fine_tune(source: ConversionSource, file: Path, progress: Progress) -> FineTunedWeights:
    """Return the weights in a file, or fine-tune the network and write them.

    Args:
        source: the network, and its training images.
        file: the file of the study.
        progress: called with a line of text at each step.

    Raises:
        UsageError: the network cannot be fine-tuned.
        OutputError: the file cannot be written.
    """
    module = source.build_module()
    history = load_weights(file, module, progress)
    if history is None:
        history = _fine_tune(module, source, progress)
        save_weights(file, module, history)
    weights = module.state_dict()

    def build() -> "nn.Module":
        network = source.build_module()
        network.load_state_dict(weights)
        return network

    return FineTunedWeights(build, {_FACT: history})


def _fine_tune(module: "nn.Module", source: ConversionSource, progress: Progress) -> str:
    """Fine-tune a network in place and return how, in words."""
    from cifarx_train.quantization_aware import fine_tune_for_int8  # imports PyTorch

    images = load_fine_tuning_images(source)
    progress(f"int8: fine-tuning on {len(images):,} training images")
    found = fine_tune_for_int8(source.build_module(), images, source.spec.input, progress=progress)
    module.load_state_dict(found.weights)
    return f"for int8 by distillation from the network, {found.steps} steps on {len(images):,} training images"


def load_fine_tuning_images(source: ConversionSource) -> "NDArray[np.uint8]":
    """Return training images to fine-tune a network on, as many as fit into memory: (N, height, width, channels)."""
    size = source.spec.input
    count = min(_MAX_IMAGES, max(1, _IMAGE_BYTES // (size.height * size.width * size.channels)))
    return source.load_training_images(count)
