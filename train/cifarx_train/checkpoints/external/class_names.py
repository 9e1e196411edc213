"""Find the class names in the content of a checkpoint, where its author stored them under a usual key."""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from cifarx_train.checkpoints.external.module_stub import attributes, is_module, unwrap
from cifarx_train.checkpoints.external.pickle_machine import ObjectStub

_BY_NAME: Final = ("class_to_idx", "label2id")
_BY_LABEL: Final = sorted(
    {"idx_to_class", "id2label", "class_names", "classes", "classnames", "names", "labels", "label_names"}
    | {"categories"}
)
_CONTAINERS: Final = sorted(
    {"hyper_parameters", "datamodule_hyper_parameters", "hparams", "args", "config", "cfg", "meta", "metadata", "opt"}
    | {"model_args", "model_config", "data", "dataset", "train_dataset", "extra", "info"}
    | {"model", "ema", "net", "network"}
)
"""The keys of dicts and objects in which the names may be."""

_MAX_DEPTH: Final = 3
_MAX_CLASSES: Final = 100_000


class StatedNames(NamedTuple):
    """Class names that a file states.

    Attributes:
        key: the key of the names in the file, such as `hyper_parameters.classes`.
        names: the names in the order of their labels.
        has_labels: whether the file contains the label of each name, rather than only their order.
    """

    key: str
    names: tuple[str, ...]
    has_labels: bool


def find_class_names(content: Any) -> list[StatedNames]:
    """Return the class names in a file, those with labels first. Values that are not names are ignored."""
    return sorted(_search(content, "", 0), key=lambda stated: not stated.has_labels)


def _search(content: Any, prefix: str, depth: int) -> Iterator[StatedNames]:
    values = attributes(unwrap(content) if is_module(content) else content)
    for key in (*_BY_NAME, *_BY_LABEL):
        value = values.get(key)
        if (names := _from_mapping(value, by_name=key in _BY_NAME)) is not None:
            yield StatedNames(f"{prefix}{key}", names, True)
        elif key in _BY_LABEL and (names := _from_list(value)) is not None:
            yield StatedNames(f"{prefix}{key}", names, False)
    for key in _CONTAINERS:
        if depth < _MAX_DEPTH and key in values:
            yield from _search(values[key], f"{prefix}{key}.", depth + 1)


def _from_list(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, ObjectStub):
        value = value.items
    return _checked(value) if type(value) in (list, tuple) else None


def _from_mapping(value: Any, *, by_name: bool) -> tuple[str, ...] | None:
    """Return the names of a dict from names to labels, or from labels to names. The labels are 0, 1, 2 and so on."""
    pairs = [(label, name) for name, label in attributes(value).items()] if by_name else [*attributes(value).items()]
    try:
        names = {int(label): name for label, name in pairs if type(label) in (int, str)}
    except ValueError:
        return None
    if not pairs or len(pairs) != len(names) or sorted(names) != list(range(len(names))):
        return None
    return _checked([names[label] for label in range(len(names))])


def _checked(names: Any) -> tuple[str, ...] | None:
    """Return the names if they are at least two different printable strings."""
    if not 2 <= len(names) <= _MAX_CLASSES:
        return None
    printable = all(type(name) is str and name and name.isprintable() for name in names)
    return tuple(names) if printable and len(set(names)) == len(names) else None
