"""Identify the architecture of a state dict from the names and shapes of its tensors."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_train.models.architecture import RESNET_PREFIXES, Stem
from cifarx_train.models.registry import get_architecture, list_models

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = dict[str, Shape]

_CLASSES: Final = 9973  # stands for the number of classes in the shapes of an architecture; no layer has this size
_TRAINING_ONLY: Final = ("aux1.", "aux2.", "AuxLogits.")  # auxiliary heads of torchvision's Inception networks
_COUNTER: Final = "num_batches_tracked"  # not saved by PyTorch before 0.4.1, and not used for inference
_MIN_SIMILARITY: Final = 0.5


class ArchitectureMatch(NamedTuple):
    """An architecture and how its keys correspond to those of a file.

    Attributes:
        model: the name of the architecture.
        stem: the stem of the architecture.
        classes: the number of classes.
        keys: the key in the file for each key of the architecture. Missing counters have none.
        dtypes: the dtype of each tensor of the architecture, in the order of its state dict.
    """

    model: str
    stem: Stem
    classes: int
    keys: dict[str, str]
    dtypes: dict[str, torch.dtype]


class _Candidate(NamedTuple):
    match: ArchitectureMatch
    mismatches: tuple[str, ...]
    distance: int


def identify_architecture(shapes: Shapes, path: object, model: str | None = None) -> ArchitectureMatch:
    """Return the architecture whose state dict has these names and shapes.

    Args:
        shapes: the shapes in the file, by key.
        path: the file, for error messages.
        model: the name of the architecture, if it is known.

    Raises:
        UsageError: several architectures match, or there is no architecture named `model`.
        ModelFileError: no architecture matches. The message describes the mismatches of the closest one.
    """
    names = [model] if model else _similar_models(shapes)
    candidates = [_compare(name, stem, shapes) for name in names for stem in _stems(name)]
    matches = [candidate.match for candidate in candidates if not candidate.mismatches]
    if len(matches) > 1:
        matching = ", ".join(sorted({match.model for match in matches}))
        problem = f"the weights in {path} match several architectures ({matching})"
        raise UsageError(problem, "select the architecture with --model")
    if matches:
        return matches[0]
    closest = min(candidates, key=lambda candidate: candidate.distance, default=None)
    if closest is None or (not model and closest.distance > len(closest.match.keys)):
        raise ModelFileError(f"the weights in {path} do not match any known architecture", "see `cifarx train --help`")
    name, mismatches = closest.match.model, "; ".join(closest.mismatches)
    if model:
        raise ModelFileError(
            f"the weights in {path} do not match {name} ({mismatches})", "select another architecture with --model"
        )
    raise ModelFileError(
        f"the weights in {path} do not match any known architecture; the closest is {name} ({mismatches})",
        "use a complete state_dict(), or select the architecture with --model",
    )


def _stems(name: str) -> tuple[Stem, ...]:
    return ("own", "small") if name.startswith(RESNET_PREFIXES) else ("own",)


# --- candidates


def _similar_models(shapes: Shapes) -> list[str]:
    """Return the architectures of the families with similar keys. Comparing all of them would take seconds."""
    families: dict[str, list[str]] = {}
    for name in list_models():
        families.setdefault(_family(name), []).append(name)
    patterns = _key_patterns(shapes)
    return [
        name
        for members in families.values()
        if _similarity(patterns, _key_patterns(_meta_state_dict(members[0], "own"))) >= _MIN_SIMILARITY
        for name in members
    ]


def _family(name: str) -> str:
    """Return the family of an architecture: `vgg` for `vgg16_bn`, but `mobilenet_v3` and `regnet_x` are families."""
    family = re.match(r"[a-z]+(_v\d|_[xy])?", name)
    return family.group() if family else name


def _key_patterns(keys: Iterable[str]) -> set[str]:
    """Return the keys without their common prefix and with `#` instead of numbers."""
    return {re.sub(r"\d+", "#", key) for key in _strip_common_prefix(keys).values() if not key.endswith(_COUNTER)}


def _similarity(a: set[str], b: set[str]) -> float:
    """Return the Jaccard index of two sets."""
    return len(a & b) / max(1, len(a | b))


def _strip_common_prefix(keys: Iterable[str]) -> dict[str, str]:
    """Map each key to the key without the prefix that all keys share: `net.layers.0.weight` becomes `0.weight`."""
    stripped = {key: key for key in keys}
    while all("." in key for key in stripped.values()) and _have_common_prefix(stripped.values()):
        stripped = {key: rest.partition(".")[2] for key, rest in stripped.items()}
    return stripped


def _have_common_prefix(keys: Iterable[str]) -> bool:
    return len({key.partition(".")[0] for key in keys}) == 1


# --- comparison with one architecture


def _compare(name: str, stem: Stem, shapes: Shapes) -> _Candidate:
    """Compare the keys as they are and without their common prefix, and return the closer comparison."""
    own = {key: tuple(tensor.shape) for key, tensor in _meta_state_dict(name, stem).items()}
    unchanged = _compare_keys(name, stem, own, shapes, {key: key for key in own}, {key: key for key in shapes})
    stripped = _compare_keys(name, stem, own, shapes, _strip_common_prefix(own), _strip_common_prefix(shapes))
    return min(unchanged, stripped, key=lambda candidate: candidate.distance)


def _compare_keys(
    name: str,
    stem: Stem,
    own: Shapes,
    shapes: Shapes,
    own_stripped: dict[str, str],
    file_stripped: dict[str, str],
) -> _Candidate:
    in_file = {stripped: key for key, stripped in file_stripped.items()}
    keys = {key: in_file[stripped] for key, stripped in own_stripped.items() if stripped in in_file}
    classes = next((shapes[keys[key]][0] for key in own if key in keys and own[key][:1] == (_CLASSES,)), 0)
    expected = {key: tuple(classes if size == _CLASSES else size for size in shape) for key, shape in own.items()}
    missing = [key for key in own if key not in keys and not key.endswith(_COUNTER)]
    matched = set(keys.values())
    unexpected = [key for key in shapes if key not in matched and not file_stripped[key].startswith(_TRAINING_ONLY)]
    wrong_shape = [
        f"{file_key} has shape {list(shapes[file_key])} instead of {list(expected[key])}"
        for key, file_key in keys.items()
        if shapes[file_key] != expected[key]
    ]
    mismatches = (("missing ", missing), ("unexpected ", unexpected), ("", wrong_shape))
    messages = tuple(f"{kind}{_first_of(items)}" for kind, items in mismatches if items)
    dtypes = {key: tensor.dtype for key, tensor in _meta_state_dict(name, stem).items()}
    match = ArchitectureMatch(name, stem, classes, keys, dtypes)
    return _Candidate(match, messages, len(missing) + len(unexpected) + len(wrong_shape))


def _first_of(items: list[str]) -> str:
    return items[0] + (f" (and {len(items) - 1} more)" if len(items) > 1 else "")


# --- shapes of an architecture


class _EmptyOnMeta(TorchFunctionMode):
    """Creates parameters on the meta device, without memory or initialization.

    `torch.device("meta")` would move all tensors there, including those with which torchvision computes layer sizes.
    """

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        return func(*args, **({**options, "device": "meta"} if func is torch.empty else options))


@cache
def _meta_state_dict(name: str, stem: Stem) -> dict[str, torch.Tensor]:
    """Return the state dict of an architecture with `_CLASSES` classes, on the meta device."""
    with _EmptyOnMeta():
        module = get_architecture(name, stem=stem).build(_CLASSES)
    return {key: tensor.to("meta") for key, tensor in module.state_dict().items()}
