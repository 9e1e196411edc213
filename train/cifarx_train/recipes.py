"""Training recipes, as plain data: a checkpoint carries the one that made it."""

import sys
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from cifarx_serve.errors import UsageError, unknown


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Plain SGD on the cross-entropy.

    Attributes:
        learning_rate: a step's size, constant through the run.
        batch_size: images a step; the last step of an epoch may have fewer.
    """

    name: str
    epochs: Annotated[int, Meta(ge=1)]
    batch_size: Annotated[int, Meta(ge=1)]
    learning_rate: Annotated[float, Meta(gt=0, le=sys.float_info.max)]


RECIPES: Final = {
    # The CIFAR-10 training notes: SGD at 0.01 without momentum, batch 64, inputs in [0, 1], no augmentation.
    "notes": Recipe(name="notes", epochs=10, batch_size=64, learning_rate=0.01),
}


def recipe(
    name: str, *, epochs: int | None = None, batch_size: int | None = None, learning_rate: float | None = None
) -> Recipe:
    """A recipe by name, with what is given in place of its own values.

    Raises:
        UsageError: no such recipe, or a value that makes no sense.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    overrides = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return msgspec.convert({**msgspec.to_builtins(RECIPES[name]), **given}, Recipe)
    except msgspec.ValidationError as error:
        raise UsageError(f"recipe {name} with {given} ({error})", "give positive numbers") from error
