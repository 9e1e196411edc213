import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_train.models.arguments import parse_arguments, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("True", True),
        ("null", None),
        ("None", None),
        ("small", "small"),
        ('"64"', "64"),
        ("'64'", "64"),
        ("[3, 4, 6, 3]", [3, 4, 6, 3]),
        ("(3, 4)", [3, 4]),
        ("3,4", [3, 4]),
        ('{"width": 8}', {"width": 8}),
        ("{'width': (8, 9)}", {"width": [8, 9]}),
        ("", ""),
        ("224x224", "224x224"),
        ("1 + 1", "1 + 1"),
        ("nan", "nan"),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        ("b'bytes'", "b'bytes'"),
        ("{1: 2}", "{1: 2}"),
        ("__import__('os').system('exit 3')", "__import__('os').system('exit 3')"),
        ("(" * 5000, "(" * 5000),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_literals_are_parsed_and_other_text_is_text(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_json_is_read_back(value: Any) -> None:
    assert parse_value(json.dumps(value)) == value


@given(st.text())
def test_any_text_gives_a_value_that_json_can_express(text: str) -> None:
    json.dumps(parse_value(text), allow_nan=False)


def test_arguments_by_name() -> None:
    assert parse_arguments(["width=64", "name=a=b"]) == {"width": 64, "name": "a=b"}


@pytest.mark.parametrize("text", ["width", "=64", "1x=2", "a-b=2", ""])
def test_what_is_no_argument_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not KEY=VALUE: write it like --model-arg width=64"):
        parse_arguments([text])


def test_an_argument_is_given_once() -> None:
    with pytest.raises(UsageError, match="--model-arg width was given twice"):
        parse_arguments(["width=1", "width=2"])
