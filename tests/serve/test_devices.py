import re
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cifarx_serve.devices import Device, parse_device
from cifarx_serve.errors import UsageError


@pytest.mark.parametrize("name", ["auto", "cpu", "mps", "gpu", "npu"])
def test_devices_without_an_index(name: str) -> None:
    device = parse_device(name)
    assert device.type == name
    assert str(device) == name


@pytest.mark.parametrize("type_", ["cuda", "tensorrt"])
def test_the_default_index_is_zero(type_: Literal["cuda", "tensorrt"]) -> None:
    assert parse_device(type_) == parse_device(f"{type_}:0") == Device(type_, 0)


@given(st.sampled_from(["cuda", "tensorrt"]), st.integers(0, 999))
def test_devices_with_an_index(type_: Literal["cuda", "tensorrt"], index: int) -> None:
    device = parse_device(f"{type_}:{index}")
    assert device == Device(type_, index)
    assert parse_device(str(device)) == device


@given(st.text() | st.from_regex(r"(auto|cpu|cuda|tensorrt|mps|gpu|npu)(:\w*)?\s?"))
@example("cuda:\N{ARABIC-INDIC DIGIT THREE}")
@example("cuda:-1")
@example("cuda:1000")
@example("cuda:1\n")
@example("cpu:0")
@example("CUDA")
@example("gpu:0")
@example("")
def test_all_other_names_are_refused(name: str) -> None:
    if re.fullmatch(r"auto|cpu|mps|gpu|npu|(cuda|tensorrt)(:[0-9]{1,3})?", name):
        parse_device(name)
    else:
        with pytest.raises(UsageError) as raised:
            parse_device(name)
        assert repr(name) in raised.value.problem
        assert "cuda:N" in raised.value.remedy
        assert "tensorrt:N" in raised.value.remedy
