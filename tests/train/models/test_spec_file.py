import json
from pathlib import Path
from typing import Any

import pytest

from cifarx.output.spec_template import spec_template
from cifarx_serve.errors import SpecError, UsageError
from cifarx_serve.spec import InputSpec, ModelSource, ModelSpec
from cifarx_train.models.options import ModelOptions
from cifarx_train.models.spec_file import read_document, read_input_file, read_spec_file

SPEC = ModelSpec(
    model="net",
    class_names=('the "cat"', "Häuser, Straßen", "\N{SNOWMAN}"),
    input=InputSpec(height=28, width=30, channels=1, color="L", mean=(0.13,), std=(0.31,), interpolation="lanczos"),
    activation="sigmoid",
    thresholds=(0.1, 0.5, 1e-7),
    temperature=1.25,
    source=ModelSource(kind="python", name="model.py:Net", output="logits"),
)


def write(text: str, name: str = "spec.toml") -> Path:
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def error_of(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        read_spec_file(write(text))
    return str(caught.value)


def test_a_part_of_a_spec_in_toml() -> None:
    found = read_spec_file(write('class_names = ["a", "b"]\n[input]\nmean = [0.5]\n'))
    assert found.fields == {"class_names": ["a", "b"], "input": {"mean": [0.5]}}
    assert not found.whole_input
    assert found.origins == {"class_names": "--spec spec.toml", "input": "--spec spec.toml"}


def test_an_input_with_a_size_is_whole() -> None:
    assert read_spec_file(write("[input]\nheight = 32\nwidth = 32\n")).whole_input


def test_the_name_of_the_file_does_not_matter() -> None:
    assert read_spec_file(write('{"output": "logits"}', "spec.txt")).fields == {"output": "logits"}
    assert read_spec_file(write('output = "logits"', "spec.json")).fields == {"output": "logits"}


@pytest.mark.parametrize(
    "spec", [SPEC, ModelSpec(model="x", class_names=("a", "b"), input=InputSpec(height=1, width=2))]
)
def test_json_of_a_spec_and_its_template_are_read_back(spec: ModelSpec) -> None:
    other = ModelSpec(
        model="net",
        class_names=("x",) * len(spec.class_names),
        input=InputSpec(height=9, width=9, mean=(1.0, 1.0, 1.0), resize="letterbox", fill=3),
        source=spec.source and ModelSource(kind="python", name="model.py:Net"),
    )
    for text in (spec.to_json(), spec_template(spec, "net.onnx")):
        found = read_spec_file(write(text)).apply(other)
        assert found.class_names == spec.class_names
        assert found.input == spec.input
        assert (found.output, found.activation, found.thresholds) == (spec.output, spec.activation, spec.thresholds)
        assert found.temperature == spec.temperature
        assert found.source == spec.source


@pytest.mark.parametrize(
    ("document", "model", "arguments"),
    [
        ('model = "squeezenet1_1"', "squeezenet1_1", {}),
        ('[source]\nkind = "torchvision"\nname = "resnet18"', "resnet18", {}),
        ('[source]\nkind = "timm"\nname = "vit"\narguments = { img_size = 64 }', "timm/vit", {"img_size": 64}),
        ('[source]\nkind = "checkpoint"\nname = "x.pth"', None, {}),
        ('[source]\noutput = "logits"', None, {}),
    ],
)
def test_a_spec_names_the_network(document: str, model: str | None, arguments: dict[str, Any]) -> None:
    options = ModelOptions(overrides=read_spec_file(write(document)))
    found = options.with_network()
    assert (found.model, dict(found.arguments)) == (model, arguments)
    assert found.missing_code_error() is None
    assert found.origins.get("model") == (None if model is None else "--spec spec.toml")
    stated = options._replace(model="lzh").with_network()
    assert (stated.model, stated.origins["model"]) == ("lzh", "--model")


def test_a_spec_never_names_code_to_run() -> None:
    options = ModelOptions(overrides=read_spec_file(write('[source]\nkind = "python"\nname = "my net.py:Net"')))
    assert options.with_network().model is None
    assert str(options.missing_code_error()) == (
        "--spec spec.toml names the code my net.py:Net, and a file never decides which code runs: state it with "
        "--model 'my net.py:Net'"
    )
    assert options._replace(model="net.py:Net").missing_code_error() is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class_names = 5", "class_names (Expected `array`, got `int`)"),
        ('class_names = "cat,dog"', "class_names (Expected `array`, got `str`)"),
        ('class_names = ["cat", 2]', "class_names (Expected `str`, got `int` - at `$[1]`)"),
        ("thresholds = 0.5", "thresholds (Expected `array | null`, got `float`)"),
        ('[input]\nchannels = "3"\nmean = [0.5]', "channels (Expected `int`, got `str`)"),
        ('[input]\nheight = "big"', "height (Expected `int`, got `str`)"),
        ("[input]\nheight = 0", "height (Expected `int` >= 1)"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(text: str, words: str) -> None:
    for read in (read_spec_file, read_input_file):
        with pytest.raises(SpecError) as caught:
            read(write(text if read is read_spec_file or "input" in text else f"{text}\n[input]\n"))
        assert str(caught.value) == f"spec.toml has an invalid {words}: correct that field"


def test_a_spec_without_an_input_states_no_input() -> None:
    assert read_input_file(write('{"output": "logits", "input": null}')) == {}


def test_schema_1() -> None:
    document: dict[str, Any] = {
        "schema_version": 1,
        "model": "mnist",
        "class_names": ["a", "b"],
        "input": {"height": 28, "width": 28, "channels": 1, "colour": "L", "resize": "bicubic"},
        "checkpoint_sha256": "0" * 64,
    }
    found = read_spec_file(write(json.dumps(document)))
    assert found.fields["input"] == {
        "height": 28,
        "width": 28,
        "channels": 1,
        "color": "L",
        "interpolation": "bicubic",
    }
    assert found.fields.keys() == {"class_names", "input"}


def test_errors_name_the_field() -> None:
    assert error_of("class_nams = []").startswith(
        "unknown field in spec.toml 'class_nams': did you mean 'class_names'?"
    )
    assert "'heigth': did you mean 'height'?" in error_of("[input]\nheigth = 3")
    assert "'outputs': did you mean 'output'?" in error_of("[source]\noutputs = 3")
    assert error_of("input = 3") == "spec.toml has 3 instead of a table: write a table of fields"
    assert error_of("schema_version = 99").startswith("spec.toml has spec schema 99, but this cifarx reads only up to")
    assert error_of("a = = 1").startswith("spec.toml is neither JSON nor TOML (Invalid value")
    assert error_of("{1}").startswith("spec.toml is neither JSON nor TOML (Expecting property name")
    assert error_of("[1, 2]").startswith("spec.toml is neither JSON nor TOML")
    assert error_of('{"a":' * 100_000).startswith("spec.toml is neither JSON nor TOML")


def test_unreadable_files() -> None:
    with pytest.raises(UsageError, match=r"cannot read missing.toml \(No such file"):
        read_document(Path("missing.toml"))
    Path("bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"cannot read bytes.toml"):
        read_document(Path("bytes.toml"))


def test_the_input_alone() -> None:
    assert read_input_file(write("height = 3\nwidth = 4")) == {"height": 3, "width": 4}
    assert read_input_file(write("[input]\nheight = 3\nwidth = 4")) == {"height": 3, "width": 4}
    with pytest.raises(UsageError, match=r"unknown field in spec.toml 'size'"):
        read_input_file(write("size = 3"))
