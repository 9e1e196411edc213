"""Read legacy checkpoints: `torch.save(model, …)`, `torch.save(model.state_dict(), …)`, and dicts that contain either.

Only the tensors of a whole model are used. The architecture is identified from the names and shapes of the weights.
What the file does not describe, such as the class names, is assumed, and a warning states the assumptions.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from cifarx_serve.errors import FallbackWarning, ModelFileError
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.legacy.architecture import ArchitectureMatch, identify_architecture
from cifarx_train.checkpoints.legacy.safe_unpickle import LZH_CLASSES, REMEDY, ObjectStub, as_plain_dict
from cifarx_train.models.registry import get_architecture

_STATE_DICT_KEYS: Final = ("state_dict", "model_state_dict", "model", "net", "network")
"""The keys under which training scripts save the weights. The first one that contains weights is used."""

_WRAPPER_PREFIXES: Final = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
# Limits far beyond any network of torchvision, because a file can contain modules that contain each other.
_MAX_MODULES: Final = 20_000
_MAX_DEPTH: Final = 50
_MAX_NAME_LENGTH: Final = 500
_MAX_DICT_DEPTH: Final = 3


def read_legacy_checkpoint(
    path: Path, content: Any, model: str | None = None
) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """Return the spec and the state dict of a legacy checkpoint, with the keys and dtypes of the architecture.

    Args:
        path: the file, for messages.
        content: the result of `safe_load` for the file.
        model: the name of the architecture, if it is known.

    Raises:
        UsageError: several architectures match the weights, or there is no architecture named `model`.
        ModelFileError: the file contains no weights, or no known architecture matches them.
    """
    found = _find_weights(path, content)
    if found is None:
        raise ModelFileError(f"{path} is not a cifarx checkpoint and contains no weights of a network", REMEDY)
    values, name = found
    weights = _strip_wrapper_prefixes({key: _require_tensor(path, key, value) for key, value in values.items()})
    match = identify_architecture({key: tuple(tensor.shape) for key, tensor in weights.items()}, path, model or name)
    if match.classes < 2:
        raise ModelFileError(f"{path} has only {match.classes} class", "use a classifier with at least 2 classes")
    architecture = get_architecture(match.model, stem=match.stem)
    class_names, description = _class_names(match.classes)
    spec = ModelSpec(model=match.model, stem=match.stem, class_names=class_names, input=architecture.input)
    _warn(path, spec, description)
    return spec, _convert(match, weights)


# --- weights in the file


def _find_weights(path: Path, content: Any, depth: int = 0) -> tuple[dict[Any, Any], str | None] | None:
    """Return the weights by their keys in the file, and the name of the architecture if its class is known."""
    if isinstance(content, ObjectStub):
        weights = dict(_module_state(path, content))
        return (weights, "lzh" if content.name in LZH_CLASSES else None) if weights else None
    values = as_plain_dict(content)
    if not values or depth > _MAX_DICT_DEPTH:
        return None
    for key in _STATE_DICT_KEYS:
        if key in values and (found := _find_weights(path, values[key], depth + 1)):
            return found
    return (values, None) if any(isinstance(value, torch.Tensor) for value in values.values()) else None


def _module_state(path: Path, root: ObjectStub) -> Iterator[tuple[str, Any]]:
    """Yield the state dict of a whole model in order, from the dicts in which `nn.Module` stores its parts.

    The values are not checked and can be anything.
    """
    pending: list[tuple[str, int, Any]] = [("", 0, root)]
    count = 0
    while pending:
        prefix, depth, module = pending.pop()
        count += 1
        if count > _MAX_MODULES or depth > _MAX_DEPTH:
            raise ModelFileError(f"the modules in {path} contain each other", REMEDY)
        state = (as_plain_dict(module.state) if isinstance(module, ObjectStub) else None) or {}
        non_persistent = state.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in _named_items(path, state.get(kind)):
                if value is not None and not (type(non_persistent) is set and name in non_persistent):
                    yield f"{prefix}{name}", value
        children = [(f"{prefix}{name}.", depth + 1, child) for name, child in _named_items(path, state.get("_modules"))]
        pending += reversed(children)


def _named_items(path: Path, items: Any) -> list[tuple[str, Any]]:
    checked = list((as_plain_dict(items) or {}).items())
    for name, _ in checked:
        _check_name(path, name)
    return checked


def _check_name(path: Path, name: Any) -> None:
    if type(name) is not str or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
        raise ModelFileError(f"{path} contains a weight with an invalid name", REMEDY)


def _require_tensor(path: Path, key: Any, value: Any) -> torch.Tensor:
    """Return a plain tensor, without the attributes, gradient and class of the one in the file."""
    _check_name(path, key)
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise ModelFileError(f"{key!r} in {path} is not a tensor", REMEDY)
    tensor = torch.Tensor.detach(value)
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    # A view can have more elements than the file has bytes.
    if not dense or tensor.is_complex() or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ModelFileError(f"{key!r} in {path} is not a dense tensor of real numbers", REMEDY)
    return tensor


def _strip_wrapper_prefixes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    while weights and (
        prefix := next((word for word in _WRAPPER_PREFIXES if all(key.startswith(word) for key in weights)), "")
    ):
        weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    return weights


def _convert(match: ArchitectureMatch, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with the keys, order and dtypes of the architecture. Missing counters are 0."""
    return {
        key: weights[match.keys[key]].to(dtype) if key in match.keys else torch.zeros((), dtype=dtype)
        for key, dtype in match.dtypes.items()
    }


# --- assumptions about what the file does not describe


def _class_names(classes: int) -> tuple[tuple[str, ...], str]:
    """Return the assumed class names in label order, and a description of them."""
    if classes == 10:
        from cifarx_train.data.synthetic.dataset import CLASS_NAMES

        return CLASS_NAMES, "CIFAR-10's classes"
    if classes == 1000:
        from torchvision.models import ResNet18_Weights

        return tuple(ResNet18_Weights.DEFAULT.meta["categories"]), "ImageNet's classes"
    return tuple(f"class {label}" for label in range(classes)), f'classes "class 0" to "class {classes - 1}"'


def _warn(path: Path, spec: ModelSpec, classes: str) -> None:
    size: InputSpec = spec.input
    stem = " with a small stem" if spec.stem == "small" else ""
    low, high = size.value_range
    warnings.warn(
        f"{path} is loaded as {spec.model}{stem} with {classes} and {size.height}x{size.width} images in the range "
        f"{low:g} to {high:g}: the file does not describe its classes and images",
        FallbackWarning,
        stacklevel=4,
    )
