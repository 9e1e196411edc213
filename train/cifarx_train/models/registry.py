"""Networks by name: our own, each a module of this package, and torchvision's classifiers."""

from collections.abc import Callable
from importlib import import_module

from cifarx_serve.errors import unknown
from cifarx_serve.spec import InputSpec
from cifarx_train.models.network import Builder, Initialize, Network, Stem, no_small_stem

_networks: dict[str, Network] = {}


def register_model(
    name: str, input_spec: InputSpec, initialize: Initialize | None = None
) -> Callable[[Builder], Builder]:
    """Decorates the builder of one of our own networks: `builder(classes)` gives a module with logits (N, classes).

    Args:
        name: what it is asked for by.
        input_spec: the input it takes unless told otherwise.
        initialize: as in `Network`.
    """

    def register(builder: Builder) -> Builder:
        _networks[name] = Network(name, "own", input_spec, lambda classes, _input: builder(classes), initialize)
        return builder

    return register


def model_names() -> list[str]:
    """Every network that can be asked for, sorted. Imports torchvision, which takes seconds."""
    from cifarx_train.models.torchvision_models import classifier_names

    return sorted({*_own_networks(), *classifier_names()})


def network(name: str, *, stem: Stem = "own") -> Network:
    """The network of that name; torchvision is imported only for a name that is none of ours.

    Raises:
        UsageError: there is none, or it has no small stem.
    """
    own = _own_networks()
    if name not in own:
        from cifarx_train.models.torchvision_models import classifier, classifier_names

        if name not in classifier_names():
            raise unknown("model", name, model_names())
        return classifier(name, stem)
    if stem == "small":
        raise no_small_stem(name)
    return own[name]


def _own_networks() -> dict[str, Network]:
    import_module("cifarx_train.models")  # registers them; not at the top, for they import this module
    return _networks
