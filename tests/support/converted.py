"""The artifact of a checkpoint as its converter makes it: no proof yet, and any fault one likes in the network."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from cifarx_export.formats.registry import NO_OPTIONS, ExportOptions, export_format
from cifarx_serve.spec import Precision
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from tests.support.conversion_source import source_of


def converted(
    checkpoint: Path,
    name: str,
    path: Path,
    change: Callable[[nn.Module], nn.Module] | None = None,
    precision: Precision = "fp32",
    options: ExportOptions = NO_OPTIONS,
) -> Path:
    """Write the artifact of format `name` to `path`; `change` makes another network of the checkpoint's."""
    loaded = load_checkpoint(checkpoint)
    module = loaded.build()
    source = source_of(loaded, precision, options, change(module) if change else module)
    artifact = export_format(name).convert(source)
    artifact.save(path, artifact.describe(source.spec))
    return path
