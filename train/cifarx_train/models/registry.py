"""Networks by name: our own, each a module of this package, and torchvision's classifiers."""

from collections.abc import Callable
from importlib import import_module
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from cifarx_serve.errors import UsageError, unknown
from cifarx_serve.spec import InputSpec
from cifarx_train.models.sizes import check_size

Stem: TypeAlias = Literal["own", "small"]
Builder: TypeAlias = Callable[[int], nn.Module]
SizedBuilder: TypeAlias = Callable[[int, InputSpec], nn.Module]
Initialise: TypeAlias = Callable[[nn.Module, Tensor], None]


class Network(NamedTuple):
    """How to build a network, and what it takes.

    Attributes:
        name: as it was asked for.
        stem: "own", or "small" for a torchvision ResNet whose first layers keep the images' size.
        input: the input it takes unless told otherwise.
        builder: gives the module for a number of classes and an input; `build` also checks the size.
        initialise: None, or called once before training with the module and the first training images as network
            inputs, float32 (N, 3, H, W), at most 5,000; changes the module in place.
    """

    name: str
    stem: Stem
    input: InputSpec
    builder: SizedBuilder
    initialise: Initialise | None = None

    def build(self, classes: int, input: InputSpec | None = None) -> nn.Module:  # noqa: A002 - the field's name
        """A new module in training mode: (N, 3, height, width) in, logits (N, classes) out.

        Args:
            classes: how many logits.
            input: what it is to take; the network's own input when None.

        Raises:
            UsageError: the network does not work on images of that size.
        """
        wanted = input or self.input
        module = self.builder(classes, wanted)
        # The default sizes are known to work: tests hold that. Any other must not fail in the midst of training.
        if (wanted.height, wanted.width) != (self.input.height, self.input.width):
            check_size(self.name, module, wanted, self.input)
        return module


_networks: dict[str, Network] = {}


def register_model(
    name: str, input_spec: InputSpec, initialise: Initialise | None = None
) -> Callable[[Builder], Builder]:
    """Decorates the builder of one of our own networks: `builder(classes)` gives a module with logits (N, classes).

    Args:
        name: what it is asked for by.
        input_spec: the input it takes unless told otherwise.
        initialise: as in `Network`.
    """

    def register(builder: Builder) -> Builder:
        _networks[name] = Network(name, "own", input_spec, lambda classes, _input: builder(classes), initialise)
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


def no_small_stem(name: str) -> UsageError:
    """The error for a small stem where there is none."""
    return UsageError(f"{name} has no small stem", "leave out --stem; torchvision's ResNets have one")


def _own_networks() -> dict[str, Network]:
    import_module("cifarx_train.models")  # registers them; not at the top, for they import this module
    return _networks
