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
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train a model on a dataset. Every default is the simplest choice.

    Attributes:
        name: the name of the recipe, recorded in checkpoints.
        epochs: the number of passes over the training images.
        batch_size: images per step, over all processes. The last step of an epoch may have fewer.
        accumulate: the number of batches whose gradients are added up in one step. The result is that of batches that
            are this number of times as large, except for BatchNorm, which sees one batch at a time.
        freeze: glob patterns of the names of parameters that are not trained, such as `layer1.*`. BatchNorm layers
            whose parameters are all frozen keep their statistics too.
        learning_rate: the peak of the learning rate schedule.
        optimizer: `sgd`, `adamw`, or `muon`, which trains the convolutions and hidden layers with Muon and everything
            else with SGD.
        bias_lr, head_lr: with Muon, the peak learning rates of the biases and norms, and of the last layer.
        backbone_lr: the peak learning rate of everything but the head, the last layer, which has `learning_rate`.
        momentum: the momentum of SGD and Muon.
        nesterov: whether to use Nesterov momentum.
        weight_decay: the decay of weights with two or more dimensions; biases and norms are not decayed. Muon keeps
            the norm of its weights constant, so with Muon only the last layer decays.
        schedule: the learning rate after the warm-up: `constant`, or a `linear` or `cosine` decay to zero.
        warmup_fraction: the fraction of all steps during which the learning rate rises linearly from zero.
        label_smoothing: the fraction of each label that is spread over all classes.
        class_weights: what the loss of an image is multiplied by: a number for each class by its name, of which only
            the ratios matter; or `auto` for the inverse of the number of training images of the class.
        sampler: `shuffle` uses every training image once in an epoch. `balanced` uses as many images, equally many of
            every class, so that images of frequent classes are left out and those of rare ones repeated.
        max_grad_norm: the norm to which the gradient of all parameters together is clipped.
        ema_decay: the decay per step of an exponential moving average of the weights. The average is evaluated and
            saved.
        normalize: whether to normalize the input to mean 0 and standard deviation 1 per channel of the training
            images.
        flip: whether to flip half of the images horizontally.
        crop: the largest random shift of an image, in pixels. The border is filled by reflection.
        cutout: the side of a random square that is blanked, in pixels.
        random_resized_crop: the smallest fraction of an image's area to which it is cropped before it is resized to its
            size again; 0 for no crop.
        auto_augment: `trivial` applies one random operation of TrivialAugment to each image, `rand` two of RandAugment.
        random_erasing: the probability that a random rectangle of an image is blanked.
        mixup, cutmix: the parameter of the beta distribution of mixup and CutMix; 0 for none. With both, each image
            gets one of them.
        jitter: the largest relative change of brightness, contrast and saturation.
        precision: the precision of the forward and backward passes. Weights and optimizer state stay in fp32. `auto` is
            bf16 on a GPU that computes it in hardware, and fp32 elsewhere.
        channels_last: whether weights and activations use the channels-last memory format on a GPU. If it is not set,
            they use it for bf16 and fp16, because tensor cores compute in this format. On a CPU, activations always
            use it and weights never do.
        distillation_weight: with a teacher, the weight of its answers in the loss; the labels have the rest.
        distillation_temperature: with a teacher, what its logits and those of the model are divided by.
        compile: whether to compile the model with `torch.compile`.
        calibrate: whether to fit the temperature of the scores at the end of training, to the val split or to a tenth
            of the training images, which are then not trained on.
        patience: stop after this number of epochs without an improvement in accuracy, on the val split if there is one.
        max_minutes: stop after this number of minutes of training.
    """

    name: str
    epochs: PositiveInt
    batch_size: PositiveInt
    accumulate: PositiveInt = 1
    learning_rate: PositiveFloat
    backbone_lr: PositiveFloat | None = None
    freeze: list[str] = []
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    bias_lr: PositiveFloat | None = None
    head_lr: PositiveFloat | None = None
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_fraction: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    class_weights: Literal["auto"] | dict[str, PositiveFloat] | None = None
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    max_grad_norm: PositiveFloat | None = None
    ema_decay: Fraction | None = None
    normalize: bool = False
    flip: bool = False
    crop: Pixels = 0
    cutout: Pixels = 0
    jitter: Fraction = 0.0
    random_resized_crop: Fraction = 0.0
    auto_augment: Literal["trivial", "rand"] | None = None
    random_erasing: Share = 0.0
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    distillation_weight: Share | None = None
    distillation_temperature: PositiveFloat | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool | None = None
    compile: bool = False
    calibrate: bool = False
    patience: PositiveInt | None = None
    max_minutes: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.optimizer == "muon" and not (self.bias_lr and self.head_lr):
            raise ValueError("muon needs bias_lr and head_lr")
        if self.optimizer != "muon" and (self.bias_lr or self.head_lr):
            raise ValueError("bias_lr and head_lr are only for the optimizer muon")
        if self.optimizer == "muon" and self.backbone_lr:
            raise ValueError("backbone_lr is not for the optimizer muon, whose last layer has head_lr")
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError("adamw does not use momentum")
        if self.class_weights == "auto" and self.sampler == "balanced":
            raise ValueError("class_weights auto and sampler balanced do the same, so use one of them")

    def diff(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two recipes differ, each with the value here and the value in `other`."""
        pairs = {field: (getattr(self, field), getattr(other, field)) for field in self.__struct_fields__}
        return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}

    def complete(
        self,
        *,
        precision: str | None = None,
        channels_last: bool | None = None,
        distillation_weight: float | None = None,
        distillation_temperature: float | None = None,
    ) -> "Recipe":
        """Return the recipe with values for the fields that it leaves to the device and the teacher.

        Other fields do not change.
        """
        given = {
            "channels_last": channels_last,
            "distillation_weight": distillation_weight,
            "distillation_temperature": distillation_temperature,
        }
        values: dict[str, Any] = {
            field: value for field, value in given.items() if value is not None and getattr(self, field) is None
        }
        if self.precision == "auto" and precision is not None:
            values["precision"] = precision
        return msgspec.structs.replace(self, **values)

    def to_toml(self) -> str:
        """Return a TOML document that `--recipe FILE` reads back. Fields that are not set appear as comments."""
        lines = [
            f"# {field} is not set" if value is None else f"{field} = {_toml_value(value)}"
            for field, value in msgspec.to_builtins(self).items()
        ]
        return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return msgspec.json.encode(value).decode()


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
    # Our own, for weights that were trained on other data: few epochs of SGD with clipped gradients and a cosine, with
    # which BiT and ViT are fine-tuned (Kolesnikov et al. 2020, "Big Transfer"; Dosovitskiy et al. 2021, "An image is
    # worth 16x16 words"), and light augmentation of photographs. The values were chosen on halves of CIFAR-10.
    "finetune": Recipe(
        name="finetune",
        epochs=6,
        batch_size=32,
        learning_rate=0.1,
        backbone_lr=0.05,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        schedule="cosine",
        warmup_fraction=0.1,
        label_smoothing=0.1,
        max_grad_norm=1.0,
        normalize=True,
        flip=True,
        random_resized_crop=0.8,
        precision="auto",
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

_LISTS: Final = frozenset({"freeze"})
"""Fields that are lists. As text, their items are separated by commas."""

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
        merged = {field: _from_text(field, value) for field, value in {**values, **given}.items()}
        return msgspec.convert(merged, Recipe, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{source}{f' with {given}' if given else ''} is not valid ({error})",
            "correct the value; `cifarx train --recipe fast --dry-run` prints every field",
        ) from error


def _from_text(field: str, value: Any) -> Any:
    if field in _OPTIONAL and value == "none":
        return None
    if field in _LISTS and isinstance(value, str):
        return [part for item in value.split(",") if (part := item.strip())]
    return value


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
    except (OSError, ValueError, RecursionError) as error:  # ValueErrors: of encodings, of TOML, of long numbers
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
