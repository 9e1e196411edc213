"""What a converter starts from, of a checkpoint, without the command around it."""

import msgspec
import numpy as np
from torch import nn

from cifarx_export.formats.registry import NO_OPTIONS, ExportOptions, Source
from cifarx_serve.progress import silent
from cifarx_serve.spec import Precision
from cifarx_train.checkpoints.checkpoint import Checkpoint


def source_of(
    checkpoint: Checkpoint,
    precision: Precision = "fp32",
    options: ExportOptions = NO_OPTIONS,
    module: nn.Module | None = None,
) -> Source:
    """The checkpoint as a source; `module` in place of its own. Its training images are noise."""
    taken = checkpoint.spec.input

    def noise(count: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (count, taken.height, taken.width, 3), np.uint8)

    spec = msgspec.structs.replace(
        checkpoint.spec,
        precision=precision,
        embedded_preprocessing=bool(options.embed_preprocessing),
        exporter={"format": "of a test"},
    )
    return Source(checkpoint.build() if module is None else module, spec, options, noise, silent, {})
