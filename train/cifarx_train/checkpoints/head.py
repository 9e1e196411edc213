"""The head of a network: the layer that turns features into one value per class."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.checkpoints.external.candidates import EmptyOnMeta
from cifarx_train.models.architecture import Architecture

_TRIAL_OUTPUTS: Final = (7, 11)  # no layer of a network has these sizes for another reason


def head_keys(architecture: Architecture, size: InputSpec) -> frozenset[str]:
    """Return the keys in the state dict of the parameters that depend on the number of classes.

    Two networks with different numbers of classes are compared. Of a network whose number cannot be changed, it is the
    last layer with that number of outputs.

    Args:
        architecture: the network.
        size: its input.

    Raises:
        UsageError: there is no such layer.
    """
    if architecture.num_outputs is not None:
        keys = _last_layer(build_without_memory(architecture, architecture.num_outputs, size), architecture.num_outputs)
    else:
        few, more = (build_without_memory(architecture, outputs, size).state_dict() for outputs in _TRIAL_OUTPUTS)
        keys = frozenset(key for key, tensor in few.items() if tensor.shape != more[key].shape)
    if not keys:
        raise UsageError(
            f"{architecture.source.name} has no layer whose size is the number of classes",
            "use a network with a linear layer or a convolution at its end",
        )
    return keys


def build_without_memory(architecture: Architecture, outputs: int, size: InputSpec) -> nn.Module:
    """Return the network to look at its shapes. Networks of other sources than the registry may need real tensors."""
    registered = architecture.source.kind in ("builtin", "torchvision")
    context: AbstractContextManager[Any] = EmptyOnMeta() if registered else nullcontext()
    with context, torch.random.fork_rng(devices=[]):
        return architecture.builder(outputs, size)


def _last_layer(module: nn.Module, outputs: int) -> frozenset[str]:
    layers = [
        name
        for name, layer in module.named_modules()
        if isinstance(weight := getattr(layer, "weight", None), nn.Parameter)
        and weight.ndim > 1
        and len(weight) == outputs
    ]
    return frozenset(key for key in module.state_dict() if layers and key.rpartition(".")[0] == layers[-1])
