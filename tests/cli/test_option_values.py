import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx.option_values import (
    parse_class_weights,
    parse_classes,
    parse_image_size,
    parse_numbers,
    parse_preprocessing,
)
from cifarx_serve.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"), [("224", (224, 224)), ("224x160", (224, 160)), ("28X32", (28, 32)), ("1", (1, 1))]
)
def test_image_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "224x", "x224", "1x2x3", "224.5", "65536", "٣", "2 2"])
def test_what_is_no_image_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid size: use pixels, such as --image-size 224, or HEIGHTxWIDTH"):
        parse_image_size(text)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.json", '{"cat": 1, "a dog, wild": 2.5}'),
        ("weights.toml", 'cat = 1\n"a dog, wild" = 2.5\n'),
        ("weights.csv", '\ufeffclass,weight\r\ncat, 1\r\n\r\n"a dog, wild",2.5\r\n'),
        ("weights", 'cat,1\n"a dog, wild",2.5'),
    ],
)
def test_class_weights_in_a_file(name: str, content: str) -> None:
    Path(name).write_text(content, encoding="utf-8")
    assert parse_class_weights(name) == {"cat": 1.0, "a dog, wild": 2.5}


def test_automatic_class_weights() -> None:
    assert parse_class_weights("auto") == "auto"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("w.json", '{"cat": 1, "cat": 2}', "has two weights of 'cat'"),
        ("w.json", "[1, 2]", "it is no object of names and numbers"),
        ("w.json", "3", "it is no object of names and numbers"),
        ("w.json", '{"cat": {"dog": 1}}', "has the weight [('dog', 1)] of 'cat'"),
        ("w.json", '{"cat": true}', "has the weight True of 'cat'"),
        ("w.json", '{"cat": NaN}', "has the weight nan of 'cat'"),
        ("w.toml", "cat = 0", "has the weight 0 of 'cat'"),
        ("w.toml", "cat", "cannot read"),
        ("w.csv", "cat,1\ndog,much", "has the weight 'much' of 'dog'"),
        ("w.csv", "cat,1,2", "a line has 3 columns, not 2"),
        ("w.csv", "cat,-1", "has the weight -1.0 of 'cat'"),
        ("w.csv", "cat,inf", "has the weight inf of 'cat'"),
    ],
)
def test_what_are_no_class_weights(name: str, content: str, problem: str) -> None:
    Path(name).write_text(content)
    with pytest.raises(UsageError) as caught:
        parse_class_weights(name)
    assert f"--class-weights {name}" in str(caught.value)
    assert problem in str(caught.value)


def test_class_weights_without_a_file() -> None:
    with pytest.raises(UsageError, match="--class-weights fair is no file: give auto, or a JSON, TOML or CSV file"):
        parse_class_weights("fair")


def test_class_names_in_the_option() -> None:
    assert parse_classes("cat, dog ,a fox") == ["cat", "dog", "a fox"]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("cat\ndog\n", ["cat", "dog"]),
        ("\ufeffcat\r\n\r\n dog, wild \r\n", ["cat", "dog, wild"]),
        ('["cat", "dog"]', ["cat", "dog"]),
        ('{"dog": 1, "cat": 0}', ["cat", "dog"]),
        ('{"1": "dog", "0": "cat"}', ["cat", "dog"]),
        ('{"10": "k", "9": "j", ' + ", ".join(f'"{i}": "{i}"' for i in range(9)) + "}", [*"012345678", "j", "k"]),
    ],
)
def test_class_names_in_a_file(content: str, names: list[str]) -> None:
    Path("classes.txt").write_text(content, encoding="utf-8")
    assert parse_classes("classes.txt") == names


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1), min_size=2, unique=True))
def test_json_of_class_names(names: list[str]) -> None:
    path = Path("names.json")
    for document in (names, {name: label for label, name in enumerate(names)}):
        path.write_text(json.dumps(document))
        assert parse_classes(str(path)) == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\n", "has only 1 name: give at least two names"),
        ("", "has only 0 name"),
        ('["cat", ""]', "has an empty name"),
        ('["cat", 3]', "is no JSON list of names and no class_to_idx: write one class name per line"),
        ('{"cat": 0, "dog": 2}', "is no JSON list of names"),
        ('{"cat": true, "dog": false}', "is no JSON list of names"),
        ('{"cat": [1], "dog": "x"}', "is no JSON list of names"),
        ("[1, 2", "is no JSON list of names"),
        ("[" * 100_000, "is no JSON list of names"),
    ],
)
def test_files_without_class_names(content: str, message: str) -> None:
    Path("classes.txt").write_text(content)
    with pytest.raises(UsageError, match=message):
        parse_classes("classes.txt")


def test_what_is_neither_names_nor_a_file() -> None:
    with pytest.raises(UsageError, match=r"--classes cats.txt is no file: give a file, or names separated by commas"):
        parse_classes("cats.txt")
    with pytest.raises(UsageError, match="has an empty name"):
        parse_classes("cat,,dog")
    Path("bytes.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UsageError, match=r"cannot read --classes bytes.txt"):
        parse_classes("bytes.txt")
    assert len(parse_classes(",".join("abc" for _ in range(5000)))) == 5000  # longer than any path


@pytest.mark.parametrize(("text", "numbers"), [("0.5", [0.5]), ("1,2,3", [1, 2, 3]), (" .1, 2e-1 ,0 ", [0.1, 0.2, 0])])
def test_numbers(text: str, numbers: list[float]) -> None:
    assert parse_numbers("--mean", text) == numbers


@pytest.mark.parametrize("text", ["", "a", "1,2", "1,2,3,4", "nan", "inf,0,0", "1;2;3"])
def test_what_are_no_numbers(text: str) -> None:
    with pytest.raises(UsageError, match="is not one number or three: separate them by commas"):
        parse_numbers("--mean", text)


@pytest.mark.parametrize(
    ("name", "size", "fields"),
    [
        (
            "imagenet",
            None,
            {
                "height": 224,
                "width": 224,
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "resize": "shorter_side",
                "resize_to": 256,
            },
        ),
        ("cifarx", (28, 30), {"height": 28, "width": 30}),
        ("input.toml", None, {"height": 3, "width": 4, "mean": [0.5]}),
        ("input.toml", (5, 6), {"height": 5, "width": 6, "mean": [0.5]}),
    ],
)
def test_preprocessing(name: str, size: Any, fields: dict[str, Any]) -> None:
    Path("input.toml").write_text("height = 3\nwidth = 4\nmean = [0.5]\n")
    assert parse_preprocessing(name, size) == fields


def test_unknown_preprocessing() -> None:
    with pytest.raises(UsageError, match="--preprocessing imagnet is no file: give imagenet, cifarx, or a TOML"):
        parse_preprocessing("imagnet", None)
