"""The weights that the source of a network publishes, or that come with it.

They are loaded by torchvision and timm themselves, which keep downloads in their usual caches.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch

from cifarx_serve.errors import ModelFileError, UsageError, error_message
from cifarx_serve.spec import InputSpec
from cifarx_train.models.architecture import Architecture


class PublishedWeights(NamedTuple):
    """Weights that were not read yet.

    Attributes:
        name: what they are, as `torchvision ResNet18_Weights.IMAGENET1K_V1`.
        load: returns the state dict, which may download it.
        class_names: the classes that they were trained on; None if the source does not say.
        input: the preprocessing that they need; None for that of the architecture.
    """

    name: str
    load: Callable[[], dict[str, Any]]
    class_names: tuple[str, ...] | None
    input: InputSpec | None


def published_weights(architecture: Architecture) -> PublishedWeights:
    """Return the default weights of a network.

    Raises:
        UsageError: there are none.
    """
    name = architecture.source.name
    match architecture.source.kind:
        case "torchvision" if architecture.stem == "own":
            return _torchvision_weights(architecture)
        case "timm":
            return _timm_weights(architecture)
    if architecture.weights is None:
        network = f"{name} with a small stem" if architecture.stem == "small" else name
        raise UsageError(f"nobody publishes weights of {network}", "give a file with --weights FILE")
    return PublishedWeights(name, architecture.weights.load, architecture.class_names, None)


def published_file(architecture: Architecture, path: Path) -> PublishedWeights | None:
    """Return the weights of torchvision that have the name of a file, or None."""
    if architecture.source.kind != "torchvision":
        return None
    import torchvision

    for weights in torchvision.models.get_model_weights(architecture.source.name):
        if _file_name(weights.url) == path.name:
            return _describe(weights)
    return None


def _torchvision_weights(architecture: Architecture) -> PublishedWeights:
    import torchvision

    name = architecture.source.name
    weights = torchvision.models.get_model_weights(name).DEFAULT
    found = _describe(weights)

    def load() -> dict[str, Any]:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        try:
            state: dict[str, Any] = weights.get_state_dict(
                progress=True, check_hash=True, map_location="cpu", weights_only=True
            )
        except OSError as error:  # URLError is one
            raise UsageError(
                f"the weights of {name} cannot be downloaded to {cache} ({_reason(error)})",
                f"put {weights.url} there, or give a file with --weights FILE",
            ) from error
        except Exception as error:  # a damaged file in the cache: PyTorch raises many kinds of exceptions
            raise ModelFileError(
                f"{cache / _file_name(weights.url)} cannot be read ({error_message(error)})",
                "delete it, and it is downloaded again",
            ) from error
        return state

    return found._replace(load=load)


def _describe(weights: Any) -> PublishedWeights:
    from cifarx_train.models.preprocessing import Preprocessing

    categories = weights.meta.get("categories")
    names = tuple(map(str, categories)) if categories else None
    return PublishedWeights(f"torchvision {weights}", dict, names, Preprocessing.from_transforms(weights.transforms()))


def _timm_weights(architecture: Architecture) -> PublishedWeights:
    from cifarx_train.models.timm_networks import load_published

    source = architecture.source
    return PublishedWeights(
        f"timm {source.name}", lambda: load_published(source.name, source.arguments), architecture.class_names, None
    )


def _file_name(url: str) -> str:
    return Path(urlparse(url).path).name


def _reason(error: OSError) -> str:
    reason = getattr(error, "reason", error)
    return error_message(reason) if isinstance(reason, BaseException) else str(reason)
