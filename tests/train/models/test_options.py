from typing import Any

import msgspec
import pytest

from cifarx_serve.errors import SpecError
from cifarx_serve.spec import InputSpec, ModelSource, ModelSpec
from cifarx_train.models.options import ModelOptions, SpecOverrides

SPEC = ModelSpec(
    model="net",
    class_names=("cat", "dog"),
    input=InputSpec(
        height=224, width=224, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resize="shorter_side", resize_to=256
    ),
    source=ModelSource(kind="python", name="model.py:Net", arguments={"width": 8}),
    assumed=("architecture", "class_names", "preprocessing", "output"),
)


def applied(whole: bool = False, /, **fields: Any) -> ModelSpec:
    return SpecOverrides(fields, whole).apply(SPEC)


def test_without_fields_nothing_changes() -> None:
    assert SpecOverrides().apply(SPEC) is SPEC
    assert SpecOverrides().apply_to_input(SPEC.input) == SPEC.input


def test_fields_replace_those_of_the_spec() -> None:
    found = applied(class_names=["a", "b"], activation="sigmoid", outputs=1)
    assert (found.class_names, found.activation, found.outputs) == (("a", "b"), "sigmoid", 1)
    assert found.input == SPEC.input


@pytest.mark.parametrize(
    ("fields", "assumed"),
    [
        ({"class_names": ["a", "b"]}, {"architecture", "preprocessing", "output"}),
        ({"activation": "softmax"}, {"architecture", "class_names", "preprocessing"}),
        ({"output": "probabilities"}, {"architecture", "class_names", "preprocessing"}),
        ({"input": {"height": 32, "width": 32}}, {"architecture", "class_names", "preprocessing", "output"}),
        ({"input": {"mean": [0.5], "std": [0.5]}}, {"architecture", "class_names", "preprocessing", "output"}),
        (
            {"input": {"height": 32, "width": 32, "mean": [0.5], "std": [0.5]}},
            {"architecture", "class_names", "output"},
        ),
    ],
)
def test_what_is_stated_is_no_longer_assumed(fields: dict[str, Any], assumed: set[str]) -> None:
    assert set(applied(**fields).assumed) == assumed


def test_a_whole_input_resets_the_other_fields() -> None:
    found = applied(True, input={"height": 32, "width": 48})
    assert found.input == InputSpec(height=32, width=48)
    assert "preprocessing" not in found.assumed
    assert SpecOverrides({"input": {"height": 8, "width": 8}}, True).apply_to_input(SPEC.input) == InputSpec(
        height=8, width=8
    )


def test_one_mean_is_for_all_channels() -> None:
    assert applied(input={"mean": [0.5], "std": [0.25]}).input.mean == (0.5, 0.5, 0.5)
    assert applied(input={"mean": [0.5], "std": [0.25], "color": "L"}).input.std == (0.25,)


def test_a_color_decides_the_number_of_channels() -> None:
    gray = applied(input={"color": "L"}).input
    assert (gray.channels, gray.mean, gray.std) == (1, (0.0,), (1.0,))
    assert applied(input={"color": "BGR"}).input.mean == SPEC.input.mean


@pytest.mark.parametrize(
    ("given", "resize_to"),
    [
        ({"height": 112, "width": 112}, 128),
        ({"height": 224, "width": 448}, 256),
        ({"height": 112, "width": 112, "resize_to": 120}, 120),
        ({"height": 112, "width": 112, "resize": "stretch", "resize_to": None}, None),
    ],
)
def test_another_size_of_the_crop_scales_the_size_before_it(given: dict[str, Any], resize_to: int | None) -> None:
    assert applied(input=given).input.resize_to == resize_to


def test_a_stretched_size_is_scaled_in_both_directions() -> None:
    stretched = InputSpec(height=100, width=50, resize_to=(120, 60))
    overrides = SpecOverrides({"input": {"height": 200, "width": 200}})
    assert overrides.apply_to_input(stretched).resize_to == (240, 240)


def test_only_the_output_of_the_source_is_replaced() -> None:
    found = applied(source={"output": "logits"})
    assert found.source == ModelSource(kind="python", name="model.py:Net", arguments={"width": 8}, output="logits")
    assert SpecOverrides({"source": {"output": 1}}).output == 1
    assert SpecOverrides({"source": {"output": None}}).output is None
    assert SpecOverrides().output is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_names": ["one"]}, "length >= 2"),
        ({"activation": "relu"}, "Invalid enum value 'relu'"),
        ({"input": {"mean": [0.5, 0.5]}}, "mean has 2 values for 3 channels"),
        ({"input": {"std": [0.0]}}, "> 0.0"),
        ({"input": {"height": 0}}, ">= 1"),
        ({"outputs": 1}, "outputs is 1, which needs activation sigmoid"),
    ],
)
def test_invalid_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        applied(**fields)
    if "input" in fields:
        with pytest.raises(SpecError, match=message):
            SpecOverrides(fields).apply_to_input(SPEC.input)


def test_options_reach_another_process() -> None:
    overrides = SpecOverrides({"class_names": ["a", "b"], "input": {"height": 8}}, True, {"class_names": "--classes"})
    options = ModelOptions("model.py:Net", {"width": [1, 2]}, "ema", overrides)
    for each in (options, ModelOptions()):
        sent = msgspec.json.decode(msgspec.json.encode(each.to_document()))
        assert ModelOptions.from_document(sent) == each
