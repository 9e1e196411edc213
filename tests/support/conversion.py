"""Conversion of a checkpoint without a parity check, also with faults in the network."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from torch import nn

from cifarx_export.formats.registry import NO_OPTIONS, ConversionSource, ExportOptions, get_format
from cifarx_serve.progress import silent
from cifarx_serve.spec import Precision
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint


def conversion_source(
    checkpoint: Checkpoint,
    precision: Precision = "fp32",
    options: ExportOptions = NO_OPTIONS,
    module: nn.Module | None = None,
) -> ConversionSource:
    """Return the input of a converter: a checkpoint, or `module` with its spec. The training images are noise."""
    size = checkpoint.spec.input

    def noise(count: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (count, size.height, size.width, 3), np.uint8)

    spec = msgspec.structs.replace(
        checkpoint.spec,
        precision=precision,
        embedded_preprocessing=bool(options.embed_preprocessing),
        exporter={"format": "of a test"},
    )
    return ConversionSource(checkpoint.build if module is None else lambda: module, spec, options, noise, silent)


def write_artifact(
    checkpoint: Path,
    name: str,
    path: Path,
    change: Callable[[nn.Module], nn.Module] | None = None,
    precision: Precision = "fp32",
    options: ExportOptions = NO_OPTIONS,
) -> Path:
    """Write a checkpoint in format `name` to `path`, and return `path`. `change` modifies or replaces the network."""
    loaded = load_checkpoint(checkpoint)
    module = loaded.build()
    source = conversion_source(loaded, precision, options, change(module) if change else module)
    artifact = next(iter(get_format(name).convert(source)))
    artifact.save(path, artifact.complete_spec(source.spec))
    return path
