"""Find the networks of the registry whose state dict has the names and shapes of the weights in a file.

Names and shapes do not identify a network: strides, padding, pooling, eps, activations and options leave no trace in
them. So the candidates are only proposed, and the user states which of them it is.
"""

import re
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cifarx_serve.errors import CifarxError, ModelFileError, UsageError
from cifarx_train.checkpoints.external.key_matching import (
    KeyMatch,
    Shape,
    Shapes,
    common_prefix,
    describe_mismatches,
    match_keys,
    splits,
    wrong_shapes,
)
from cifarx_train.checkpoints.external.layer_settings import same_settings
from cifarx_train.models.architecture import RESNET_PREFIXES, Architecture, Stem
from cifarx_train.models.registry import get_architecture, list_models

STEM_ARGUMENT: Final = "stem"
"""The argument that selects the small stem of a ResNet."""

_OUTPUTS: Final = 9973  # stands for the number of outputs in the shapes of a network; no layer has this size
_COUNTER: Final = "num_batches_tracked"
_MIN_SIMILARITY: Final = 0.5
_REMEDY: Final = "name the network with --model, such as --model FILE.py:CALLABLE for your own code"

# What can differ between networks with the same weights, and the layers that it applies to.
_DIFFERENCES: Final = (
    ("strides and padding", (nn.Conv2d,)),
    ("pooling", (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)),
    ("eps", (nn.BatchNorm2d, nn.LayerNorm)),
)
_INITIALIZATION: Final = re.compile(r"((kaiming|xavier|trunc)_)?(normal|uniform)_|(ones|zeros|constant|fill|zero)_")
_OPTIONS: Final = ("transform_input",)
"""Options of torchvision's networks that change their answers and not their weights."""


class Candidate(NamedTuple):
    """A network of the registry, compared with the weights in a file.

    Attributes:
        name: its name.
        stem: its stem.
        mismatches: a description of what does not fit, or an empty string.
        distance: the number of tensors that do not fit.
        size: the number of tensors of the network.
    """

    name: str
    stem: Stem
    mismatches: str
    distance: int
    size: int

    @property
    def option(self) -> str:
        """The option of the command line that selects the network."""
        return f"--model {self.name}" + (f" --model-arg {STEM_ARGUMENT}=small" if self.stem == "small" else "")

    @property
    def description(self) -> str:
        """The name, and a description of the stem if it is not torchvision's."""
        stem = " with a small stem (3x3, stride 1, no max-pooling)" if self.stem == "small" else ""
        return f"{self.name}{stem}"


def find_candidates(shapes: Shapes) -> list[Candidate]:
    """Return the networks that are similar to the weights, the closest first.

    Args:
        shapes: the shapes in the file, by key.
    """
    found = [_compare(name, stem, shapes) for name in _similar_models(shapes) for stem in stems(name)]
    return sorted(found, key=lambda candidate: candidate.distance)


def stems(name: str) -> tuple[Stem, ...]:
    """Return the stems of a network."""
    return ("own", "small") if name.startswith(RESNET_PREFIXES) else ("own",)


def fits_small_stem(name: str, shapes: Shapes) -> bool:
    """Return whether weights fit the network of this name if it has a small stem."""
    return "small" in stems(name) and not _compare(name, "small", shapes).distance


class SimilarNetwork(NamedTuple):
    """A network of the registry with the same weights as a module, and whether its layers have the same settings."""

    architecture: Architecture
    same_settings: bool


def find_similar_network(module: nn.Module, outputs: int) -> SimilarNetwork | None:
    """Return the network of the registry that is most similar to a module, or None if no weights fit.

    Args:
        module: the module.
        outputs: the number of its outputs.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    similar = []
    for candidate in find_candidates(shapes):
        if not candidate.distance:
            architecture = get_architecture(candidate.name, stem=candidate.stem)
            with EmptyOnMeta():
                built = architecture.builder(outputs, architecture.input)
            similar.append(SimilarNetwork(architecture, same_settings(module, built)))
    return max(similar, key=lambda network: network.same_settings, default=None)


def missing_network_error(path: Path, shapes: Shapes, mentioned: str | None) -> CifarxError:
    """Return the error for a file that contains weights without their network. It proposes the networks that fit.

    Args:
        path: the file.
        shapes: the shapes in the file, by key.
        mentioned: the name of a network that the file mentions, such as timm's `arch`.
    """
    candidates = find_candidates(shapes)
    fitting = [candidate for candidate in candidates if not candidate.distance]
    called = f", which it calls {mentioned}" if mentioned else ""
    problem = f"{path} contains weights without their network{called}"
    if fitting:
        names = " or ".join(candidate.description for candidate in fitting)
        options = " or ".join(candidate.option for candidate in fitting)
        return UsageError(
            f"{problem}; names and shapes fit {names}, but do not say {_differences(fitting[0])}",
            f"if it is exactly this network, state it with {options}, otherwise with --model FILE.py:CALLABLE",
        )
    problem += "; they do not fit any network that cifarx knows"
    if candidates and candidates[0].distance <= candidates[0].size:
        problem += f", the closest is {candidates[0].description} ({candidates[0].mismatches})"
    return ModelFileError(problem, _REMEDY if mentioned is None else _timm_remedy(mentioned))


def _timm_remedy(name: str) -> str:
    """Return what to do if the file names a network that may be one of timm, whose own files do so."""
    model = shlex.quote(f"timm/{name}")
    return f"state it with --model {model} if it is timm's, otherwise with --model FILE.py:CALLABLE"


def _differences(candidate: Candidate) -> str:
    """Return what the weights do not say about a network."""
    layers = list(_meta_module(candidate.name, candidate.stem).modules())
    kinds = [text for text, types in _DIFFERENCES if any(isinstance(layer, types) for layer in layers)]
    options = [name for name in _OPTIONS if hasattr(layers[0], name)]
    return f"{', '.join([*kinds, 'activations'])} or options{f' such as {options[0]}' if options else ''}"


# --- similar networks


def _similar_models(shapes: Shapes) -> list[str]:
    """Return the networks of the families with similar keys. Comparing all of them would take seconds."""
    families: dict[str, list[str]] = {}
    for name in list_models():
        families.setdefault(_family(name), []).append(name)
    size = len(_patterns(shapes))
    endings = _patterns(rest for key in shapes for _, rest in splits(key))
    similar = []
    for members in families.values():
        own = list(_meta_shapes(members[0], "own"))
        prefix = common_prefix(own)
        patterns = _patterns(key.removeprefix(prefix) for key in own)
        if len(patterns & endings) >= _MIN_SIMILARITY * max(len(patterns), size):
            similar += members
    return similar


def _family(name: str) -> str:
    """Return the family of a network: `vgg` for `vgg16_bn`, but `mobilenet_v3` and `regnet_x` are families."""
    family = re.match(r"[a-z]+(_v\d|_[xy])?", name)
    return family.group() if family else name


def _patterns(keys: Iterable[str]) -> set[str]:
    """Return the keys with `#` instead of numbers."""
    return {re.sub(r"\d+", "#", key) for key in keys if not key.endswith(_COUNTER)}


def _compare(name: str, stem: Stem, shapes: Shapes) -> Candidate:
    own = _meta_shapes(name, stem)
    match = match_keys(own, shapes)
    expected = _with_outputs(own, match, shapes)
    wrong = wrong_shapes(match, expected, shapes)
    return Candidate(name, stem, describe_mismatches(match, wrong), match.distance + len(wrong), len(own))


def _with_outputs(own: Shapes, match: KeyMatch, shapes: Shapes) -> dict[str, Shape]:
    """Return the shapes of a network with the number of outputs that the file has."""
    outputs = next((shapes[match.keys[key]][0] for key in own if key in match.keys and own[key][:1] == (_OUTPUTS,)), 0)
    return {key: tuple(outputs if size == _OUTPUTS else size for size in shape) for key, shape in own.items()}


# --- shapes of a network


class EmptyOnMeta(TorchFunctionMode):
    """Creates parameters on the meta device, without memory or initialization.

    `torch.device("meta")` would move all tensors there, including those with which torchvision computes layer sizes.
    """

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**options, "device": "meta"})
        if _INITIALIZATION.fullmatch(getattr(func, "__name__", "")):
            tensor = args[0] if args else options["tensor"]
            if tensor.device.type == "meta":
                return tensor
        return func(*args, **options)


@cache
def _meta_module(name: str, stem: Stem) -> nn.Module:
    """Return a network with `_OUTPUTS` outputs, on the meta device."""
    architecture = get_architecture(name, stem=stem)
    with EmptyOnMeta():
        return architecture.builder(_OUTPUTS, architecture.input)


@cache
def _meta_shapes(name: str, stem: Stem) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in _meta_module(name, stem).state_dict().items()}
