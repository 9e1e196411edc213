"""Training recipes, as plain data: a checkpoint carries the one that made it."""

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from cifarx_serve.errors import UsageError, unknown

Count: TypeAlias = Annotated[int, Meta(ge=1)]
Pixels: TypeAlias = Annotated[int, Meta(ge=0, le=64)]
Rate: TypeAlias = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
Amount: TypeAlias = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Share: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train a network on a data set. Every default is the plainest choice.

    Attributes:
        batch_size: images a step, over all ranks; the last step of an epoch may have fewer.
        learning_rate: the peak of the schedule.
        optimizer: `sgd`; `adamw`; or `muon`, which is Muon on the convolutions and SGD on the rest.
        bias_lr, head_lr: with muon, the peak rates of biases and norms, and of the last layer.
        momentum: of SGD and Muon; `nesterov` looks ahead by it.
        weight_decay: of weights with two or more dimensions; biases and norms have none. Muon holds the norm of its
            weights, so that with it only the last layer decays.
        schedule: after the warm-up: constant, or to zero along a line or half a cosine.
        warm_up: the share of the run's steps over which the rate rises from zero.
        label_smoothing: the share of each label that is spread over all classes.
        max_grad_norm: the largest norm of all gradients together.
        ema: the decay, a step, of an exponential moving average of the weights; the average is eval_model and saved.
        normalize: the input is brought to mean 0 and deviation 1, a channel, of the training images.
        flip: half of the images are mirrored.
        crop: images are shifted by up to so many pixels, the edge reflected.
        cutout: a square of so many pixels a side is blanked.
        jitter: brightness, contrast and saturation change by up to this share.
        precision: of the forward and backward pass; weights and the optimizer stay fp32.
        channels_last: on a GPU, the memory layout of weights and activations, which half precision wants. On a CPU the
            activations alone always have it.
        compile: by `torch.compile`.
        patience: stop after so many epochs without a better test accuracy.
        max_minutes: stop when so many minutes of training are over.
    """

    name: str
    epochs: Count
    batch_size: Count
    learning_rate: Rate
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    bias_lr: Rate | None = None
    head_lr: Rate | None = None
    momentum: Share = 0.0
    nesterov: bool = False
    weight_decay: Amount = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warm_up: Share = 0.0
    label_smoothing: Share = 0.0
    max_grad_norm: Rate | None = None
    ema: Share | None = None
    normalize: bool = False
    flip: bool = False
    crop: Pixels = 0
    cutout: Pixels = 0
    jitter: Share = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    patience: Count | None = None
    max_minutes: Rate | None = None

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.optimizer == "muon" and not (self.bias_lr and self.head_lr):
            raise ValueError("muon needs bias_lr and head_lr")
        if self.optimizer != "muon" and (self.bias_lr or self.head_lr):
            raise ValueError("bias_lr and head_lr belong to the optimizer muon")
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError("adamw has no momentum to set")

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """The fields in which the two differ, each with its own value and the other's."""
        pairs = {field: (getattr(self, field), getattr(other, field)) for field in self.__struct_fields__}
        return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}

    def to_toml(self) -> str:
        """A TOML document that `--recipe FILE` reads back; what is not set stands in comments."""
        lines = [
            f"# {field} is not set" if value is None else f"{field} = {msgspec.json.encode(value).decode()}"
            for field, value in msgspec.to_builtins(self).items()
        ]
        return "\n".join(lines)


RECIPES: Final = {
    # The CIFAR-10 training notes: SGD at 0.01 without momentum, batch 64, inputs in [0, 1], no augmentation.
    "notes": Recipe(name="notes", epochs=10, batch_size=64, learning_rate=0.01),
    # Ours, for any network: one cycle of SGD with Nesterov's momentum, the gradient clipped so that networks
    # without norms hold too.
    "fast": Recipe(
        name="fast",
        epochs=10,
        batch_size=128,
        learning_rate=0.05,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        schedule="linear",
        warm_up=0.2,
        label_smoothing=0.1,
        max_grad_norm=1.0,
        normalize=True,
        flip=True,
        crop=2,
        channels_last=True,
    ),
}

NETWORK_RECIPES: Final = {
    # A network that asks for settings of its own under a general name. Rates, momentum, smoothing and batch of the
    # speed records on CIFAR-10 with Muon (cifar10-airbench, 2025).
    ("fast", "fastnet"): Recipe(
        name="fast",
        epochs=8,
        batch_size=2000,
        learning_rate=0.24,
        optimizer="muon",
        bias_lr=0.053,
        head_lr=0.67,
        momentum=0.6,
        nesterov=True,
        schedule="linear",
        label_smoothing=0.2,
        normalize=True,
        flip=True,
        crop=2,
        channels_last=True,
    ),
}


_OPTIONAL: Final = frozenset(field.name for field in msgspec.structs.fields(Recipe) if field.default is None)
"""What a recipe may leave out; elsewhere the text "none" is a value, as of a name."""


def recipe(name: str, model: str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name or from a TOML file, with what is given in place of its own values.

    Args:
        name: a recipe's name, or the path of a `.toml` file whose `base` names the recipe that it changes.
        model: the network, which may have its own row under a general name.
        overrides: values by field, as values or as text; those that are None count as not given, and the text "none"
            unsets what a recipe may leave out.

    Raises:
        UsageError: no such recipe, no such field, or a value that makes no sense.
    """
    values = _from_file(Path(name), model) if name.endswith(".toml") else msgspec.to_builtins(_named(name, model))
    return changed(values, overrides or {}, f"recipe {name}")


def changed(values: Mapping[str, Any], overrides: Mapping[str, Any], origin: str) -> Recipe:
    """The recipe of those values, with what is given (not None) in place of them.

    Raises:
        UsageError: no such field, or a value that makes no sense; `origin` says whose.
    """
    given = {field: value for field, value in overrides.items() if value is not None}
    fields = Recipe.__struct_fields__
    for field in (*values, *given):
        if field not in fields:
            raise unknown("recipe field", field, fields)
    try:
        settled = {
            field: None if field in _OPTIONAL and value == "none" else value
            for field, value in {**values, **given}.items()
        }
        return msgspec.convert(settled, Recipe, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{origin}{f' with {given}' if given else ''} makes no sense ({error})",
            "mend the value; `cifarx train --recipe fast --dry-run` shows every field",
        ) from error


def _named(name: str, model: str | None) -> Recipe:
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return NETWORK_RECIPES.get((name, model or ""), RECIPES[name])


def _from_file(path: Path, model: str | None) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"recipe {path} cannot be read ({reason})", "give a TOML file of recipe fields") from error
    base = values.pop("base", None)
    if base is None:
        return {"name": path.stem, **values}
    if not isinstance(base, str):
        raise UsageError(f"recipe {path} has the base {base!r}", f"name one of {', '.join(RECIPES)}")
    return {**msgspec.to_builtins(_named(base, model)), "name": path.stem, **values}
