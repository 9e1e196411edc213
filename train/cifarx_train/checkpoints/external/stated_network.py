"""Match the weights in a file with the network that the user states."""

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_train.checkpoints.external.candidates import (
    STEM_ARGUMENT,
    EmptyOnMeta,
    fits_small_stem,
    missing_network_error,
)
from cifarx_train.checkpoints.external.key_matching import (
    KeyMatch,
    Shapes,
    describe_mismatches,
    list_names,
    match_keys,
    wrong_shapes,
)
from cifarx_train.checkpoints.external.pruning import ORIGINAL, fold_masks
from cifarx_train.checkpoints.external.weight_norm import Folded, fold_weight_norm, has_weight_norm
from cifarx_train.checkpoints.external.weight_sets import WeightSet
from cifarx_train.models.architecture import Architecture, Stem
from cifarx_train.models.options import ModelOptions
from cifarx_train.models.sources import find_architecture

_TRIAL_OUTPUTS: Final = 7
_REMEDY: Final = "state the network that the weights belong to with --model"


class ExternalNetwork(NamedTuple):
    """The network of an external checkpoint.

    Attributes:
        architecture: builds the network.
        outputs: the number of its outputs.
        weights: its state dict, on the CPU.
        keys: the key in the file for each key of the network; empty for a network that was built from the file.
        notes: what was done with the weights in the file.
    """

    architecture: Architecture
    outputs: int
    weights: dict[str, Any]
    keys: dict[str, str]
    notes: list[str]


def stated_network(
    path: Path, weights: WeightSet, options: ModelOptions, mentioned: str | None = None
) -> ExternalNetwork:
    """Return the network that `options.model` states, with the weights in a file.

    Args:
        path: the file.
        weights: the weights.
        options: what the user states.
        mentioned: the name of a network that the file mentions, for the error if the user states none.

    Raises:
        UsageError: no network is stated, or there is no such network.
        ModelFileError: the weights do not match the network.
    """
    tensors = weights.tensors(path)
    if options.model is None:
        if code_error := options.missing_code_error():
            raise code_error
        raise missing_network_error(path, _shapes(_fold(tensors, {}).tensors), mentioned)
    architecture = _stated_architecture(options)
    if architecture.convert_weights is not None:
        tensors = architecture.convert_weights(tensors)
    size = options.overrides.apply_to_input(architecture.input)
    with _without_memory(architecture):
        own = architecture.builder(architecture.num_outputs or _TRIAL_OUTPUTS, size).state_dict()
    tensors, normalized = _fold(tensors, own)
    shapes = _shapes(tensors)
    match = match_keys(own, tensors, options.weights_key, path)
    if match.distance:
        raise _mismatch_error(path, architecture, match, [], shapes)
    outputs = _find_outputs(path, architecture, match, shapes, options)
    module = architecture.build(outputs, size)
    if wrong := wrong_shapes(match, _shapes(module.state_dict()), shapes):
        raise _mismatch_error(path, architecture, match, wrong, shapes)
    notes = [
        *_match_notes(architecture, weights, match),
        *_normalization_notes(normalized),
        *conversion_notes(weights.tensors(path)),
    ]
    return ExternalNetwork(architecture, outputs, _convert(module, match, tensors, weights), match.keys, notes)


def _stated_architecture(options: ModelOptions) -> Architecture:
    """Return the stated architecture. The argument `stem` selects the stem of a ResNet."""
    stem: Stem = "small" if options.arguments.get(STEM_ARGUMENT) == "small" else "own"
    if stem == "own":
        return find_architecture(options)
    arguments = {name: value for name, value in options.arguments.items() if name != STEM_ARGUMENT}
    return find_architecture(options._replace(arguments=arguments), stem)


def _without_memory(architecture: Architecture) -> AbstractContextManager[Any]:
    """Build the networks of the registry without memory. Other networks may need real tensors."""
    return EmptyOnMeta() if architecture.source.kind in ("builtin", "torchvision") else nullcontext()


def _fold(tensors: dict[str, Tensor], own: dict[str, Any]) -> Folded:
    """Return the tensors of a file with plain weights instead of pruned and normalized ones.

    A network that is pruned or normalized itself has the same parts of the weights in its own state dict.
    """
    if not any(key.endswith(ORIGINAL) for key in own):
        tensors = fold_masks(tensors).tensors
    return Folded(tensors, 0) if has_weight_norm(own) else fold_weight_norm(tensors)


def _shapes(tensors: dict[str, Tensor]) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _find_outputs(
    path: Path, architecture: Architecture, match: KeyMatch, shapes: Shapes, options: ModelOptions
) -> int:
    with _without_memory(architecture):
        found = architecture.find_num_outputs({own: shapes[key] for own, key in match.keys.items()})
    if found is None:
        found = len(options.overrides.fields.get("class_names", ()))
    if not found:
        raise UsageError(f"the weights in {path} do not say how many classes there are", "state them with --classes")
    return found


def _mismatch_error(
    path: Path, architecture: Architecture, match: KeyMatch, wrong: list[str], shapes: Shapes
) -> ModelFileError:
    name = architecture.source.name
    remedy = _REMEDY
    if architecture.stem == "own" and fits_small_stem(name, shapes):
        remedy = (
            f"add --model-arg {STEM_ARGUMENT}=small if its first convolution has stride 1 and no max-pooling follows, "
            "otherwise name its code with --model FILE.py:CALLABLE"
        )
    return ModelFileError(f"the weights in {path} do not match {name} ({describe_mismatches(match, wrong)})", remedy)


# --- notes


def _match_notes(architecture: Architecture, weights: WeightSet, match: KeyMatch) -> list[str]:
    notes = []
    if match.alternatives:
        others = ", ".join(prefix.rstrip(".") or "those without a prefix" for prefix in match.alternatives)
        notes.append(f"using the weights {match.prefix.rstrip('.')}, not {others}: choose with --weights-key")
    left_out = [*match.left_out, *weights.other_values()]
    if left_out:
        count = "1 key" if len(left_out) == 1 else f"{len(left_out)} keys"
        notes.append(f"left out {count} that {architecture.name} does not use ({list_names(left_out)})")
    return notes


def _normalization_notes(normalized: int) -> list[str]:
    weights = "1 weight" if normalized == 1 else f"{normalized} weights"
    return [f"scaled {weights} with weight norm to {'its' if normalized == 1 else 'their'} norm"] if normalized else []


def conversion_notes(tensors: dict[str, Tensor]) -> list[str]:
    """Return what was done with the tensors of a file to make the state dict of a network in float32."""
    notes = []
    if pruned := fold_masks(tensors).pruned:
        notes.append(f"multiplied {pruned} pruned {'weight' if pruned == 1 else 'weights'} by their masks")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    if stored := sorted(dtypes - {"float32"}):
        notes.append(f"converted weights from {' and '.join(stored)} to float32")
    return notes


# --- the state dict of the network


def _convert(
    module: nn.Module, match: KeyMatch, tensors: dict[str, Tensor], weights: WeightSet
) -> OrderedDict[str, Tensor]:
    """Return the weights with the keys, order, dtypes and versions of the network. Missing counters are 0."""
    own = module.state_dict()
    converted = OrderedDict(
        (key, tensors[match.keys[key]].to(tensor.dtype) if key in match.keys else torch.zeros((), dtype=tensor.dtype))
        for key, tensor in own.items()
    )
    versions = getattr(weights.content, "_metadata", {})
    converted._metadata = {  # type: ignore[attr-defined]  # `nn.Module.load_state_dict` reads it
        name: versions.get(f"{match.prefix}{name}".rstrip("."), version)
        for name, version in getattr(own, "_metadata", {}).items()
    }
    return converted
