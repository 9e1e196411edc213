"""The registry of architectures: the built-in ones, each in a module of this package, and torchvision's classifiers."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from cifarx_serve.errors import UsageError, unknown_name_error
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.architecture import Architecture, Builder, Initialize, Stem, no_small_stem_error

_architectures: dict[str, Architecture] = {}
_NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


def register_model(
    name: str, input_spec: InputSpec, initialize: Initialize | None = None
) -> Callable[[Builder], Builder]:
    """Return a decorator that registers a function `builder(classes)`, which returns a module with logits (N, classes).

    The module may also return several tensors, of which one is the logits, see `outputs.require_outputs`.

    Args:
        name: the name of the architecture.
        input_spec: the default input.
        initialize: see `Architecture`.
    """

    def register(builder: Builder) -> Builder:
        source = ModelSource(kind="builtin", name=name)
        _architectures[name] = Architecture(
            name,
            "own",
            input_spec,
            lambda classes, _input: builder(classes),
            source,
            initialize,
            is_tested=builder.__module__.startswith(f"{__package__}."),
        )
        return builder

    return register


def list_models() -> list[str]:
    """Return the names of all architectures, sorted. Imports torchvision, which takes seconds."""
    from cifarx_train.models.torchvision_models import list_classifiers

    return sorted({*_builtin_architectures(), *list_classifiers()})


def get_architecture(name: str, *, stem: Stem = "own", arguments: Mapping[str, Any] = _NO_ARGUMENTS) -> Architecture:
    """Return the architecture with a name. Imports torchvision only if the name is not that of a built-in one.

    Args:
        name: the name of the architecture.
        stem: "small" for a torchvision ResNet with a stem for small images.
        arguments: keyword arguments of torchvision's builder.

    Raises:
        UsageError: there is no architecture with that name, or it has no small stem or takes no such arguments.
    """
    builtin = _builtin_architectures()
    if name not in builtin:
        from cifarx_train.models.torchvision_models import classifier_architecture, list_classifiers

        if name not in list_classifiers():
            raise unknown_name_error("model", name, list_models())
        return classifier_architecture(name, stem, arguments)
    if stem == "small":
        raise no_small_stem_error(name)
    if arguments:
        raise UsageError(f"{name} takes no argument {next(iter(arguments))}", "leave out --model-arg")
    return builtin[name]


def is_registered(name: str) -> bool:
    """Return whether there is an architecture with that name. Imports torchvision if it is not a built-in one."""
    if name in _builtin_architectures():
        return True
    from cifarx_train.models.torchvision_models import list_classifiers

    return name in list_classifiers()


def _builtin_architectures() -> dict[str, Architecture]:
    import_module("cifarx_train.models")  # registers them; imported here because they import this module
    return _architectures
