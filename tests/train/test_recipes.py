import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cifarx_serve.errors import FallbackWarning, UsageError
from cifarx_train.recipes import (
    MODEL_RECIPES,
    RECIPE_ALIASES,
    RECIPES,
    RENAMED_FIELDS,
    Recipe,
    build_recipe,
    load_recipe,
    rename_old_fields,
)

positive_ints = st.integers(1, 10**9)
positive_floats = st.floats(0, sys.float_info.max, exclude_min=True)
non_negative_floats = st.floats(0, sys.float_info.max)
fractions = st.floats(0, 1, exclude_max=True)
pixels = st.integers(0, 64)


class_names = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any valid recipe."""
    optimizer = draw(st.sampled_from(["sgd", "adamw", "muon"]))
    momentum = 0.0 if optimizer == "adamw" else draw(fractions)
    class_weights = draw(st.sampled_from([None, "auto"]) | st.dictionaries(class_names, positive_floats, max_size=3))
    values: dict[str, Any] = {
        "name": draw(st.text(st.characters(codec="utf-8", exclude_characters="\x7f"))),
        "epochs": draw(positive_ints),
        "batch_size": draw(positive_ints),
        "learning_rate": draw(positive_floats),
        "optimizer": optimizer,
        "bias_lr": draw(positive_floats) if optimizer == "muon" else None,
        "head_lr": draw(positive_floats) if optimizer == "muon" else None,
        "momentum": momentum,
        "nesterov": bool(momentum) and draw(st.booleans()),
        "weight_decay": draw(non_negative_floats),
        "schedule": draw(st.sampled_from(["constant", "linear", "cosine"])),
        "warmup_fraction": draw(fractions),
        "label_smoothing": draw(fractions),
        "class_weights": class_weights,
        "sampler": "shuffle" if class_weights == "auto" else draw(st.sampled_from(["shuffle", "balanced"])),
        "calibrate": draw(st.booleans()),
        "max_grad_norm": draw(st.none() | positive_floats),
        "ema_decay": draw(st.none() | fractions),
        "normalize": draw(st.booleans()),
        "flip": draw(st.booleans()),
        "crop": draw(pixels),
        "cutout": draw(pixels),
        "jitter": draw(fractions),
        "accumulate": draw(positive_ints),
        "backbone_lr": None if optimizer == "muon" else draw(st.none() | positive_floats),
        "freeze": draw(st.lists(st.sampled_from(["layer1.*", "*.bias"]))),
        "random_resized_crop": draw(fractions),
        "auto_augment": draw(st.sampled_from([None, "trivial", "rand"])),
        "random_erasing": draw(fractions),
        "mixup": draw(non_negative_floats),
        "cutmix": draw(non_negative_floats),
        "distillation_weight": draw(st.none() | fractions),
        "distillation_temperature": draw(st.none() | positive_floats),
        "precision": draw(st.sampled_from(["auto", "fp32", "bf16", "fp16"])),
        "channels_last": draw(st.none() | st.booleans()),
        "compile": draw(st.booleans()),
        "patience": draw(st.none() | positive_ints),
        "max_minutes": draw(st.none() | positive_floats),
    }
    return Recipe(**values)


def write_toml(directory: Path, content: str, name: str = "mine.toml") -> str:
    """Write a recipe file and return its path as a string, as given on the command line."""
    path = directory / name
    path.write_text(content, encoding="utf-8")
    return str(path)


# --- the built-in recipes


def test_the_notes_recipe_has_the_settings_of_the_training_notes() -> None:
    assert load_recipe("notes") == Recipe(name="notes", epochs=10, batch_size=64, learning_rate=0.01)


def test_the_notes_recipe_enables_nothing_else() -> None:
    notes = load_recipe("notes")
    assert notes.optimizer == "sgd"
    off = (
        "momentum",
        "weight_decay",
        "warmup_fraction",
        "label_smoothing",
        "normalize",
        "flip",
        "crop",
        "cutout",
        "jitter",
    )
    assert not any(getattr(notes, field) for field in off)
    assert (notes.schedule, notes.precision, notes.compile) == ("constant", "fp32", False)
    assert notes.max_grad_norm is notes.ema_decay is notes.patience is notes.max_minutes is None


def test_every_recipe_records_its_own_name() -> None:
    assert {name: chosen.name for name, chosen in RECIPES.items()} == {name: name for name in RECIPES}
    assert all(MODEL_RECIPES[key].name == key[0] for key in MODEL_RECIPES)
    assert {general for general, _ in MODEL_RECIPES} <= set(RECIPES)


def test_a_model_may_have_its_own_version_of_a_recipe() -> None:
    for (name, model), own in MODEL_RECIPES.items():
        assert load_recipe(name, model) == own
        assert load_recipe(name, model) != load_recipe(name)
        assert load_recipe(name, "lzh") == load_recipe(name) == RECIPES[name]
        assert load_recipe("notes", model) == RECIPES["notes"]


def test_model_recipes_name_existing_models() -> None:
    from cifarx_train.models.registry import get_architecture

    assert [get_architecture(model).name for _, model in MODEL_RECIPES] == [model for _, model in MODEL_RECIPES]


def test_an_unknown_name_suggests_the_closest_match() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("note")
    assert (
        str(caught.value) == "unknown recipe 'note': did you mean 'notes'? choose from baseline, fast, finetune, notes"
    )


def test_baseline_is_another_name_of_the_notes_recipe(tmp_path: Path) -> None:
    assert RECIPE_ALIASES == {"baseline": "notes"}
    assert load_recipe("baseline") == load_recipe("notes")
    assert load_recipe("baseline", overrides={"epochs": 3}) == load_recipe("notes", overrides={"epochs": 3})
    path = write_toml(tmp_path, 'base = "baseline"\nepochs = 3\n')
    assert load_recipe(path) == msgspec.structs.replace(RECIPES["notes"], name="mine", epochs=3)


def test_the_fine_tuning_recipe_trains_the_backbone_slowly() -> None:
    chosen = load_recipe("finetune")
    assert chosen.backbone_lr is not None
    assert chosen.backbone_lr < chosen.learning_rate


@pytest.mark.parametrize("given", ["layer1.*, *.bias", ["layer1.*", "*.bias"]])
def test_a_list_as_text_is_separated_by_commas(given: Any) -> None:
    assert load_recipe("notes", overrides={"freeze": given}).freeze == ["layer1.*", "*.bias"]


def test_muon_has_no_backbone_lr() -> None:
    with pytest.raises(UsageError, match="backbone_lr is not for the optimizer muon"):
        load_recipe("fast", "fastnet", {"backbone_lr": 0.1})


# --- overrides


@given(
    epochs=st.none() | positive_ints, batch_size=st.none() | positive_ints, learning_rate=st.none() | positive_floats
)
def test_overrides_replace_the_values_of_the_recipe(
    epochs: int | None, batch_size: int | None, learning_rate: float | None
) -> None:
    overrides = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    chosen = load_recipe("notes", overrides=overrides)
    expected = {
        field: value if value is not None else getattr(RECIPES["notes"], field) for field, value in overrides.items()
    }
    assert chosen == msgspec.structs.replace(RECIPES["notes"], **expected)
    assert load_recipe("notes") == RECIPES["notes"]


@given(recipes())
def test_values_can_be_given_as_text(chosen: Recipe) -> None:
    values = {field: value for field, value in msgspec.to_builtins(chosen).items() if value is not None}
    texts = {field: str(value).lower() if isinstance(value, bool) else str(value) for field, value in values.items()}
    texts["freeze"] = ",".join(values["freeze"])
    texts |= {field: value for field, value in values.items() if isinstance(value, dict)}  # of a file
    assert build_recipe({}, texts, "the text") == chosen


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
def test_text_is_converted_to_the_type_of_the_field(field: str, text: str, value: object) -> None:
    chosen = getattr(load_recipe("fast", overrides={field: text}), field)
    assert chosen == value
    assert type(chosen) is type(value)


def test_an_unknown_field_suggests_the_closest_match() -> None:
    with pytest.raises(UsageError, match="unknown recipe field 'momentm': did you mean 'momentum'"):
        load_recipe("notes", overrides={"momentm": "0.9"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (field, value)
            for field in ("epochs", "batch_size", "learning_rate")
            for value in (0, -1, "0", "-1", "many")
        ),
        *(("learning_rate", value) for value in (float("nan"), float("inf"), float("-inf"), "nan", "inf", "1e400")),
        *(
            (field, "nan")
            for field in ("momentum", "weight_decay", "ema_decay", "warmup_fraction", "jitter", "max_minutes")
        ),
        *((field, 1.0) for field in ("momentum", "ema_decay", "warmup_fraction", "label_smoothing", "jitter")),
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
def test_an_invalid_value_is_rejected_and_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match="is not valid") as caught:
        load_recipe("notes", overrides={field: value})
    assert field in caught.value.problem
    assert str(value) in caught.value.problem


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"optimizer": "muon"}, "muon needs bias_lr and head_lr"),
        ({"optimizer": "muon", "bias_lr": 0.1}, "muon needs bias_lr and head_lr"),
        ({"optimizer": "muon", "head_lr": 0.1}, "muon needs bias_lr and head_lr"),
        ({"bias_lr": 0.1}, "are only for the optimizer muon"),
        ({"optimizer": "adamw", "head_lr": "0.1"}, "are only for the optimizer muon"),
        ({"optimizer": "adamw", "momentum": 0.9}, "adamw does not use momentum"),
    ],
)
def test_contradicting_values_are_rejected(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_recipe("notes", overrides=values)


def test_the_learning_rates_of_a_model_recipe_do_not_fit_another_optimizer() -> None:
    with pytest.raises(UsageError, match="are only for the optimizer muon"):
        load_recipe("fast", "fastnet", {"optimizer": "sgd"})


# --- plain data and files


@given(recipes())
def test_a_recipe_round_trips_through_json(chosen: Recipe) -> None:
    document = msgspec.json.encode(msgspec.to_builtins(chosen))
    assert build_recipe(msgspec.json.decode(document), {}, "the document") == chosen


@given(chosen=recipes())
@example(chosen=Recipe(name="none", epochs=1, batch_size=1, learning_rate=1.0))
def test_a_recipe_round_trips_through_toml(tmp_path_factory: pytest.TempPathFactory, chosen: Recipe) -> None:
    path = write_toml(tmp_path_factory.mktemp("recipe"), chosen.to_toml())
    assert load_recipe(path) == chosen


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_toml_contains_every_field(name: str) -> None:
    text = load_recipe(name).to_toml()
    values = {field: value for field, value in msgspec.to_builtins(load_recipe(name)).items() if value is not None}
    assert tomllib.loads(text) == values
    assert all(field in text for field in Recipe.__struct_fields__)


def test_a_file_changes_its_base_recipe(tmp_path: Path) -> None:
    path = write_toml(tmp_path, 'base = "fast"\nepochs = 3\nlearning_rate = 1\n')
    assert load_recipe(path) == msgspec.structs.replace(RECIPES["fast"], name="mine", epochs=3, learning_rate=1.0)
    assert load_recipe(path, overrides={"epochs": "7"}).epochs == 7


def test_the_base_of_a_file_may_be_a_model_recipe(tmp_path: Path) -> None:
    path = write_toml(tmp_path, 'base = "fast"\nepochs = 3\n')
    own = MODEL_RECIPES["fast", "fastnet"]
    assert load_recipe(path, "fastnet") == msgspec.structs.replace(own, name="mine", epochs=3)


def test_a_file_without_a_base_needs_all_fields_without_a_default(tmp_path: Path) -> None:
    path = write_toml(tmp_path, "epochs = 3\nbatch_size = 8\nlearning_rate = 0.5\n")
    assert load_recipe(path) == Recipe(name="mine", epochs=3, batch_size=8, learning_rate=0.5)
    with pytest.raises(UsageError, match=r"mine\.toml is not valid .*missing.*learning_rate"):
        load_recipe(write_toml(tmp_path, "epochs = 3\nbatch_size = 8\n"))
    assert load_recipe(str(tmp_path / "mine.toml"), overrides={"learning_rate": 1}).learning_rate == 1.0


def test_a_file_may_set_its_name(tmp_path: Path) -> None:
    assert load_recipe(write_toml(tmp_path, 'base = "notes"\nname = "other"\n')).name == "other"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epochs = ", "cannot be read"),
        ("epochs = 3\nepochs = 4\n", "cannot be read"),
        (f"epochs = {'[' * 100_000}", "cannot be read"),
        (f"epochs = {'9' * 5000}", "cannot be read"),
        ('base = "note"\n', "did you mean 'notes'"),
        ("base = 3\n", "has the base 3"),
        ('base = "notes"\nmomentm = 0.9\n', "did you mean 'momentum'"),
        ('base = "notes"\nepochs = 0\n', "is not valid"),
        ('base = "notes"\nlearning_rate = nan\n', "is not valid"),
        ('base = "notes"\nnesterov = true\n', "nesterov needs a momentum"),
        ('[notes]\nbase = "notes"\n', "unknown recipe field 'notes'"),
    ],
)
def test_a_malformed_file_is_rejected(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        load_recipe(write_toml(tmp_path, content))


def test_an_unreadable_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml cannot be read .*No such file"):
        load_recipe(str(tmp_path / "absent.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match=r"folder\.toml cannot be read"):
        load_recipe(str(tmp_path / "folder.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(UsageError, match=r"latin\.toml cannot be read"):
        load_recipe(str(tmp_path / "latin.toml"))


@given(content=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_a_recipe_or_raises_usage_error(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    path = write_toml(tmp_path_factory.mktemp("any"), content)
    with pytest.raises(UsageError):  # three fields have no default
        load_recipe(path)


# --- fields that are left to the device


def test_only_fields_that_are_left_to_the_device_are_completed() -> None:
    left = load_recipe("fast", "fastnet")
    assert (left.precision, left.channels_last) == ("auto", None)
    completed = left.complete(precision="bf16", channels_last=True)
    assert completed.diff(left) == {"precision": ("bf16", "auto"), "channels_last": (True, None)}
    assert completed.complete(precision="fp32", channels_last=False) == completed
    assert left.complete() == left


def test_the_device_decides_about_precision_only_where_a_recipe_says_so() -> None:
    assert load_recipe("notes").precision == load_recipe("fast").precision == "fp32"
    assert load_recipe("notes", overrides={"precision": "auto"}).precision == "auto"


# --- field names of earlier versions

OLD_VALUES: dict[str, Any] = {
    "bias_rate": 0.05,
    "head_rate": 0.6,
    "clip_norm": 2.0,
    "ema": 0.9,
    "warm_up": 0.3,
    "normalise": True,
}


def renamed(old: str) -> str:
    return f"recipe field {old!r} is now {RENAMED_FIELDS[old]!r}"


def test_every_renamed_field_is_a_field() -> None:
    assert set(OLD_VALUES) == set(RENAMED_FIELDS)
    assert set(RENAMED_FIELDS.values()) <= set(Recipe.__struct_fields__)
    assert not set(RENAMED_FIELDS) & set(Recipe.__struct_fields__)


@pytest.mark.parametrize("old", list(OLD_VALUES))
def test_an_override_may_use_the_old_name_of_a_field(old: str) -> None:
    overrides: dict[str, Any] = {"optimizer": "muon", "bias_lr": 0.1, "head_lr": 0.1}
    overrides.pop(RENAMED_FIELDS[old], None)
    with pytest.warns(FallbackWarning) as warned:
        chosen = load_recipe("notes", overrides={**overrides, old: str(OLD_VALUES[old]).lower()})
    assert [str(warning.message) for warning in warned] == [renamed(old)]
    assert getattr(chosen, RENAMED_FIELDS[old]) == OLD_VALUES[old]


def test_a_file_may_use_the_old_names_of_fields(tmp_path: Path) -> None:
    lines = [f"{field} = {msgspec.json.encode(value).decode()}" for field, value in OLD_VALUES.items()]
    path = write_toml(tmp_path, 'base = "notes"\noptimizer = "muon"\n' + "\n".join(lines))
    with pytest.warns(FallbackWarning) as warned:
        chosen = load_recipe(path)
    assert sorted(str(warning.message) for warning in warned) == sorted(map(renamed, OLD_VALUES))
    assert {field: getattr(chosen, RENAMED_FIELDS[field]) for field in OLD_VALUES} == OLD_VALUES
    assert not any(f"{old} " in chosen.to_toml() for old in OLD_VALUES)


def test_an_old_name_in_a_file_replaces_the_value_of_its_base(tmp_path: Path) -> None:
    path = write_toml(tmp_path, 'base = "fast"\nwarm_up = 0.5\n')
    with pytest.warns(FallbackWarning, match="recipe field 'warm_up' is now 'warmup_fraction'"):
        assert load_recipe(path).warmup_fraction == 0.5


def test_the_same_field_under_both_names_is_rejected(tmp_path: Path) -> None:
    words = "recipe field 'ema_decay' is given twice, once by its old name 'ema': remove 'ema'"
    with pytest.raises(UsageError, match=words):
        load_recipe("notes", overrides={"ema": 0.9, "ema_decay": 0.8})
    with pytest.raises(UsageError, match=words):
        load_recipe(write_toml(tmp_path, 'base = "notes"\nema = 0.9\nema_decay = 0.8\n'))
    with pytest.warns(FallbackWarning):
        assert load_recipe("notes", overrides={"ema": 0.9, "ema_decay": None}).ema_decay == 0.9


@given(recipes())
def test_plain_data_with_old_names_is_the_same_recipe(chosen: Recipe) -> None:
    old_names = {new: old for old, new in RENAMED_FIELDS.items()}
    values = msgspec.to_builtins(chosen)
    old_values = {old_names.get(field, field): value for field, value in values.items()}
    assert build_recipe(rename_old_fields(old_values), {}, "the document") == chosen
    assert rename_old_fields(values) == values


# --- comparison


def test_diff_returns_both_values() -> None:
    one = load_recipe("notes", overrides={"epochs": 3, "ema_decay": 0.9})
    assert one.diff(load_recipe("notes")) == {"epochs": (3, 10), "ema_decay": (0.9, None)}
    assert one.diff(one) == {}


@given(recipes(), recipes())
def test_recipes_without_a_diff_are_equal(one: Recipe, other: Recipe) -> None:
    assert (one.diff(other) == {}) == (one == other)


def test_recipes_need_no_pytorch() -> None:
    code = "import sys\nfrom cifarx_train.recipes import load_recipe\nload_recipe('fast', 'fastnet').to_toml()\n"
    code += "sys.exit(bool({'torch', 'torchvision'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
