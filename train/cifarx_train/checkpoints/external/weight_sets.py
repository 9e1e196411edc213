"""Find the weights in the content of a checkpoint, and choose one set if there are several."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_train.checkpoints.external.module_stub import (
    as_plain_dict,
    attributes,
    check_name,
    is_averaged_model,
    is_module,
    module_state_dict,
    unwrap,
)
from cifarx_train.checkpoints.external.pickle_machine import ObjectStub
from cifarx_train.checkpoints.external.torch_file import REMEDY

_WEIGHTS_KEYS: Final = frozenset(
    {"state_dict", "model_state_dict", "model_state", "model", "net", "network", "net_state_dict", "weights"}
    | {"model_weights", "params", "parameters", "module", "teacher", "student", "current_model_state", "backbone"}
)
"""The keys under which training programs save weights."""

# Words in the key of weights that are an average over several training steps, usually the better ones.
_AVERAGE: Final = re.compile(r"(^|[^a-z])(ema|ewma|swa|averaged?|avg|shadow|polyak)([^a-z]|$)")
_OTHER_STATE: Final = re.compile(r"optim|sched|scaler|criterion|loss|rng|random|metric|callback|discriminator")
_MAX_DEPTH: Final = 3
_MAX_SEARCHED: Final = 1_000_000


class WeightSet(NamedTuple):
    """A set of weights in a file.

    Attributes:
        key: its key, such as `state_dict` or `checkpoint.model`; an empty string for the file as a whole.
        content: a state dict, whose values are not checked, or a module.
        averaged: whether it is an average over several training steps.
    """

    key: str
    content: dict[Any, Any] | ObjectStub
    averaged: bool

    @property
    def description(self) -> str:
        """The key, and whether the weights are averaged."""
        return f"{self.key or 'the file'}{' (EMA)' if self.averaged else ''}"

    def module(self) -> ObjectStub | None:
        """Return the module without wrappers, or None for a state dict."""
        return unwrap(self.content) if isinstance(self.content, ObjectStub) else None

    def tensors(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the state dict. Values that are not tensors are left out.

        Raises:
            ModelFileError: a name is invalid, or a tensor is quantized or otherwise special.
        """
        content = self.content
        items = module_state_dict(path, unwrap(content)) if isinstance(content, ObjectStub) else content.items()
        found = {}
        for key, value in items:
            check_name(path, key)
            if isinstance(value, torch.Tensor):
                found[key] = require_dense(path, key, value)
            else:
                _refuse_special_tensor(path, key, value)
        return found

    def other_values(self) -> list[str]:
        """Return the keys of a state dict whose values are not tensors."""
        if isinstance(self.content, ObjectStub):
            return []
        return [str(key) for key, value in self.content.items() if not isinstance(value, torch.Tensor)]


def find_weights(path: Path, content: Any, weights_key: str | None) -> tuple[WeightSet, list[WeightSet]]:
    """Return the weights to use, and the other sets in the file.

    Averaged weights are preferred. A whole model is preferred to a state dict with the same weights.

    Args:
        path: the file, for messages.
        content: the content of the file.
        weights_key: the key that the user chose, or None.

    Raises:
        ModelFileError: the file contains no weights.
        UsageError: there are no weights under `weights_key`, or several sets that differ and no key.
    """
    sets = list(_Search(path).find(content, "", 0))
    if not sets:
        raise ModelFileError(f"{path} is not a cifarx checkpoint and contains no weights of a network", REMEDY)
    if weights_key is not None:
        chosen = next((found for found in sets if found.key == weights_key), None) or next(
            (found for found in sets if found.key.startswith(f"{weights_key}.")), None
        )
        if chosen is None and len(sets) == 1:
            chosen = sets[0]  # the key may be that of a network in the state dict; see `key_matching`
        if chosen is None:
            raise UsageError(f"{path} has no weights {weights_key!r}", f"choose from {_names(sets)}")
    else:
        chosen = _preferred(path, sets)
    return chosen, [found for found in sets if found is not chosen]


def _preferred(path: Path, sets: list[WeightSet]) -> WeightSet:
    pool = [found for found in sets if found.averaged] or sets
    pool.sort(key=lambda found: not isinstance(found.content, ObjectStub))
    if len(pool) > 1 and not _are_equal(path, pool):
        raise UsageError(
            f"{path} contains several sets of weights ({_names(sets)})", "choose one of them with --weights-key"
        )
    return pool[0]


def _names(sets: Iterable[WeightSet]) -> str:
    return ", ".join(found.description for found in sets)


def _are_equal(path: Path, sets: list[WeightSet]) -> bool:
    """Return whether all sets have the same tensors under the same keys, apart from a prefix of parallel training."""
    first, *others = [
        {key.removeprefix("module."): tensor for key, tensor in found.tensors(path).items()} for found in sets
    ]
    return all(
        first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first) for other in others
    )


# --- search


class _Search:
    """The search for the sets of weights in a file, which looks at a limited number of values."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._searched = 0

    def find(self, content: Any, key: str, depth: int) -> Iterable[WeightSet]:
        """Yield the sets of weights in a value."""
        values = attributes(content)
        self._searched += max(1, len(values))
        if self._searched > _MAX_SEARCHED:  # dicts that share their items can contain any number of others
            raise ModelFileError(f"{self._path} contains more than {_MAX_SEARCHED:,} keys in nested dicts", REMEDY)
        if is_module(content):
            yield WeightSet(key, content, _is_average(key) or is_averaged_model(content))
            return
        if not values or depth > _MAX_DEPTH:
            return
        named = {name: value for name, value in values.items() if type(name) is str}
        known = {name: value for name, value in named.items() if _is_weights_key(name)}
        keys = {name: f"{key}.{name}".lstrip(".") for name in known}
        found = [one for name, value in known.items() for one in self.find(value, keys[name], depth + 1)]
        tensors = [name for name, value in values.items() if isinstance(value, torch.Tensor) and as_plain_dict(content)]
        if not found and not any("." in str(name) for name in tensors) and depth == 0:
            others = [name for name in named if name not in known and not _OTHER_STATE.search(name)]
            found = [one for name in others for one in self.find(values[name], name, 1)]
        if not found and tensors:
            found = [WeightSet(key, values, _is_average(key))]
        yield from found


def _is_weights_key(name: str) -> bool:
    return name in _WEIGHTS_KEYS or (_is_average(name) and not _OTHER_STATE.search(name))


def _is_average(key: str) -> bool:
    return _AVERAGE.search(key.lower()) is not None


# --- tensors


def require_dense(path: Path, key: str, value: torch.Tensor) -> torch.Tensor:
    """Return a tensor, if it is a dense one of real numbers.

    Raises:
        ModelFileError: it is not.
    """
    dense = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    # A view can have more elements than the file has bytes.
    if not dense or value.is_complex() or value.nbytes > value.untyped_storage().nbytes():
        raise ModelFileError(f"{key!r} in {path} is not a dense tensor of real numbers", REMEDY)
    return value


def _refuse_special_tensor(path: Path, key: str, value: Any) -> None:
    """Raise a ModelFileError if a value is a tensor of another kind. A quantized layer stores a tuple of them."""
    stubs = [part for part in (value if type(value) is tuple else (value,)) if isinstance(part, ObjectStub)]
    names = [stub.name for stub in stubs if stub.name.startswith("torch.")]
    if any(name.endswith("_rebuild_qtensor") for name in names):
        raise ModelFileError(f"{key!r} in {path} is quantized", "use the checkpoint from before the quantization")
    if names:
        raise ModelFileError(f"{key!r} in {path} is not a dense tensor of real numbers", REMEDY)
