"""`.pth` files of the training notes: `torch.save(model, …)` and `torch.save(model.state_dict(), …)`.

Of a whole network only the tensors are taken, into a network of ours; of either kind the architecture is told from
the names and shapes of the weights, and what no such file says is assumed, and said to be.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from cifarx_serve.errors import FallbackWarning, ModelFileError
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.legacy.architecture import Match, identify_architecture
from cifarx_train.checkpoints.legacy.safe_unpickle import LZH_CLASSES, REMEDY, StandIn, plain_dict
from cifarx_train.models.registry import network

_PLACES: Final = ("state_dict", "model_state_dict", "model", "net", "network")
"""Where training scripts put the weights beside an optimizer; the first that holds some."""

_WRAPPERS: Final = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
# No network of torchvision comes near; a file whose modules hold each other would never end.
_MOST_MODULES: Final = 20_000
_DEEPEST: Final = 50
_LONGEST: Final = 500


def read_legacy_checkpoint(
    path: Path, content: Any, model: str | None = None
) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """The spec and the weights, by our own names, of a file that is no checkpoint of ours.

    Args:
        path: the file, for errors and the note.
        content: what `load_safely` read there.
        model: the network's name, where the file does not say it.

    Raises:
        UsageError: several networks have just these weights, or no network is called `model`.
        ModelFileError: no weights, or weights of no network that is known.
    """
    found = _find(path, content)
    if found is None:
        raise ModelFileError(f"{path} is not a cifarx checkpoint, and holds no network's weights", REMEDY)
    tensors, name = found
    weights = _without_wrappers({key: _checked(path, key, value) for key, value in tensors.items()})
    match = identify_architecture({key: tuple(tensor.shape) for key, tensor in weights.items()}, path, model or name)
    if match.classes < 2:
        raise ModelFileError(f"{path} tells {match.classes} class apart", "give a classifier of at least 2 classes")
    names, called = _class_names(match.classes)
    spec = ModelSpec(
        model=match.model, stem=match.stem, class_names=names, input=network(match.model, stem=match.stem).input
    )
    _warn(path, spec, called)
    return spec, _named_as_ours(match, weights)


# --- the weights in the file


def _find(path: Path, content: Any, depth: int = 0) -> tuple[dict[Any, Any], str | None] | None:
    """The weights by the file's names, and the network's name where the file's class is the notes' own."""
    if isinstance(content, StandIn):
        weights = dict(_tensors_of(path, content))
        return (weights, "lzh" if content.name in LZH_CLASSES else None) if weights else None
    held = plain_dict(content)
    if not held or depth > 3:  # nobody puts them deeper
        return None
    for place in _PLACES:
        if place in held and (found := _find(path, held[place], depth + 1)):
            return found
    return (held, None) if any(isinstance(value, torch.Tensor) for value in held.values()) else None


def _tensors_of(path: Path, root: StandIn) -> Iterator[tuple[str, Any]]:
    """The state dict of a whole network, in its order, out of the plain dicts that PyTorch keeps a module's parts in.

    Values are as the file has them: they may be no tensors.
    """
    waiting: list[tuple[str, int, Any]] = [("", 0, root)]
    seen = 0
    while waiting:
        prefix, depth, part = waiting.pop()
        seen += 1
        if seen > _MOST_MODULES or depth > _DEEPEST:
            raise ModelFileError(f"the modules in {path} hold one another without end", REMEDY)
        state = (plain_dict(part.state) if isinstance(part, StandIn) else None) or {}
        passing = state.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in _named(path, state.get(kind)):
                if value is not None and not (type(passing) is set and name in passing):
                    yield f"{prefix}{name}", value
        modules = [(f"{prefix}{name}.", depth + 1, module) for name, module in _named(path, state.get("_modules"))]
        waiting += reversed(modules)


def _named(path: Path, parts: Any) -> list[tuple[str, Any]]:
    items = list((plain_dict(parts) or {}).items())
    for name, _ in items:
        _check_name(path, name)
    return items


def _check_name(path: Path, name: Any) -> None:
    if type(name) is not str or len(name) > _LONGEST or not name.isprintable():
        raise ModelFileError(f"{path} holds a weight without a proper name", REMEDY)


def _checked(path: Path, key: Any, value: Any) -> torch.Tensor:
    """A tensor as plain as they come: attributes, gradients and classes of the file's are left behind."""
    _check_name(path, key)
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise ModelFileError(f"{key!r} in {path} is no tensor", REMEDY)
    plain = torch.Tensor.detach(value)
    dense = plain.layout is torch.strided and plain.device.type == "cpu" and not plain.is_quantized
    # A view can claim more numbers than the file has bytes.
    if not dense or plain.is_complex() or plain.nbytes > plain.untyped_storage().nbytes():
        raise ModelFileError(f"{key!r} in {path} is no tensor of weights", REMEDY)
    return plain


def _without_wrappers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    while weights and (
        prefix := next((word for word in _WRAPPERS if all(key.startswith(word) for key in weights)), "")
    ):
        weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    return weights


def _named_as_ours(match: Match, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In the order and the types of the network, with counters at 0 where PyTorch before 0.4.1 wrote none."""
    return {
        key: weights[match.keys[key]].to(dtype) if key in match.keys else torch.zeros((), dtype=dtype)
        for key, dtype in match.types.items()
    }


# --- what the file does not say


def _class_names(classes: int) -> tuple[tuple[str, ...], str]:
    """Names in label order, and what to call them."""
    if classes == 10:
        from cifarx_train.data.synthetic.draw import CLASS_NAMES

        return CLASS_NAMES, "CIFAR-10's classes"
    if classes == 1000:
        from torchvision.models import ResNet18_Weights

        return tuple(ResNet18_Weights.DEFAULT.meta["categories"]), "ImageNet's classes"
    return tuple(f"class {label}" for label in range(classes)), f'classes "class 0" to "class {classes - 1}"'


def _warn(path: Path, spec: ModelSpec, called: str) -> None:
    taken: InputSpec = spec.input
    stem = " with a small stem" if spec.stem == "small" else ""
    low, high = taken.value_range
    warnings.warn(
        f"{path} is taken for {spec.model}{stem} with {called} on {taken.height}x{taken.width} images in the range "
        f"{low:g} to {high:g}: the file says nothing of its classes and images",
        FallbackWarning,
        stacklevel=4,
    )
