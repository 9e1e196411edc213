import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_train.recipes import RECIPES, Recipe, recipe

counts = st.integers(1, 10**9)
rates = st.floats(0, sys.float_info.max, exclude_min=True)


def test_the_notes_recipe_is_that_of_the_notes() -> None:
    assert recipe("notes") == Recipe(name="notes", epochs=10, batch_size=64, learning_rate=0.01)


@given(epochs=st.none() | counts, batch_size=st.none() | counts, learning_rate=st.none() | rates)
def test_what_is_given_replaces_the_recipes_own(
    epochs: int | None, batch_size: int | None, learning_rate: float | None
) -> None:
    chosen = recipe("notes", epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
    own = RECIPES["notes"]
    assert chosen.epochs == (own.epochs if epochs is None else epochs)
    assert chosen.batch_size == (own.batch_size if batch_size is None else batch_size)
    assert chosen.learning_rate == (own.learning_rate if learning_rate is None else learning_rate)
    assert chosen.name == "notes"


@given(counts, counts, rates)
def test_a_recipe_survives_as_plain_data(epochs: int, batch_size: int, learning_rate: float) -> None:
    chosen = recipe("notes", epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
    document = msgspec.json.encode(msgspec.to_builtins(chosen))
    assert msgspec.json.decode(document, type=Recipe) == chosen


def test_an_override_does_not_change_the_recipe_itself() -> None:
    recipe("notes", epochs=1)
    assert recipe("notes").epochs == 10


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate"])
def test_a_number_that_is_not_positive_is_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=rf"{name}.*give positive numbers") as caught:
        recipe("notes", **{name: value})
    assert str(value) in caught.value.problem


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_learning_rate_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="learning_rate"):
        recipe("notes", learning_rate=value)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown recipe 'note': did you mean 'notes'"):
        recipe("note")
