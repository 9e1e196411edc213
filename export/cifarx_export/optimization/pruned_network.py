"""The pruned network of a search: made once for all formats, kept in the study, and the reference of its artifacts."""

import copy
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from cifarx_export.checked_artifact import CPU
from cifarx_export.exporter import Exporter
from cifarx_export.formats.registry import ConversionSource
from cifarx_export.optimization.fine_tuned_weights import load_fine_tuning_images
from cifarx_export.optimization.kept_weights import load_weights, save_weights
from cifarx_export.parity.compare import EVAL_BATCH_SIZE, check_parity, run_reference
from cifarx_serve.progress import Progress
from cifarx_serve.spec import ParitySummary
from cifarx_train.checkpoints.checkpoint import Checkpoint
from cifarx_train.pytorch_backend import PyTorchBackend

if TYPE_CHECKING:
    from torch import nn

    from cifarx_train.pruning import PrunedNetwork

_FACT: Final = "pruned"
_LIBRARY: Final = "torch-pruning"
_WARNING: Final = "compared with the pruned network, not with the original one"


class PrunedExporter(NamedTuple):
    """Exports a pruned network.

    Attributes:
        exporter: exports it. The reference of its parity checks is the pruned network in PyTorch.
        weights_removed, multiplications_removed: shares of those of the original network.
    """

    exporter: Exporter
    weights_removed: float
    multiplications_removed: float


def open_pruned_exporter(
    exporter: Exporter, share: float, file: Path, seconds: float, progress: Progress
) -> PrunedExporter:
    """Prune the network of an exporter, and fine-tune it or load the weights that were fine-tuned before.

    Args:
        exporter: exports the original network.
        share: the share of the channels to remove.
        file: the file of the study with the fine-tuned weights, which is written if it is not there.
        seconds: limit for the time of the fine-tuning.
        progress: called with a line of text at each step.

    Raises:
        UsageError: the network cannot be pruned.
        OutputError: the file cannot be written.
    """
    from cifarx_train.pruning import prune_channels  # imports PyTorch

    source = exporter.sources["fp32"]
    original = source.build_module()
    found = prune_channels(original, source.example_input(), share)
    history = load_weights(file, found.module, progress) or _fine_tune(found, original, source, file, seconds, progress)
    module, spec = found.module, exporter.origin.spec

    def build() -> "nn.Module":
        return copy.deepcopy(module)

    with PyTorchBackend.from_checkpoint(Checkpoint(spec, module.state_dict(), {}, build), CPU) as backend:
        tolerance = exporter.tolerances["fp32"]
        against = check_parity(exporter.reference, backend, tolerance, progress, (EVAL_BATCH_SIZE,)).summary
        reference = run_reference(backend, exporter.reference.data, progress)._replace(spec=spec)
    fact = f"{100 * share:g}% of the channels, {_describe(found)}; {history}; {_describe_cost(against)}"
    progress(f"pruned {fact}")
    name = f"{exporter.origin.name} pruned by {100 * share:g}%"
    facts = {_FACT: fact, _LIBRARY: version(_LIBRARY)}
    changed = exporter.with_network(build, reference, name, _WARNING, facts)
    return PrunedExporter(changed, found.weights_removed, found.multiplications_removed)


def _fine_tune(
    found: "PrunedNetwork",
    original: "nn.Module",
    source: ConversionSource,
    file: Path,
    seconds: float,
    progress: Progress,
) -> str:
    from cifarx_train.pruning import fine_tune_pruned

    images = load_fine_tuning_images(source)
    progress(f"pruning: fine-tuning on {len(images):,} training images for up to {seconds:.0f} s")
    steps = fine_tune_pruned(found.module, original, images, source.spec.input, seconds=seconds, progress=progress)
    history = f"fine-tuned by distillation from the network, {steps:,} steps on {len(images):,} training images"
    save_weights(file, found.module, history)
    return history


def _describe(found: "PrunedNetwork") -> str:
    return f"{found.weights_removed:.1%} of the weights and {found.multiplications_removed:.1%} of the multiplications"


def _describe_cost(against: ParitySummary) -> str:
    """Return what the pruned network costs in fp32, compared with the original one."""
    parts = [] if against.agreement is None else [f"agreement {against.agreement:.2%} with it"]
    if against.accuracy is not None and against.reference_accuracy is not None:
        points = 100 * (against.accuracy - against.reference_accuracy)
        parts.append(f"accuracy {points:+.2f} points on {against.test_images:,} test images")
    return ", ".join(parts)
