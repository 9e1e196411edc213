import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_train.recipes import NETWORK_RECIPES, RECIPES, Recipe, changed, recipe

counts = st.integers(1, 10**9)
rates = st.floats(0, sys.float_info.max, exclude_min=True)
amounts = st.floats(0, sys.float_info.max)
shares = st.floats(0, 1, exclude_max=True)
pixels = st.integers(0, 64)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe that makes sense."""
    optimizer = draw(st.sampled_from(["sgd", "adamw", "muon"]))
    momentum = 0.0 if optimizer == "adamw" else draw(shares)
    values: dict[str, Any] = {
        "name": draw(st.text(st.characters(codec="utf-8", exclude_characters="\x7f"))),
        "epochs": draw(counts),
        "batch_size": draw(counts),
        "learning_rate": draw(rates),
        "optimizer": optimizer,
        "bias_lr": draw(rates) if optimizer == "muon" else None,
        "head_lr": draw(rates) if optimizer == "muon" else None,
        "momentum": momentum,
        "nesterov": bool(momentum) and draw(st.booleans()),
        "weight_decay": draw(amounts),
        "schedule": draw(st.sampled_from(["constant", "linear", "cosine"])),
        "warm_up": draw(shares),
        "label_smoothing": draw(shares),
        "max_grad_norm": draw(st.none() | rates),
        "ema": draw(st.none() | shares),
        "normalize": draw(st.booleans()),
        "flip": draw(st.booleans()),
        "crop": draw(pixels),
        "cutout": draw(pixels),
        "jitter": draw(shares),
        "precision": draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        "channels_last": draw(st.booleans()),
        "compile": draw(st.booleans()),
        "patience": draw(st.none() | counts),
        "max_minutes": draw(st.none() | rates),
    }
    return Recipe(**values)


def written(folder: Path, content: str, name: str = "mine.toml") -> str:
    """The path of a recipe file with that content, as the command line would have it."""
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


# --- the recipes themselves


def test_the_notes_recipe_is_that_of_the_notes() -> None:
    assert recipe("notes") == Recipe(name="notes", epochs=10, batch_size=64, learning_rate=0.01)


def test_the_notes_recipe_does_nothing_that_the_notes_do_not() -> None:
    notes = recipe("notes")
    assert notes.optimizer == "sgd"
    off = ("momentum", "weight_decay", "warm_up", "label_smoothing", "normalize", "flip", "crop", "cutout", "jitter")
    assert not any(getattr(notes, field) for field in off)
    assert (notes.schedule, notes.precision, notes.compile) == ("constant", "fp32", False)
    assert notes.max_grad_norm is notes.ema is notes.patience is notes.max_minutes is None


def test_every_recipe_has_the_name_that_it_is_asked_for_by() -> None:
    assert {name: chosen.name for name, chosen in RECIPES.items()} == {name: name for name in RECIPES}
    assert all(NETWORK_RECIPES[key].name == key[0] for key in NETWORK_RECIPES)
    assert {general for general, _ in NETWORK_RECIPES} <= set(RECIPES)


def test_a_network_may_have_its_own_row_under_a_general_name() -> None:
    for (name, model), own in NETWORK_RECIPES.items():
        assert recipe(name, model) == own
        assert recipe(name, model) != recipe(name)
        assert recipe(name, "lzh") == recipe(name) == RECIPES[name]
        assert recipe("notes", model) == RECIPES["notes"]


def test_the_rows_of_networks_are_networks_that_there_are() -> None:
    from cifarx_train.models.registry import network

    assert [network(model).name for _, model in NETWORK_RECIPES] == [model for _, model in NETWORK_RECIPES]


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown recipe 'note': did you mean 'notes'"):
        recipe("note")


# --- what is given in place of its values


@given(epochs=st.none() | counts, batch_size=st.none() | counts, learning_rate=st.none() | rates)
def test_what_is_given_replaces_the_recipes_own(
    epochs: int | None, batch_size: int | None, learning_rate: float | None
) -> None:
    given_values = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    chosen = recipe("notes", overrides=given_values)
    expected = {
        field: value if value is not None else getattr(RECIPES["notes"], field) for field, value in given_values.items()
    }
    assert chosen == msgspec.structs.replace(RECIPES["notes"], **expected)
    assert recipe("notes") == RECIPES["notes"]


@given(recipes())
def test_values_given_as_text_are_those_values(chosen: Recipe) -> None:
    values = {field: value for field, value in msgspec.to_builtins(chosen).items() if value is not None}
    texts = {field: str(value).lower() if isinstance(value, bool) else str(value) for field, value in values.items()}
    assert changed({}, texts, "the text") == chosen


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("momentum", "0.95", 0.95),
        ("learning_rate", "5e-3", 0.005),
        ("epochs", "3", 3),
        ("flip", "true", True),
        ("flip", "false", False),
        ("schedule", "cosine", "cosine"),
        ("max_grad_norm", "1", 1.0),
        ("max_grad_norm", "none", None),
        ("max_grad_norm", "null", None),
    ],
)
def test_text_from_a_command_line(field: str, text: str, value: object) -> None:
    chosen = getattr(recipe("fast", overrides={field: text}), field)
    assert chosen == value
    assert type(chosen) is type(value)


def test_an_unknown_field_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown recipe field 'momentm': did you mean 'momentum'"):
        recipe("notes", overrides={"momentm": "0.9"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (field, value)
            for field in ("epochs", "batch_size", "learning_rate")
            for value in (0, -1, "0", "-1", "many")
        ),
        *(("learning_rate", value) for value in (float("nan"), float("inf"), float("-inf"), "nan", "inf", "1e400")),
        *((field, "nan") for field in ("momentum", "weight_decay", "ema", "warm_up", "jitter", "max_minutes")),
        *((field, 1.0) for field in ("momentum", "ema", "warm_up", "label_smoothing", "jitter")),
        ("epochs", 1.5),
        ("epochs", True),
        ("weight_decay", -1e-9),
        ("max_grad_norm", 0),
        ("crop", -1),
        ("crop", 65),
        ("patience", 0),
        ("flip", "perhaps"),
        ("optimizer", "adam"),
        ("schedule", "step"),
        ("precision", "fp8"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_and_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match="makes no sense") as caught:
        recipe("notes", overrides={field: value})
    assert field in caught.value.problem
    assert str(value) in caught.value.problem


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"optimizer": "muon"}, "muon needs bias_lr and head_lr"),
        ({"optimizer": "muon", "bias_lr": 0.1}, "muon needs bias_lr and head_lr"),
        ({"optimizer": "muon", "head_lr": 0.1}, "muon needs bias_lr and head_lr"),
        ({"bias_lr": 0.1}, "belong to the optimizer muon"),
        ({"optimizer": "adamw", "head_lr": "0.1"}, "belong to the optimizer muon"),
        ({"optimizer": "adamw", "momentum": 0.9}, "adamw has no momentum"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        recipe("notes", overrides=values)


def test_a_network_s_own_rates_do_not_fit_another_optimizer() -> None:
    with pytest.raises(UsageError, match="belong to the optimizer muon"):
        recipe("fast", "fastnet", {"optimizer": "sgd"})


# --- as plain data, and as files


@given(recipes())
def test_a_recipe_survives_as_plain_data(chosen: Recipe) -> None:
    document = msgspec.json.encode(msgspec.to_builtins(chosen))
    assert changed(msgspec.json.decode(document), {}, "the document") == chosen


@given(chosen=recipes())
@example(chosen=Recipe(name="none", epochs=1, batch_size=1, learning_rate=1.0))
def test_a_recipe_survives_as_a_file(tmp_path_factory: pytest.TempPathFactory, chosen: Recipe) -> None:
    path = written(tmp_path_factory.mktemp("recipe"), chosen.to_toml())
    assert recipe(path) == chosen


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_toml_shows_every_field(name: str) -> None:
    text = recipe(name).to_toml()
    values = {field: value for field, value in msgspec.to_builtins(recipe(name)).items() if value is not None}
    assert tomllib.loads(text) == values
    assert all(field in text for field in Recipe.__struct_fields__)


def test_a_file_changes_the_recipe_that_it_names_as_its_base(tmp_path: Path) -> None:
    path = written(tmp_path, 'base = "fast"\nepochs = 3\nlearning_rate = 1\n')
    assert recipe(path) == msgspec.structs.replace(RECIPES["fast"], name="mine", epochs=3, learning_rate=1.0)
    assert recipe(path, overrides={"epochs": "7"}).epochs == 7


def test_the_base_of_a_file_is_the_network_s_own_row(tmp_path: Path) -> None:
    path = written(tmp_path, 'base = "fast"\nepochs = 3\n')
    own = NETWORK_RECIPES["fast", "fastnet"]
    assert recipe(path, "fastnet") == msgspec.structs.replace(own, name="mine", epochs=3)


def test_a_file_without_a_base_says_all_that_has_no_default(tmp_path: Path) -> None:
    path = written(tmp_path, "epochs = 3\nbatch_size = 8\nlearning_rate = 0.5\n")
    assert recipe(path) == Recipe(name="mine", epochs=3, batch_size=8, learning_rate=0.5)
    with pytest.raises(UsageError, match=r"mine\.toml makes no sense .*missing.*learning_rate"):
        recipe(written(tmp_path, "epochs = 3\nbatch_size = 8\n"))
    assert recipe(str(tmp_path / "mine.toml"), overrides={"learning_rate": 1}).learning_rate == 1.0


def test_a_file_may_name_itself(tmp_path: Path) -> None:
    assert recipe(written(tmp_path, 'base = "notes"\nname = "other"\n')).name == "other"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epochs = ", "cannot be read"),
        ("epochs = 3\nepochs = 4\n", "cannot be read"),
        ('base = "note"\n', "did you mean 'notes'"),
        ("base = 3\n", "has the base 3"),
        ('base = "notes"\nmomentm = 0.9\n', "did you mean 'momentum'"),
        ('base = "notes"\nepochs = 0\n', "makes no sense"),
        ('base = "notes"\nlearning_rate = nan\n', "makes no sense"),
        ('base = "notes"\nnesterov = true\n', "nesterov needs a momentum"),
        ('[notes]\nbase = "notes"\n', "unknown recipe field 'notes'"),
    ],
)
def test_a_broken_file_is_told_in_one_error(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        recipe(written(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml cannot be read .*No such file"):
        recipe(str(tmp_path / "absent.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match=r"folder\.toml cannot be read"):
        recipe(str(tmp_path / "folder.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(UsageError, match=r"latin\.toml cannot be read"):
        recipe(str(tmp_path / "latin.toml"))


@given(content=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_a_recipe_or_a_usage_error(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    path = written(tmp_path_factory.mktemp("any"), content)
    with pytest.raises(UsageError):  # for three fields have no default
        recipe(path)


# --- two of them


def test_differences_are_told_with_both_values() -> None:
    one = recipe("notes", overrides={"epochs": 3, "ema": 0.9})
    assert one.differences(recipe("notes")) == {"epochs": (3, 10), "ema": (0.9, None)}
    assert one.differences(one) == {}


@given(recipes(), recipes())
def test_no_difference_means_equal(one: Recipe, other: Recipe) -> None:
    assert (one.differences(other) == {}) == (one == other)


def test_recipes_need_no_pytorch() -> None:
    code = "import sys\nfrom cifarx_train.recipes import recipe\nrecipe('fast', 'fastnet').to_toml()\n"
    code += "sys.exit(bool({'torch', 'torchvision'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
