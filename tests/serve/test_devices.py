import re

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


def test_cuda_alone_is_the_first() -> None:
    assert parse_device("cuda") == parse_device("cuda:0") == Device("cuda", 0)


@given(st.integers(0, 999))
def test_cuda_by_number(number: int) -> None:
    device = parse_device(f"cuda:{number}")
    assert device == Device("cuda", number)
    assert parse_device(str(device)) == device


@given(st.text() | st.from_regex(r"(auto|cpu|cuda|mps)(:\w*)?\s?"))
@example("cuda:\N{ARABIC-INDIC DIGIT THREE}")
@example("cuda:-1")
@example("cuda:1000")
@example("cuda:1\n")
@example("cpu:0")
@example("CUDA")
@example("gpu")
@example("")
def test_everything_else_is_refused(name: str) -> None:
    if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name):
        parse_device(name)
    else:
        with pytest.raises(UsageError) as raised:
            parse_device(name)
        assert repr(name) in raised.value.problem
        assert "cuda:N" in raised.value.remedy
