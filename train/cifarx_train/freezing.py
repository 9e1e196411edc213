"""Train only a part of a model: freeze parameters by name, and the statistics of their BatchNorm layers."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_train.models.outputs import unwrapped


def freeze(module: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Freeze the parameters whose names match one of the patterns, in place.

    Args:
        module: the model.
        patterns: glob patterns, in which `*` also matches dots.

    Returns:
        The layers that have to stay in eval mode so that their statistics do not move: those of which all parameters
        match, or, without any parameters, all buffers.

    Raises:
        UsageError: a pattern matches no parameter, or nothing is left to train.
    """
    network = unwrapped(module)
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            names = dict.fromkeys(name.partition(".")[0] for name in parameters)
            raise UsageError(
                f"--freeze {pattern} matches no parameter",
                f"use a pattern such as '{next(iter(names))}*'; the names start with {', '.join(names)}",
            )
    for name, parameter in parameters.items():
        if _matches(name, patterns):
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise UsageError(f"--freeze {','.join(patterns)} leaves nothing to train", "freeze fewer layers")
    return [
        layer
        for name, layer in network.named_modules()
        if hasattr(layer, "running_mean") and _is_frozen(name, layer, patterns)
    ]


def _is_frozen(name: str, layer: nn.Module, patterns: Iterable[str]) -> bool:
    own = [key for key, _ in layer.named_parameters(recurse=False)] or [key for key, _ in layer.named_buffers()]
    return all(_matches(f"{name}.{key}".lstrip("."), patterns) for key in own)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
