"""Start training from the weights of another run or program, with a head for the classes at hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from cifarx_serve.backends.base import require_file
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.files.file_format import FileFormat, detect_format
from cifarx_serve.spec import InputSpec, ModelSpec, WeightsRecord
from cifarx_train.checkpoints.checkpoint import SPEC_KEY, file_sha256, is_own, weights_sha256
from cifarx_train.checkpoints.external.class_names import find_class_names
from cifarx_train.checkpoints.external.key_matching import (
    KeyMatch,
    describe_mismatches,
    list_names,
    match_keys,
    wrong_shapes,
)
from cifarx_train.checkpoints.external.pruning import fold_masks
from cifarx_train.checkpoints.external.safetensors_file import load_safetensors
from cifarx_train.checkpoints.external.torch_file import load_torch_file
from cifarx_train.checkpoints.external.weight_sets import find_weights
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.description import describe_classes
from cifarx_train.models.outputs import unwrapped
from cifarx_train.models.published_weights import PublishedWeights, published_file, published_weights
from cifarx_train.models.sources import TIMM_PREFIX

DEFAULT: Final = "default"
TIMM: Final = "timm"


class Pretrained(NamedTuple):
    """Weights to start from.

    Attributes:
        record: what they are.
        tensors: the state dict, on the CPU. Its keys may have a prefix that those of the network do not have.
        stated_names: the class names that the file or its source states. Several programs may have stated them.
        input: the preprocessing that belongs to the weights, if the file or its source states it.
        weights_key: the key of the network in the state dict that the user chose, if any.
    """

    record: WeightsRecord
    tensors: dict[str, Tensor]
    stated_names: tuple[tuple[str, ...], ...]
    input: InputSpec | None
    weights_key: str | None


def weights_name(weights: str, architecture: Architecture) -> str:
    """Return the name under which a run records the weights, without reading them.

    Args:
        weights: the value of `--weights`.
        architecture: the network.

    Raises:
        UsageError: nobody publishes weights of the network.
    """
    published = _find_published(weights, architecture)
    return published.name if published else Path(weights).name


def load_pretrained(weights: str, architecture: Architecture, weights_key: str | None = None) -> Pretrained:
    """Read weights, and download those that their source publishes.

    Args:
        weights: "default" for those that the source of the network publishes, "timm" for the same of a network of timm,
            or the path of a file that `load_checkpoint` reads.
        architecture: the network.
        weights_key: the key of the weights in a file with several sets.

    Raises:
        UsageError: nobody publishes weights of the network, they cannot be downloaded, or there are several sets.
        ModelFileError: the file is missing or damaged, or contains no weights.
    """
    if published := _find_published(weights, architecture):
        tensors = published.load()
        record = WeightsRecord(name=published.name, sha256=weights_sha256(tensors))
        names = (published.class_names,) if published.class_names else ()
        return Pretrained(record, tensors, names, published.input, None)
    return _read_file(Path(weights), architecture, weights_key)


def _find_published(weights: str, architecture: Architecture) -> PublishedWeights | None:
    if weights == TIMM and architecture.source.kind != "timm":
        name = architecture.source.name
        raise UsageError(
            f"--weights timm is for a network of timm, not {name}", f"name it, as in --model {TIMM_PREFIX}{name}"
        )
    return published_weights(architecture) if weights in (DEFAULT, TIMM) else None


def _read_file(path: Path, architecture: Architecture, weights_key: str | None) -> Pretrained:
    require_file(path)
    content: Any
    metadata: Mapping[str, str] = {}
    if detect_format(path) is FileFormat.SAFETENSORS:
        content, metadata = load_safetensors(path)
        document = metadata.get(SPEC_KEY)
    else:
        content = load_torch_file(path)
        document = content["spec"] if is_own(content) else None
        content = content.get("model") if document else content
    record = WeightsRecord(name=path.name, sha256=file_sha256(path))
    weights, _others = find_weights(path, content, weights_key)
    tensors = weights.tensors(path)
    if document is not None:
        spec = ModelSpec.from_json(document, str(path))
        return Pretrained(record, tensors, (spec.class_names,), spec.input, weights_key)
    if architecture.convert_weights is not None:
        tensors = architecture.convert_weights(tensors)
    tensors = fold_masks(tensors).tensors or tensors
    names = tuple(stated.names for stated in find_class_names(content))
    published = published_file(architecture, path)
    if published and published.class_names:
        names = (*names, published.class_names)
    return Pretrained(record, tensors, names, published.input if published else None, weights_key)


# --- into a network


class Transfer(NamedTuple):
    """What becomes of the weights in a network.

    Attributes:
        tensors: the weights that are loaded, by the keys of the network.
        lines: what is loaded, what is not, and why, one line each.
    """

    tensors: dict[str, Tensor]
    lines: tuple[str, ...]

    def load_into(self, module: nn.Module) -> None:
        """Load the weights into a network, in place. The others keep their initial values."""
        unwrapped(module).load_state_dict(self.tensors, strict=False)


def plan_transfer(
    pretrained: Pretrained, module: nn.Module, head: frozenset[str], class_names: tuple[str, ...], network: str
) -> Transfer:
    """Match the weights with a network for other classes.

    The head is loaded only if its classes are those of the network, in the same order.

    Args:
        pretrained: the weights.
        module: the network, which is not changed.
        head: the keys of its head.
        class_names: its classes.
        network: its name, for messages.

    Raises:
        ModelFileError: weights other than those of the head are missing or have another shape, or there are weights of
            other layers.
        UsageError: the weights contain the network several times.
    """
    name = pretrained.record.name
    own = {key: tuple(tensor.shape) for key, tensor in unwrapped(module).state_dict().items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in pretrained.tensors.items()}
    match = match_keys(own, shapes, pretrained.weights_key, name)
    outputs = next((shapes[match.keys[key]][0] for key in sorted(head) if key in match.keys), None)
    trained_on = next((names for names in pretrained.stated_names if len(names) == outputs), None)
    keeps_head = trained_on == class_names and head <= match.keys.keys()
    replaced = frozenset[str]() if keeps_head else head
    rest = _without_head(match, replaced)
    wrong = wrong_shapes(rest, own, shapes)
    if rest.distance or wrong:
        raise ModelFileError(
            f"the weights {name} do not match {network} ({describe_mismatches(rest, wrong)})",
            "name the network that they belong to with --model",
        )
    tensors = {key: pretrained.tensors[found] for key, found in rest.keys.items()}
    known = describe_classes(trained_on) if trained_on else f"{outputs} outputs" if outputs else "no head"
    lines = [f"weights {name} (sha256 {pretrained.record.sha256[:12]}): {known}"]
    verb = "kept, its classes are the same" if keeps_head else f"new, for {describe_classes(class_names)}"
    lines.append(f"head {list_names(sorted(head))}: {verb}")
    left_out = sorted(shapes.keys() - set(match.keys.values()))
    if left_out:
        count = "1 key" if len(left_out) == 1 else f"{len(left_out)} keys"
        lines.append(f"left out {count} that {network} does not use ({list_names(left_out)})")
    return Transfer(tensors, tuple(lines))


def _without_head(match: KeyMatch, head: frozenset[str]) -> KeyMatch:
    """Return a match without the keys of the head, and without other layers at the place of the head."""
    places = tuple({f"{match.prefix}{key.rpartition('.')[0]}." for key in head if "." in key})
    return match._replace(
        keys={key: found for key, found in match.keys.items() if key not in head},
        missing=[key for key in match.missing if key not in head],
        unexpected=[key for key in match.unexpected if not key.startswith(places)],
    )
