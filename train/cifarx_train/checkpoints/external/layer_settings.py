"""Compare the settings of layers, such as strides, padding, eps and options: what they compute apart from weights."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn

_INTERNAL: Final = frozenset({*vars(nn.Module()), "training"})
_PLAIN: Final = (bool, int, float, str, type(None))
_MAX_ITEMS: Final = 1000


def same_settings(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two modules have the same layers with the same settings."""
    return _all_settings(a) == _all_settings(b)


def different_settings(a: nn.Module, b: nn.Module, names: Mapping[str, str]) -> Iterator[str]:
    """Yield a description of each setting of a layer of `a` that differs in the corresponding layer of `b`.

    Args:
        a, b: the modules.
        names: the names of the layers of `a` and the corresponding ones of `b`.
    """
    layers, others = dict(a.named_modules()), dict(b.named_modules())
    for name, other_name in names.items():
        if name not in layers or other_name not in others:
            continue
        layer, other = layers[name], others[other_name]
        if type(layer) is nn.Module:  # a container of an unknown class
            continue
        if type(layer) is not type(other):
            yield f"{name} is a {type(layer).__name__}, not a {type(other).__name__}"
            continue
        settings, expected = _settings(layer), _settings(other)
        for key in sorted(settings.keys() & expected.keys()):
            if settings[key] != expected[key]:
                yield f"{name}.{key} is {settings[key]}, not {expected[key]}"


def _all_settings(module: nn.Module) -> list[tuple[str, type[nn.Module], dict[str, Any]]]:
    return [(name, type(layer), _settings(layer)) for name, layer in module.named_modules()]


def _settings(layer: nn.Module) -> dict[str, Any]:
    """Return the attributes that can be compared: plain data, classes and functions."""
    return {
        name: _comparable(value)
        for name, value in vars(layer).items()
        if name not in _INTERNAL and _is_comparable(value)
    }


def _is_comparable(value: Any) -> bool:
    """Return whether a value is plain, or a list of a moderate number of plain values.

    Lists in a file can share their items, and then take forever to go through.
    """
    pending, count = [value], 0
    while pending:
        item = pending.pop()
        count += 1
        if isinstance(item, tuple | list):
            pending += item
        elif not (isinstance(item, _PLAIN) or (callable(item) and not isinstance(item, nn.Module))):
            return False
        if count > _MAX_ITEMS:
            return False
    return True


def _comparable(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return tuple(value) if isinstance(value, list) else value
