import inspect
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
import typer

from cifarx.model_flags import (
    NO_INPUT_FLAGS,
    NO_MODEL_FLAGS,
    InputFlags,
    ModelFlags,
    is_checkpoint,
    model_options,
    read_stated_spec,
    spec_overrides,
    stated_options,
    takes_flags,
)
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec, ModelSpec
from tests.support.trained_model import Trained

SPEC = ModelSpec(model="net", class_names=("a", "b"), input=InputSpec(height=32, width=32))


def stated(**values: Any) -> ModelSpec:
    return spec_overrides(ModelFlags(**values)).apply(SPEC)


# --- options of a command


@takes_flags(InputFlags)
def example(
    file: Annotated[str, typer.Argument()], flags: InputFlags = NO_INPUT_FLAGS, device: str = "auto"
) -> tuple[str, InputFlags, str]:
    """Do something."""
    return file, flags, device


def test_a_command_gets_the_options_as_one_argument() -> None:
    names = list(inspect.signature(example).parameters)
    assert names == ["file", *InputFlags.__struct_fields__, "device"]
    assert example.__doc__ == "Do something."
    app = typer.Typer()
    app.command()(example)
    run = typer.main.get_command(app)
    assert run.main(["x", "--image-size", "3", "--model-arg", "a=1", "--model-arg", "b=2"], standalone_mode=False) == (
        "x",
        InputFlags(image_size="3", model_arg=["a=1", "b=2"]),
        "auto",
    )
    assert run.main(["x", "--device", "cpu"], standalone_mode=False) == ("x", NO_INPUT_FLAGS, "cpu")


def test_whether_any_option_was_given() -> None:
    assert not ModelFlags().are_given
    assert ModelFlags(color="L").are_given


# --- what they state


def test_no_options_state_nothing() -> None:
    assert spec_overrides(NO_MODEL_FLAGS).apply(SPEC) is SPEC
    assert model_options(None, NO_MODEL_FLAGS) == model_options(None, NO_INPUT_FLAGS)


def test_each_option_states_its_fields() -> None:
    found = stated(
        classes="cat,dog", image_size="8x9", mean="0.5", std="0.1,0.2,0.3", color="BGR", activation="sigmoid"
    )
    assert found == ModelSpec(
        model="net",
        class_names=("cat", "dog"),
        activation="sigmoid",
        input=InputSpec(height=8, width=9, mean=(0.5,) * 3, std=(0.1, 0.2, 0.3), color="BGR"),
    )


def test_the_more_specific_option_wins() -> None:
    Path("spec.toml").write_text(
        'class_names = ["x", "y"]\nactivation = "sigmoid"\n[input]\nheight = 5\nwidth = 5\nmean = [0.1, 0.1, 0.1]\n'
    )
    found = stated(spec=Path("spec.toml"), classes="cat,dog", std="2")
    assert found.class_names == ("cat", "dog")
    assert found.activation == "sigmoid"
    assert found.input == InputSpec(height=5, width=5, mean=(0.1,) * 3, std=(2.0,) * 3)
    preset = stated(spec=Path("spec.toml"), preprocessing="cifarx", image_size="7")
    assert preset.input == InputSpec(height=7, width=7)
    assert stated(preprocessing="imagenet", image_size="112", mean="0").input == InputSpec(
        height=112, width=112, std=(0.229, 0.224, 0.225), resize="shorter_side", resize_to=128
    )


def test_grayscale() -> None:
    assert stated(preprocessing="cifarx", color="L").input == InputSpec(height=32, width=32, channels=1, color="L")


def test_the_origin_of_each_field() -> None:
    Path("spec.toml").write_text('output = "logits"\n[input]\nfill = 3\n')
    overrides = spec_overrides(ModelFlags(spec=Path("spec.toml"), mean="0", color="BGR", classes="a,b"))
    assert overrides.origins == {
        "output": "--spec spec.toml",
        "input": "--spec spec.toml, --mean, --color",
        "class_names": "--classes",
    }


def test_options_of_the_network() -> None:
    flags = ModelFlags(model_arg=["width=8"], weights_key="ema")
    found = model_options("model.py:Net", flags)
    assert (found.model, found.arguments, found.weights_key) == ("model.py:Net", {"width": 8}, "ema")
    with pytest.raises(UsageError, match="--model-arg was given without --model: name the network"):
        model_options(None, flags)


# --- files


def test_only_checkpoints_are_described(trained: Trained) -> None:
    assert is_checkpoint(str(trained.checkpoint))
    assert not is_checkpoint(str(trained.onnx))
    flags = ModelFlags(classes=",".join("abcdefghij"))
    assert stated_options([str(trained.onnx)], None, NO_MODEL_FLAGS) is None
    with pytest.raises(UsageError, match=r"lzh_0.onnx contains its own spec: give what describes a model only with a"):
        stated_options([str(trained.onnx)], None, flags)
    with pytest.raises(UsageError, match="contain their own spec"):
        stated_options([str(trained.onnx), str(trained.torchscript)], "lzh", NO_MODEL_FLAGS)
    options = stated_options([str(trained.onnx), str(trained.checkpoint)], None, flags)
    assert read_stated_spec(str(trained.checkpoint), options).class_names == tuple("abcdefghij")
    assert read_stated_spec(str(trained.onnx), options).class_names[0] == "airplane"
    plain = read_stated_spec(str(trained.checkpoint), None)
    assert msgspec.structs.replace(plain, class_names=tuple("abcdefghij")) == read_stated_spec(
        str(trained.checkpoint), options
    )
