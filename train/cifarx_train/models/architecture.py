"""Model architectures: how to build a network for a number of classes and an image size."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import Activation, InputSpec, ModelSource
from cifarx_train.models.outputs import outputs_error, require_outputs

Stem: TypeAlias = Literal["own", "small"]
Builder: TypeAlias = Callable[[int], nn.Module]
SizedBuilder: TypeAlias = Callable[[int, InputSpec], nn.Module]
Initialize: TypeAlias = Callable[[nn.Module, Tensor], None]

RESNET_PREFIXES = ("resnet", "resnext", "wide_resnet")
"""The prefixes of the names of torchvision's ResNets, for which a small stem is available."""

_REGISTRY_KINDS = ("builtin", "torchvision")
_TRIAL_OUTPUTS = (7, 11)  # no layer of a network has these sizes for another reason
_SIZE_STEP = 32  # suggested sizes are multiples of this, because most networks halve the image five times


class SourceWeights(NamedTuple):
    """The weights that come with the source of a network.

    Attributes:
        load: returns the state dict.
        num_outputs: the number of outputs of the network with these weights; None if it is not known.
    """

    load: Callable[[], dict[str, Any]]
    num_outputs: int | None


class Architecture(NamedTuple):
    """A network that can be built for any number of classes.

    Attributes:
        name: the short name of the architecture, which is part of file names.
        stem: "own", or "small" for a torchvision ResNet whose first layers keep the size of the images.
        input: the default input, or the one that the source of the network states.
        builder: returns the module for a number of outputs and an input. Use `build`, which also checks the size.
        source: what builds the network again.
        initialize: called once before training with the module, which it changes in place, and the first training
            images as network inputs, float32 (N, 3, H, W), at most 5,000. None if there is nothing to initialize.
        class_names: the classes that the source states, in the order of their labels.
        states_input: whether `input` is what the source states, instead of a default.
        activation: what turns the outputs into scores, if the source states it.
        num_outputs: the number of outputs, if the builder cannot change it.
        weights: the weights that come with the source, if there are any.
        is_tested: whether the tests of cifarx check that the module returns one tensor in eval mode, for every size.
        convert_weights: renames the keys of a state dict in a file to those of the module, where the library of the
            network saves them under other names.
    """

    name: str
    stem: Stem
    input: InputSpec
    builder: SizedBuilder
    source: ModelSource
    initialize: Initialize | None = None
    class_names: tuple[str, ...] | None = None
    states_input: bool = False
    activation: Activation | None = None
    num_outputs: int | None = None
    weights: SourceWeights | None = None
    convert_weights: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    is_tested: bool = False

    @property
    def is_registered(self) -> bool:
        """Whether the architecture is one of cifarx's own registry, which tests check in training mode too."""
        return self.is_tested and not self.source.arguments

    def build(self, outputs: int, input: InputSpec | None = None) -> nn.Module:  # noqa: A002 - the name of the field
        """Return a new module in training mode, which maps (N, 3, height, width) to one tensor (N, outputs).

        Args:
            outputs: the number of outputs: one per class, or 1 for two classes.
            input: the input of the module. The default is the architecture's own.

        Raises:
            UsageError: the network does not support images of that size, or returns something else.
        """
        requested = input or self.input
        if self.num_outputs is not None and self.num_outputs != outputs:
            raise outputs_error(self.source, self.num_outputs, outputs)
        module = self.builder(outputs, requested)
        # Tests check the default sizes. Any other size must not fail later, during training.
        sizes = [(size.height, size.width) for size in (requested, self.input)]
        if self.source.kind in _REGISTRY_KINDS and sizes[0] != sizes[1]:
            self._check_size(module, requested)
        return module if self.is_tested else require_outputs(module, outputs, requested, self.source)

    def require_input(self, requested: InputSpec) -> None:
        """Check early that the network supports an input. Networks of other sources are checked when they are built.

        Raises:
            UsageError: the network does not support images of that size or with these channels.
        """
        if self.source.kind not in _REGISTRY_KINDS:
            return
        if requested.channels != self.input.channels or requested.layout != self.input.layout:
            raise UsageError(
                f"{self.name} takes {self.input.color} images as {self.input.layout}, not {requested.color} as "
                f"{requested.layout}",
                "leave out --color, or give a network of your own",
            )
        with torch.device("meta"):  # checks shapes without allocating memory
            self.build(2, requested)

    def find_num_outputs(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Return the number of outputs with which the module has tensors of these shapes.

        This compares the state dicts of two modules to find a dimension that depends on the number.

        Args:
            shapes: the shapes in a state dict, by key.

        Returns:
            None if the shapes do not tell, because no tensor that depends on the number has its key in `shapes`.
        """
        if self.num_outputs is not None:
            return self.num_outputs
        few, more = (_shapes(self.builder(outputs, self.input)) for outputs in _TRIAL_OUTPUTS)
        for key, shape in few.items():
            for axis, size in enumerate(shape):
                if (size, more[key][axis]) == _TRIAL_OUTPUTS and len(shapes.get(key, ())) == len(shape):
                    return shapes[key][axis]
        return None

    def _check_size(self, module: nn.Module, requested: InputSpec) -> None:
        if _supports_size(module, requested.height, requested.width):
            return
        smaller_side = min(requested.height, requested.width)
        sizes = range(_SIZE_STEP, min(self.input.height, self.input.width) + 1, _SIZE_STEP)
        smallest = next((size for size in sizes if size > smaller_side and _supports_size(module, size, size)), None)
        raise UsageError(
            f"{self.name} takes {format_size(self.input)} images, not {format_size(requested)}",
            "leave out --image-size" if smallest is None else f"use --image-size {smallest}, or leave it out",
        )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def no_small_stem_error(name: str) -> UsageError:
    """Return the error for a small stem of an architecture that has none."""
    return UsageError(f"{name} has no small stem", "leave out --stem; torchvision's ResNets have one")


def format_size(size: InputSpec) -> str:
    """Return the image size as text, height first: "32x32"."""
    return f"{size.height}x{size.width}"


def _supports_size(module: nn.Module, height: int, width: int) -> bool:
    """Return whether the module accepts images of that size.

    The forward pass runs on the meta device, which computes only shapes. The module is not changed.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta_state = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    images = torch.empty(2, 3, height, width, device="meta")
    try:
        with torch.no_grad():
            torch.func.functional_call(module, meta_state, (images,))
    except (RuntimeError, ValueError, IndexError, AssertionError):  # modules raise any of these for a wrong shape
        return False
    return True
