"""Read an external checkpoint: find its weights, its network and its class names.

The network of a whole model is built from what the file says. That of a state dict has to be stated. What was done with
the weights is returned as notes. What nobody states is assumed, and the spec lists it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from torch import nn

from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.external.class_names import find_class_names
from cifarx_train.checkpoints.external.module_stub import attributes
from cifarx_train.checkpoints.external.rebuilt_network import rebuilt_network
from cifarx_train.checkpoints.external.stated_network import stated_network
from cifarx_train.checkpoints.external.weight_sets import WeightSet, find_weights
from cifarx_train.models.initial_spec import initial_spec
from cifarx_train.models.options import ModelOptions

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_ARCHITECTURE_KEYS: Final = ("arch", "architecture", "model_name", "model")


class ExternalCheckpoint(NamedTuple):
    """An external checkpoint.

    Attributes:
        spec: what the model is. `assumed` lists what neither the file nor the user states.
        weights: the state dict of the network, on the CPU.
        build: returns a new module, without these weights.
        notes: what was done with the weights and the class names in the file, one line each.
    """

    spec: ModelSpec
    weights: dict[str, Any]
    build: Callable[[], nn.Module]
    notes: list[str]


def read_external_checkpoint(
    path: Path, content: Any, options: ModelOptions, metadata: Mapping[str, str] = _NOTHING
) -> ExternalCheckpoint:
    """Return the spec, the state dict and the network of a file.

    Args:
        path: the file, for messages.
        content: the content of the file.
        options: what the user states.
        metadata: strings that the file contains beside the content, which can be JSON documents.

    Raises:
        UsageError: the network or the weights have to be stated, or what is stated does not fit.
        ModelFileError: the file contains no weights, or they do not match the network.
        SpecError: a stated field of the spec is not valid.
    """
    weights, others = find_weights(path, content, options.weights_key)
    module = weights.module()
    if module is None:
        network = stated_network(path, weights, options, _mentioned_architecture(content))
    else:
        network = rebuilt_network(path, weights, module, options)
    names, name_notes = _class_names(content, metadata, max(2, network.outputs), options)
    spec = initial_spec(network.architecture, network.outputs, names, options.overrides)
    notes = [*_choice_notes(weights, others), *network.notes, *name_notes]
    return ExternalCheckpoint(
        spec,
        network.weights,
        lambda: network.architecture.build(network.outputs, spec.input),
        [f"{path}: {note}" for note in notes],
    )


def _mentioned_architecture(content: Any) -> str | None:
    """Return the name of a network that the file mentions, as the checkpoints of timm and others do."""
    values = attributes(content)
    for source in (values, attributes(values.get("args")), attributes(values.get("hyper_parameters"))):
        for key in _ARCHITECTURE_KEYS:
            if type(name := source.get(key)) is str and name.isprintable() and len(name) < 100:
                return name
    return None


# --- class names


def _class_names(
    content: Any, metadata: Mapping[str, str], count: int, options: ModelOptions
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the class names that the file states, and notes about them."""
    if "class_names" in options.overrides.fields:
        return None, []
    parsed = {key: _parse(value) for key, value in metadata.items()}
    found = [*find_class_names(parsed), *find_class_names(content)]
    notes = [
        f"its {stated.key} names {len(stated.names)} classes, but the network has {count}: they are not used"
        for stated in found
        if len(stated.names) != count
    ]
    fitting = [stated for stated in found if len(stated.names) == count]
    if not fitting:
        return None, notes
    chosen = fitting[0]
    notes.append(f"using the class names of its {chosen.key}")
    notes += [
        f"its {stated.key} differs from its {chosen.key}: it is not used"
        for stated in fitting
        if stated.names != chosen.names
    ]
    return chosen.names, notes


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# --- notes


def _choice_notes(chosen: WeightSet, others: list[WeightSet]) -> list[str]:
    if not others:
        return []
    names = ", ".join(other.description for other in others)
    return [f"using the weights {chosen.description}, not {names}: choose with --weights-key"]
