"""Networks by name."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, TypeAlias

from torch import nn

from cifarx_serve.errors import unknown
from cifarx_serve.spec import InputSpec

Builder: TypeAlias = Callable[[int], nn.Module]


class Network(NamedTuple):
    """How to build a network for a number of classes, and the input it takes."""

    build: Builder
    input: InputSpec


_networks: dict[str, Network] = {}


def register_model(name: str, input_spec: InputSpec) -> Callable[[Builder], Builder]:
    """Decorates the builder of a network: `builder(classes)` gives a module with logits (N, classes)."""

    def register(builder: Builder) -> Builder:
        _networks[name] = Network(builder, input_spec)
        return builder

    return register


def model_names() -> list[str]:
    """Every network that can be asked for, sorted."""
    import_module("cifarx_train.models")  # registers them; not at the top, for they import this module
    return sorted(_networks)


def network(name: str) -> Network:
    """The network of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in model_names():
        raise unknown("model", name, model_names())
    return _networks[name]
