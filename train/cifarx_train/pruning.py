"""Structured pruning: remove the channels of a network that matter least, and let it learn to answer as before.

Layers whose channels belong together, as in residual sums, lose the same channels, as torch-pruning finds them
(DepGraph, Fang et al. 2023, arXiv:2301.12900). A channel matters as much as its weights are large. Each set of such
layers loses the same share of its channels: on a trained Lzh, that kept more answers than a ranking of all channels of
the network, with 30 % and with 50 % of them removed.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from cifarx_serve.errors import UsageError
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import InputSpec
from cifarx_train.logit_matching import match_logits, random_batches

MAX_SHARE: Final = 0.9

CHANNEL_MULTIPLE: Final = 16
"""Runtimes compute this many channels at once, a vector of float32 in AVX-512. Numbers between save no time."""

LEARNING_RATE: Final = 1e-3
STEPS: Final = 5000
SECONDS: Final = 120.0

_LAYERS: Final = [nn.Conv2d, nn.Linear]

_KNOWN_WARNING: Final = "Unwrapped parameters detected"
"""torch-pruning says so about parameters outside layers. Whether it treats them rightly shows when the network runs."""


class PrunedNetwork(NamedTuple):
    """A network with fewer channels.

    Attributes:
        module: the network, in eval mode, with the weights that it had before.
        weights_removed: share of the weights that it lost.
        multiplications_removed: share of the multiplications of layers that it lost.
    """

    module: nn.Module
    weights_removed: float
    multiplications_removed: float


def require_torch_pruning() -> Any:
    """Return the library torch-pruning.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise UsageError("torch-pruning is not installed", 'pip install "cifarx[prune]"') from error
    return torch_pruning


def require_share(share: float) -> None:
    """Check a share of channels to remove.

    Raises:
        UsageError: it is not above 0 and at most `MAX_SHARE`.
    """
    if not 0 < share <= MAX_SHARE:
        raise UsageError(
            f"{share:g} is no share of channels to remove",
            f"give a number above 0 and at most {MAX_SHARE:g}, such as --prune 0.3",
        )


def prune_channels(module: nn.Module, images: Tensor, share: float) -> PrunedNetwork:
    """Return a copy of a network without a share of the channels of its layers.

    The channels of its input and of its output stay, and so do those of layers with no more than `CHANNEL_MULTIPLE`.
    The same network loses the same channels each time.

    Args:
        module: the network, on the CPU.
        images: a batch as the network takes it.
        share: the share of the channels to remove, rounded per layer to leave a multiple of `CHANNEL_MULTIPLE`.

    Raises:
        UsageError: torch-pruning is not installed, or the network cannot be pruned.
    """
    library = require_torch_pruning()
    original = module.eval()
    pruned = copy.deepcopy(original)
    for parameter in pruned.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # the library traces with autograd
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", _KNOWN_WARNING)
            _remove_channels(library, pruned, images, share)
        with torch.no_grad():
            expected, found = original(images), pruned(images)
    except Exception as error:  # neither the errors of the library nor those of networks have a common base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _cannot_prune(reason) from error
    if expected.shape != found.shape or not found.isfinite().all():
        raise _cannot_prune(f"it then returns {tuple(found.shape)} instead of {tuple(expected.shape)}")
    weights_before = _weights(original)
    if _weights(pruned) == weights_before:
        raise _cannot_prune("no layer has channels that can be removed")
    return PrunedNetwork(
        pruned.eval(),
        weights_removed=1 - _weights(pruned) / weights_before,
        multiplications_removed=1 - _flops(pruned, images) / _flops(original, images),
    )


def fine_tune_pruned(
    pruned: nn.Module,
    original: nn.Module,
    images: NDArray[np.uint8],
    spec: InputSpec,
    *,
    steps: int = STEPS,
    seconds: float = SECONDS,
    progress: Progress = silent,
) -> int:
    """Fine-tune a pruned network in place, so that it answers as the original one does. Returns the number of steps.

    Batch normalization learns new statistics, because there are others with fewer channels. Dropout stays off.

    Args:
        pruned: the pruned network, on the CPU.
        original: the network before.
        images: training images at the network's input size, uint8 (N, height, width, channels).
        spec: the input of the network.
        steps: largest number of steps of 64 images.
        seconds: time after which no other step begins.
        progress: called with a line of text every few steps.

    Raises:
        UsageError: there are no images, or the network does not learn.
    """
    batches = random_batches(images, spec)
    for layer in pruned.eval().modules():
        if isinstance(layer, _BatchNorm):
            layer.train()
    losses = match_logits(
        pruned,
        original.eval(),
        batches,
        learning_rate=LEARNING_RATE,
        steps=steps,
        seconds=seconds,
        name="pruning",
        progress=progress,
    )
    pruned.eval()
    if not math.isfinite(losses[-1]):
        raise UsageError("the pruned network does not learn: its loss is not finite", "prune a smaller share")
    return len(losses)


def _remove_channels(library: Any, network: nn.Module, images: Tensor, share: float) -> None:
    graph = library.DependencyGraph().build_dependency(network, (images,))
    pruner = library.pruner.BasePruner(
        network,
        (images,),
        library.importance.GroupMagnitudeImportance(),
        pruning_ratio_dict={layer: _removed_share(layer, share) for layer in _layers(network)},
        ignored_layers=_output_layers(graph),
        in_channel_groups={},  # the defaults are shared by all pruners
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()


def _layers(network: nn.Module) -> Iterator[nn.Conv2d | nn.Linear]:
    return (layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear))


def _removed_share(layer: nn.Conv2d | nn.Linear, share: float) -> float:
    """Return the share of the channels that a layer loses."""
    channels = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    kept = CHANNEL_MULTIPLE * max(1, round(channels * (1 - share) / CHANNEL_MULTIPLE))
    if kept >= channels:
        return 0.0
    return 1 - (kept + 0.5) / channels  # the library rounds down what is kept


def _output_layers(graph: Any) -> list[nn.Module]:
    """Return a layer of each set whose channels are those of the network's output, that is, with no node after it."""
    return [
        group[0].dep.target.module
        for group in graph.get_all_groups(root_module_types=_LAYERS)
        if any(graph.is_out_channel_pruning_fn(dep.handler) and not dep.target.outputs for dep, _ in group)
    ]


def _cannot_prune(reason: str) -> UsageError:
    return UsageError(f"the network cannot be pruned ({reason})", "leave --prune out")


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(module: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images)
    flops: int = counter.get_total_flops()
    return max(1, flops)
