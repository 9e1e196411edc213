import re
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cifarx_serve.devices import Device, parse_device
from cifarx_serve.errors import UsageError


@pytest.mark.parametrize("name", ["auto", "cpu", "mps"])
def test_names(name: str) -> None:
    device = parse_device(name)
    assert device.kind == name
    assert str(device) == name


@pytest.mark.parametrize("kind", ["cuda", "tensorrt"])
def test_one_without_a_number_is_the_first(kind: Literal["cuda", "tensorrt"]) -> None:
    assert parse_device(kind) == parse_device(f"{kind}:0") == Device(kind, 0)


@given(st.sampled_from(["cuda", "tensorrt"]), st.integers(0, 999))
def test_by_number(kind: Literal["cuda", "tensorrt"], number: int) -> None:
    device = parse_device(f"{kind}:{number}")
    assert device == Device(kind, number)
    assert parse_device(str(device)) == device


@given(st.text() | st.from_regex(r"(auto|cpu|cuda|tensorrt|mps)(:\w*)?\s?"))
@example("cuda:\N{ARABIC-INDIC DIGIT THREE}")
@example("cuda:-1")
@example("cuda:1000")
@example("cuda:1\n")
@example("cpu:0")
@example("CUDA")
@example("gpu")
@example("")
def test_everything_else_is_refused(name: str) -> None:
    if re.fullmatch(r"auto|cpu|mps|(cuda|tensorrt)(:[0-9]{1,3})?", name):
        parse_device(name)
    else:
        with pytest.raises(UsageError) as raised:
            parse_device(name)
        assert repr(name) in raised.value.problem
        assert "cuda:N" in raised.value.remedy
        assert "tensorrt:N" in raised.value.remedy
