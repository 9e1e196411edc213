"""The page about the spec against the schema."""

import re
from typing import get_args

import pytest

from cifarx_serve.spec import (
    Activation,
    Assumption,
    Color,
    CropOffset,
    InputSpec,
    Interpolation,
    Layout,
    ModelSource,
    ModelSpec,
    Precision,
    ResizeMode,
)
from tests.support.documentation import ROOT, find_pages

[PAGE] = find_pages("docs/spec.md")
TEXT = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")


def test_the_example_is_a_spec() -> None:
    [block] = PAGE.blocks_in("json")
    spec = ModelSpec.from_json(block.text, "the page")
    assert spec.multi_label
    assert spec.input.shape == (1, 224, 224)


@pytest.mark.parametrize("struct", [ModelSpec, InputSpec, ModelSource])
def test_every_field_is_described(struct: type[ModelSpec | InputSpec | ModelSource]) -> None:
    words = set(re.findall(r"`(\w+)`", TEXT)) | {"schema_version"}
    assert [name for name in struct.__struct_fields__ if name not in words] == []


@pytest.mark.parametrize(
    "values", [Color, Layout, ResizeMode, CropOffset, Interpolation, Activation, Assumption, Precision]
)
def test_every_value_is_described(values: object) -> None:
    assert [value for value in get_args(values) if f"`{value}`" not in TEXT] == []
