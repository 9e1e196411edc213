"""Training recipes as plain data. Every checkpoint records the recipe it was trained with."""

import sys
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from cifarx_serve.errors import FallbackWarning, UsageError, error_message, unknown_name_error
from cifarx_serve.files.regular_file import read_text_file

PositiveInt: TypeAlias = Annotated[int, Meta(ge=1)]
Pixels: TypeAlias = Annotated[int, Meta(ge=0, le=64)]
PositiveFloat: TypeAlias = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
NonNegativeFloat: TypeAlias = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Fraction: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train a model on a dataset. Every default is the simplest choice.

    Attributes:
        name: the name of the recipe, recorded in checkpoints.
        epochs: the number of passes over the training images.
        batch_size: images per step, over all processes. The last step of an epoch may have fewer.
        learning_rate: the peak of the learning rate schedule.
        optimizer: `sgd`, `adamw`, or `muon`, which trains the convolutions and hidden layers with Muon and everything
            else with SGD.
        bias_lr, head_lr: with Muon, the peak learning rates of the biases and norms, and of the last layer.
        momentum: the momentum of SGD and Muon.
        nesterov: whether to use Nesterov momentum.
        weight_decay: the decay of weights with two or more dimensions; biases and norms are not decayed. Muon keeps
            the norm of its weights constant, so with Muon only the last layer decays.
        schedule: the learning rate after the warm-up: `constant`, or a `linear` or `cosine` decay to zero.
        warmup_fraction: the fraction of all steps during which the learning rate rises linearly from zero.
        label_smoothing: the fraction of each label that is spread over all classes.
        max_grad_norm: the norm to which the gradient of all parameters together is clipped.
        ema_decay: the decay per step of an exponential moving average of the weights. The average is evaluated and
            saved.
        normalize: whether to normalize the input to mean 0 and standard deviation 1 per channel of the training
            images.
        flip: whether to flip half of the images horizontally.
        crop: the largest random shift of an image, in pixels. The border is filled by reflection.
        cutout: the side of a random square that is blanked, in pixels.
        jitter: the largest relative change of brightness, contrast and saturation.
        precision: the precision of the forward and backward passes. Weights and optimizer state stay in fp32. `auto` is
            bf16 on a GPU that computes it in hardware, and fp32 elsewhere.
        channels_last: whether weights and activations use the channels-last memory format on a GPU. If it is not set,
            they use it for bf16 and fp16, because tensor cores compute in this format. On a CPU, activations always
            use it and weights never do.
        compile: whether to compile the model with `torch.compile`.
        patience: stop after this number of epochs without an improvement in test accuracy.
        max_minutes: stop after this number of minutes of training.
    """

    name: str
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    bias_lr: PositiveFloat | None = None
    head_lr: PositiveFloat | None = None
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_fraction: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    max_grad_norm: PositiveFloat | None = None
    ema_decay: Fraction | None = None
    normalize: bool = False
    flip: bool = False
    crop: Pixels = 0
    cutout: Pixels = 0
    jitter: Fraction = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool | None = None
    compile: bool = False
    patience: PositiveInt | None = None
    max_minutes: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.optimizer == "muon" and not (self.bias_lr and self.head_lr):
            raise ValueError("muon needs bias_lr and head_lr")
        if self.optimizer != "muon" and (self.bias_lr or self.head_lr):
            raise ValueError("bias_lr and head_lr are only for the optimizer muon")
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError("adamw does not use momentum")

    def diff(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two recipes differ, each with the value here and the value in `other`."""
        pairs = {field: (getattr(self, field), getattr(other, field)) for field in self.__struct_fields__}
        return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}

    def complete(self, *, precision: str | None = None, channels_last: bool | None = None) -> "Recipe":
        """Return the recipe with values for the fields that it leaves to the device. Other fields do not change."""
        values: dict[str, Any] = {}
        if self.precision == "auto" and precision is not None:
            values["precision"] = precision
        if self.channels_last is None and channels_last is not None:
            values["channels_last"] = channels_last
        return msgspec.structs.replace(self, **values)

    def to_toml(self) -> str:
        """Return a TOML document that `--recipe FILE` reads back. Fields that are not set appear as comments."""
        lines = [
            f"# {field} is not set" if value is None else f"{field} = {msgspec.json.encode(value).decode()}"
            for field, value in msgspec.to_builtins(self).items()
        ]
        return "\n".join(lines)


RECIPES: Final = {
    # The CIFAR-10 training notes: SGD at 0.01 without momentum, batch size 64, inputs in [0, 1], no augmentation.
    "notes": Recipe(name="notes", epochs=10, batch_size=64, learning_rate=0.01),
    # Our own, for any model: SGD with Nesterov momentum and one learning rate cycle. The gradient is clipped so that
    # models without normalization layers stay stable.
    "fast": Recipe(
        name="fast",
        epochs=10,
        batch_size=128,
        learning_rate=0.05,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        schedule="linear",
        warmup_fraction=0.2,
        label_smoothing=0.1,
        max_grad_norm=1.0,
        normalize=True,
        flip=True,
        crop=2,
    ),
}

RECIPE_ALIASES: Final = {"baseline": "notes"}
"""Other names of recipes. Checkpoints record the name on the right."""

MODEL_RECIPES: Final = {
    # Recipes for one model under a general name. The learning rates, momentum, label smoothing and batch size are those
    # of the CIFAR-10 speed records with Muon (cifar10-airbench, 2025).
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
        precision="auto",
    ),
}

RENAMED_FIELDS: Final = {
    "bias_rate": "bias_lr",
    "head_rate": "head_lr",
    "clip_norm": "max_grad_norm",
    "ema": "ema_decay",
    "warm_up": "warmup_fraction",
    "normalise": "normalize",
}
"""Field names of earlier versions and what the fields are called now."""

_OPTIONAL: Final = frozenset(field.name for field in msgspec.structs.fields(Recipe) if field.default is None)
"""Fields that "none" unsets. In the other fields "none" is a value, for example of `name`."""


def load_recipe(name: str, model: str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe by name, or read one from a TOML file.

    Args:
        name: the name of a recipe, or the path of a `.toml` file. The key `base` of a file names the recipe that the
            file changes.
        model: the name of the model. Some models have their own version of a recipe.
        overrides: values that replace those of the recipe, by field name, as Python values or as text. None means not
            given; the text "none" unsets an optional field.

    Raises:
        UsageError: the recipe or a field does not exist, or a value is invalid.
    """
    values = _read_toml(Path(name), model) if name.endswith(".toml") else msgspec.to_builtins(_find(name, model))
    return build_recipe(values, overrides or {}, f"recipe {name}")


def build_recipe(values: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> Recipe:
    """Build a recipe from field values, replaced by the `overrides` that are not None.

    Raises:
        UsageError: a field does not exist, or a value is invalid. The message names `source` as the origin of the
            values.
    """
    given = _rename_with_note({field: value for field, value in overrides.items() if value is not None})
    fields = Recipe.__struct_fields__
    for field in (*values, *given):
        if field not in fields:
            raise unknown_name_error("recipe field", field, fields)
    try:
        merged = {
            field: None if field in _OPTIONAL and value == "none" else value
            for field, value in {**values, **given}.items()
        }
        return msgspec.convert(merged, Recipe, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{source}{f' with {given}' if given else ''} is not valid ({error})",
            "correct the value; `cifarx train --recipe fast --dry-run` prints every field",
        ) from error


def rename_old_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return recipe values with the field names of earlier versions replaced by the current ones."""
    return {RENAMED_FIELDS.get(field, field): value for field, value in values.items()}


def _rename_with_note(values: Mapping[str, Any]) -> dict[str, Any]:
    for old, new in RENAMED_FIELDS.items():
        if old in values and new in values:
            raise UsageError(f"recipe field {new!r} is given twice, once by its old name {old!r}", f"remove {old!r}")
        if old in values:
            warnings.warn(f"recipe field {old!r} is now {new!r}", FallbackWarning, stacklevel=4)
    return rename_old_fields(values)


def _find(name: str, model: str | None) -> Recipe:
    name = RECIPE_ALIASES.get(name, name)
    if name not in RECIPES:
        raise unknown_name_error("recipe", name, (*RECIPES, *RECIPE_ALIASES))
    return MODEL_RECIPES.get((name, model or ""), RECIPES[name])


def _read_toml(path: Path, model: str | None) -> dict[str, Any]:
    try:
        document = tomllib.loads(read_text_file(path))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"recipe {path} cannot be read ({error_message(error)})", "give a TOML file of recipe fields"
        ) from error
    values = {"name": path.stem, **_rename_with_note(document)}
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UsageError(f"recipe {path} has the base {base!r}", f"use one of {', '.join(RECIPES)}")
    return {**msgspec.to_builtins(_find(base, model)), **values}
