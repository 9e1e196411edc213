import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.system.terminal import encodable, printable, printable_json

HOSTILE = {
    "title of the window": ("\x1b]0;OWNED\x07", "�]0;OWNED�"),
    "colors": ("\x1b[31mred\x1b[2J", "�[31mred�[2J"),
    "8-bit control sequence": ("\x9b31m", "�31m"),
    "lines": ("cat\nerror: fake\r\n", "cat�error: fake��"),
    "unicode lines": ("a\u2028b\u2029c\x85d", "a�b�c�d"),
    "right to left override": ("\u202egnp.exe", "�gnp.exe"),
    "isolates": ("\u2066\u2069\u061c\u200e", "����"),
    "null and delete": ("a\0b\x7fc", "a�b�c"),
    "not UTF-8": (b"caf\xe9.png".decode("utf-8", "surrogateescape"), "caf�.png"),
}
HARMLESS = ["", "dog", "a b", "Größe", "猫", "नमस्ते", "क्\u200cष", "👩\u200d🚀", "50 %", "\u00a0"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_characters_that_are_not_safe_are_replaced(kind: str) -> None:
    text, expected = HOSTILE[kind]
    assert printable(text) == expected


@pytest.mark.parametrize("text", HARMLESS)
def test_text_of_any_language_stays_the_same(text: str) -> None:
    assert printable(text) == encodable(text) == text


@given(st.text(st.characters()))
def test_printable_text_is_one_line_that_can_be_encoded(text: str) -> None:
    safe = printable(text)
    assert len(safe) == len(text)
    assert len(safe.splitlines()) <= 1
    assert "\x1b" not in safe
    safe.encode()
    encodable(text).encode()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_keeps_its_values_and_has_no_unsafe_characters(text: str) -> None:
    document = printable_json(json.dumps({text: [text]}, ensure_ascii=False))
    assert json.loads(document) == {text: [text]}
    assert printable(document) == document
