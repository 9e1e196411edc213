"""Which network a file's weights are of, by their names and shapes."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_train.models.network import RESNETS, Stem
from cifarx_train.models.registry import model_names, network

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = dict[str, Shape]

_CLASSES: Final = 9973  # in a sketch's shapes this stands for the number of classes; no layer has as many rows
_TRAINING_ONLY: Final = ("aux1.", "aux2.", "AuxLogits.")  # further outputs of torchvision's Inceptions, for training
_COUNTER: Final = "num_batches_tracked"  # PyTorch before 0.4.1 saved none, and it is not used to answer


class Match(NamedTuple):
    """A network and how a file names its weights.

    Attributes:
        model, stem: the network, as `network` takes it.
        classes: how many it tells apart.
        keys: the file's name for each of the network's own.
        types: the network's own weights in its order, counters too that the file may lack.
    """

    model: str
    stem: Stem
    classes: int
    keys: dict[str, str]
    types: dict[str, torch.dtype]


class _Fit(NamedTuple):
    match: Match
    faults: tuple[str, ...]
    distance: int


def identify_architecture(shapes: Shapes, path: object, model: str | None = None) -> Match:
    """The network whose weights have these names and shapes.

    Args:
        shapes: of a file, by the file's names.
        path: the file, for errors.
        model: the network's name, where it is known.

    Raises:
        UsageError: several networks have just these weights, or no network is called `model`.
        ModelFileError: none has; the error says what the nearest lacks.
    """
    names = [model] if model else _likely(shapes)
    fits = [_fit(name, stem, shapes) for name in names for stem in _stems(name)]
    whole = [fit.match for fit in fits if not fit.faults]
    if len(whole) > 1:
        told = ", ".join(sorted({match.model for match in whole}))
        raise UsageError(f"the weights in {path} may be of any of {told}", "name one with --model")
    if whole:
        return whole[0]
    nearest = min(fits, key=lambda fit: fit.distance, default=None)
    if nearest is None or (not model and nearest.distance > len(nearest.match.keys)):
        raise ModelFileError(f"the weights in {path} are of no network that cifarx knows", "see `cifarx train --help`")
    name, faults = nearest.match.model, "; ".join(nearest.faults)
    if model:
        raise ModelFileError(f"the weights in {path} are not those of {name} ({faults})", "name another with --model")
    raise ModelFileError(
        f"the weights in {path} are of no network that cifarx knows; {name} is nearest ({faults})",
        "give a whole state_dict(), or name its network with --model",
    )


def _stems(name: str) -> tuple[Stem, ...]:
    return ("own", "small") if name.startswith(RESNETS) else ("own",)


# --- which networks are worth a closer look


def _likely(shapes: Shapes) -> list[str]:
    """The networks of the families that name their weights as the file does: to sketch all takes seconds."""
    families: dict[str, list[str]] = {}
    for name in model_names():
        families.setdefault(_family(name), []).append(name)
    found = _skeleton(shapes)
    return [
        name
        for members in families.values()
        if _overlap(found, _skeleton(_sketch(members[0], "own"))) >= 0.5
        for name in members
    ]


def _family(name: str) -> str:
    """`vgg` of `vgg16_bn`; what has a version in its name, or a letter for its kind, is a family of its own."""
    kind = re.match(r"[a-z]+(_v\d|_[xy])?", name)
    return kind.group() if kind else name


def _skeleton(shapes: Iterable[str]) -> set[str]:
    """The names without numbers, and without what a wrapper puts before them all."""
    return {re.sub(r"\d+", "#", key) for key in _bare(shapes).values() if not key.endswith(_COUNTER)}


def _overlap(one: set[str], other: set[str]) -> float:
    return len(one & other) / max(1, len(one | other))


def _bare(keys: Iterable[str]) -> dict[str, str]:
    """Each key without what all have before them: `model.0.weight` is the same as `net.module1.0.weight`."""
    bare = {key: key for key in keys}
    while len({key.partition(".")[0] for key in bare.values()}) == 1 and all("." in key for key in bare.values()):
        bare = {key: rest.partition(".")[2] for key, rest in bare.items()}
    return bare


# --- one network against the file


def _fit(name: str, stem: Stem, shapes: Shapes) -> _Fit:
    """By the names as they are, or without what all have before them, whichever is nearer."""
    own = {key: tuple(tensor.shape) for key, tensor in _sketch(name, stem).items()}
    as_they_are = _compare(name, stem, own, shapes, {key: key for key in own}, {key: key for key in shapes})
    bare = _compare(name, stem, own, shapes, _bare(own), _bare(shapes))
    return min(as_they_are, bare, key=lambda fit: fit.distance)


def _compare(
    name: str, stem: Stem, own: Shapes, shapes: Shapes, own_bare: dict[str, str], file_bare: dict[str, str]
) -> _Fit:
    in_file = {bare: key for key, bare in file_bare.items()}
    keys = {key: in_file[bare] for key, bare in own_bare.items() if bare in in_file}
    classes = next((shapes[keys[key]][0] for key in own if key in keys and own[key][:1] == (_CLASSES,)), 0)
    expected = {key: tuple(classes if size == _CLASSES else size for size in shape) for key, shape in own.items()}
    lacking = [key for key in own if key not in keys and not key.endswith(_COUNTER)]
    known = set(keys.values())
    extra = [key for key in shapes if key not in known and not file_bare[key].startswith(_TRAINING_ONLY)]
    wrong = [
        f"{file} of shape {list(shapes[file])} instead of {list(expected[key])}"
        for key, file in keys.items()
        if shapes[file] != expected[key]
    ]
    faults = (("it lacks", lacking), ("it has besides", extra), ("it has", wrong))
    told = tuple(f"{what} {_some(items)}" for what, items in faults if items)
    types = {key: tensor.dtype for key, tensor in _sketch(name, stem).items()}
    return _Fit(Match(name, stem, classes, keys, types), told, len(lacking) + len(extra) + len(wrong))


def _some(items: list[str]) -> str:
    return items[0] + (f" (and {len(items) - 1} more)" if len(items) > 1 else "")


# --- shapes without weights


class _Weightless(TorchFunctionMode):
    """New parameters take no memory and no time. Only they: torchvision's builders compute with other tensors."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        return func(*args, **({**options, "device": "meta"} if func is torch.empty else options))


@cache
def _sketch(name: str, stem: Stem) -> dict[str, torch.Tensor]:
    with _Weightless():
        module = network(name, stem=stem).build(_CLASSES)
    return {key: tensor.to("meta") for key, tensor in module.state_dict().items()}
