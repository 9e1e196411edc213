import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cifarx_serve.errors import SpecError
from cifarx_serve.spec import (
    SCHEMA_VERSION,
    DataRecord,
    InputSpec,
    ModelSource,
    ModelSpec,
    ParitySummary,
    TrainingRecord,
)
from tests.support.color_model import SPEC

SHA256 = "0123456789abcdef" * 4

positive = st.integers(1, 2**40)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive_floats = st.floats(min_value=2.0**-100, allow_infinity=False)
fractions = st.floats(0, 1)
words = st.dictionaries(st.text(), st.text(), max_size=3)
sha256 = st.text("0123456789abcdef", min_size=64, max_size=64)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
levels = st.integers(0, 255)


def per_channel(values: st.SearchStrategy[Any], channels: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(*[values] * channels)


@st.composite
def inputs(draw: st.DrawFn) -> InputSpec:
    """Draw any input that fits together."""
    color: Any = draw(st.sampled_from(["RGB", "BGR", "L"]))
    channels: Any = 1 if color == "L" else 3
    height = draw(positive)
    resize: Any = draw(st.sampled_from(["stretch", "shorter_side", "letterbox"]))
    resize_to: Any = None
    if resize == "stretch":
        resize_to = draw(st.none() | st.tuples(positive, positive))
    elif resize == "shorter_side":
        resize_to = draw(positive)
    interpolation: Any = draw(st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]))
    return InputSpec(
        height=height,
        width=draw(positive),
        channels=channels,
        layout=draw(st.sampled_from(["NCHW", "NHWC"])),
        color=color,
        value_range=draw(st.tuples(finite, finite)),
        mean=draw(st.just(()) | per_channel(finite, channels)),
        std=draw(st.just(()) | per_channel(positive_floats, channels)),
        resize=resize,
        resize_to=resize_to,
        crop_offset=draw(st.sampled_from(["round", "floor"])),
        interpolation=interpolation,
        antialias=interpolation == "lanczos" or draw(st.booleans()),
        fill=draw(levels | per_channel(levels, channels)),
    )


data_records = st.builds(
    DataRecord,
    name=st.text(),
    kind=st.sampled_from(["builtin", "cifar10", "folder"]),
    train_images=positive,
    test_images=positive,
    train_fingerprint=sha256,
    test_fingerprint=sha256,
)
training_records = st.builds(
    TrainingRecord,
    data=data_records,
    recipe=st.dictionaries(st.text(), plain, max_size=3),
    epochs=positive,
    seed=st.integers(-(2**63), 2**63 - 1),
    test_accuracy=fractions,
    test_loss=st.none() | finite,
    device=st.text(),
    versions=words,
    val_accuracy=st.none() | fractions,
    val_loss=st.none() | finite,
)
parities = st.builds(
    ParitySummary,
    **{name: st.none() | finite for name in ParitySummary.__struct_fields__ if "error" in name or "accuracy" in name},
    required_tolerance=st.none() | finite,
    images=positive,
    batch_sizes=st.lists(positive, max_size=4).map(tuple),
    agreement=fractions,
    atol=finite,
    rtol=finite,
    forgiven=positive,
    nonfinite=positive,
)
sources = st.builds(
    ModelSource,
    kind=st.sampled_from(["builtin", "torchvision", "timm", "huggingface", "entry_point", "python", "onnx"]),
    arguments=st.dictionaries(st.text(), plain, max_size=3),
    sha256=st.none() | sha256,
    output=st.none() | st.text() | st.integers(0, 9),
)
assumptions: st.SearchStrategy[list[Any]] = st.lists(
    st.sampled_from(["architecture", "class_names", "preprocessing", "output"]), unique=True
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Draw any spec that fits together."""
    class_names = tuple(draw(st.lists(st.text(), min_size=2, max_size=5)))
    activation: Any = draw(st.sampled_from(["softmax", "sigmoid"]))
    is_sigmoid = activation == "sigmoid"
    outputs: Any = draw(st.sampled_from([None, 1])) if is_sigmoid and len(class_names) == 2 else None
    output_size = outputs or len(class_names)
    output: Any = draw(st.sampled_from(["logits", "probabilities"]))
    return ModelSpec(
        model=draw(st.text()),
        class_names=class_names,
        input=draw(inputs()),
        output=output,
        activation=activation,
        outputs=outputs,
        thresholds=draw(st.none() | st.tuples(*[fractions] * output_size)) if is_sigmoid else None,
        temperature=draw(st.none() | st.floats(0.01, 100)) if output == "logits" else None,
        source=draw(st.none() | sources),
        assumed=tuple(draw(assumptions)),
        precision=draw(st.sampled_from(["fp32", "bf16", "fp16", "int8"])),
        embedded_preprocessing=draw(st.booleans()),
        training=draw(st.none() | training_records),
        checkpoint_sha256=draw(st.none() | sha256),
        exporter=draw(st.none() | words),
        parity=draw(st.none() | parities),
    )


FULL = ModelSpec(
    model="lzh",
    class_names=("cat", "dog"),
    input=InputSpec(height=32, width=32),
    training=TrainingRecord(
        data=DataRecord(
            name="drawings", kind="builtin", train_images=5, test_images=1, train_fingerprint=SHA256,
            test_fingerprint=SHA256,
        ),
        recipe={"learning_rate": 0.01}, epochs=10, seed=0, test_accuracy=0.5, test_loss=1.5, device="cpu",
        versions={"torch": "2.15.0"},
    ),
    checkpoint_sha256=SHA256,
)  # fmt: skip


def document(*path: str | int, value: Any) -> str:
    """Return the full document with one value replaced or added."""
    whole = json.loads(FULL.to_json())
    inner = whole
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(whole)


@given(specs())
def test_round_trip(spec: ModelSpec) -> None:
    text = spec.to_json()
    assert "\n" not in text
    assert ModelSpec.from_json(text, "x") == spec
    assert ModelSpec.from_json(text.encode(), "x") == spec
    assert ModelSpec.from_json(text, "x").to_json() == text


def test_is_json_that_starts_with_the_version() -> None:
    fields = json.loads(FULL.to_json())
    assert next(iter(fields)) == "schema_version"
    assert fields["schema_version"] == SCHEMA_VERSION
    assert fields["class_names"] == ["cat", "dog"]
    assert fields["input"]["layout"] == "NCHW"
    assert fields["input"]["color"] == "RGB"


@given(st.data())
def test_a_truncated_document_is_refused(data: st.DataObject) -> None:
    text = FULL.to_json()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(SpecError):
        ModelSpec.from_json(text[:cut], "x")


@given(st.lists(st.tuples(st.integers(0, len(FULL.to_json()) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_document_is_refused_or_still_a_spec(damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(FULL.to_json().encode())
    for place, byte in damage:
        damaged[place] = byte
    try:
        spec = ModelSpec.from_json(bytes(damaged), "x")
    except SpecError as error:
        assert "\n" not in str(error)
    else:
        assert ModelSpec.from_json(spec.to_json(), "x") == spec


@given(st.binary() | st.text(st.characters()) | plain.map(json.dumps))
@example('{"schema_version": 1, "model": "\ud800"}')
@example(b'{"schema_version": 1, "model": "\xff"}')
@example(b"\xff\xfe{\x00}\x00")
@example('{"schema_version": 1, "recipe": ' + "[" * 10_000)
@example('{"schema_version": 1e999}')
@example('{"schema_version": 1}')
@example("null")
@example("")
def test_other_content_is_refused_with_a_one_line_error(text: str | bytes) -> None:
    with pytest.raises(SpecError) as raised:
        ModelSpec.from_json(text, "lzh_9.onnx")
    assert raised.value.problem.startswith("lzh_9.onnx contains a malformed model spec")
    assert "cifarx export" in raised.value.remedy
    assert "\n" not in str(raised.value)


@given(version=st.integers(SCHEMA_VERSION + 1, 2**70), others=st.dictionaries(st.text(), plain, max_size=4))
def test_a_newer_schema_is_refused_whatever_its_fields_are(version: int, others: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as raised:
        ModelSpec.from_json(json.dumps({**others, "schema_version": version}), "lzh_9.onnx")
    assert (
        raised.value.problem
        == f"lzh_9.onnx has spec schema {version}, but this cifarx reads only up to {SCHEMA_VERSION}"
    )
    assert raised.value.remedy == "install a newer cifarx"


def schema_1(spec: ModelSpec) -> dict[str, Any]:
    """Return the document that version 0.2 wrote for a spec of its time."""
    fields = json.loads(spec.to_json())
    input_ = fields["input"]
    for name in ("resize", "resize_to", "crop_offset", "antialias", "fill"):
        del input_[name]
    input_["resize"], input_["colour"] = input_.pop("interpolation"), input_.pop("color")
    for name in ("activation", "outputs", "thresholds", "temperature", "source", "assumed"):
        del fields[name]
    return {**fields, "schema_version": 1}


def test_schema_1_is_read() -> None:
    document = (
        '{"schema_version":1,"model":"lzh","stem":"own","class_names":["cat","dog"],"input":{"height":32,"width":48,'
        '"channels":3,"layout":"NCHW","dtype":"float32","colour":"RGB","value_range":[0.0,1.0],"mean":[0.5,0.0,0.0],'
        '"std":[1.0,1.0,2.0],"resize":"lanczos"},"output":"logits","precision":"fp32","embedded_preprocessing":false,'
        '"minimum_onnxruntime":null,"training":null,"checkpoint_sha256":null,"weights_sha256":null,"exporter":null,'
        '"parity":null}'
    )
    spec = ModelSpec.from_json(document, "x")
    assert spec == ModelSpec(
        model="lzh",
        class_names=("cat", "dog"),
        input=InputSpec(height=32, width=48, mean=(0.5, 0, 0), std=(1, 1, 2), interpolation="lanczos"),
    )
    assert schema_1(spec) == json.loads(document)
    assert json.loads(spec.to_json())["schema_version"] == SCHEMA_VERSION


@given(specs())
def test_a_document_of_schema_1_has_the_preprocessing_and_output_of_its_time(spec: ModelSpec) -> None:
    kept = {name: getattr(spec.input, name) for name in ("height", "width", "value_range", "interpolation")}
    colors = InputSpec(**kept, mean=(spec.input.mean * 3)[:3], std=(spec.input.std * 3)[:3])
    of_its_time = msgspec.structs.replace(
        spec,
        input=colors,
        output="logits",
        activation="softmax",
        outputs=None,
        thresholds=None,
        temperature=None,
        source=None,
        assumed=(),
    )
    assert ModelSpec.from_json(json.dumps(schema_1(of_its_time)), "x") == of_its_time


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"input": None}, r"\$\.input"),
        ({"input": {"height": 4}}, "width"),
        ({"input": {"height": 4, "width": 4, "resize": "letterbox"}}, r"\$\.input\.interpolation"),
        ({"input": {"height": 4, "width": 4, "colour": "RGBA"}}, r"\$\.input\.color"),
        ({"input": {"height": 4, "width": 4, "mean": [0, 0]}}, r"mean has 2 values.*\$\.input"),
        ({"class_names": ["one"]}, r"\$\.class_names"),
        ({"model": 7}, r"\$\.model"),
    ],
)
def test_a_malformed_document_of_schema_1_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        ModelSpec.from_json(json.dumps({**schema_1(FULL), **fields}), "x")


@pytest.mark.parametrize("field", ["model", "class_names", "input"])
def test_a_missing_field_of_schema_1_is_refused_by_name(field: str) -> None:
    fields = schema_1(FULL)
    del fields[field]
    with pytest.raises(SpecError, match=field):
        ModelSpec.from_json(json.dumps(fields), "x")


@given(st.data())
def test_a_damaged_document_of_schema_1_is_refused_or_still_a_spec(data: st.DataObject) -> None:
    damaged = bytearray(json.dumps(schema_1(FULL)).encode())
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        spec = ModelSpec.from_json(bytes(damaged), "x")
    except SpecError as error:
        assert "\n" not in str(error)
    else:
        assert ModelSpec.from_json(spec.to_json(), "x") == spec


@pytest.mark.parametrize("version", [0, -1, True, None, "1", 1.5])
def test_an_invalid_version_is_refused(version: Any) -> None:
    with pytest.raises(SpecError, match="schema_version"):
        ModelSpec.from_json(document("schema_version", value=version), "x")


@pytest.mark.parametrize("path", [("more",), ("input", "more"), ("training", "data", "more")])
def test_unknown_fields_of_the_same_schema_are_ignored(path: tuple[str, ...]) -> None:
    assert ModelSpec.from_json(document(*path, value={"of": ["anything"]}), "x") == FULL


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("class_names",), ["only one"]),
        (("class_names",), "cat, dog"),
        (("class_names", 1), 7),
        (("input", "height"), 0),
        (("input", "width"), 32.5),
        (("input", "channels"), 4),
        (("input", "layout"), "CHWN"),
        (("input", "dtype"), "float16"),
        (("input", "color"), "RGBA"),
        (("input", "value_range"), [0, 1, 2]),
        (("input", "mean"), [0, "0", 0]),
        (("input", "resize"), "bilinear"),
        (("input", "resize_to"), 0),
        (("input", "crop_offset"), "center"),
        (("input", "antialias"), 1),
        (("input", "fill"), 256),
        (("input", "std"), [1, 1, 0]),
        (("input", "interpolation"), "box"),
        (("output",), "classes"),
        (("activation",), "relu"),
        (("outputs",), 2),
        (("thresholds",), [0.5, 1.5]),
        (("temperature",), 0),
        (("temperature",), 101),
        (("source",), {"kind": "pickle", "name": "x"}),
        (("assumed",), ["weights"]),
        (("precision",), "fp64"),
        (("training", "epochs"), -1),
        (("training", "test_accuracy"), 50),
        (("training", "data", "kind"), "mnist"),
        (("training", "data", "train_fingerprint"), SHA256.upper()),
        (("checkpoint_sha256",), SHA256[1:]),
        (("checkpoint_sha256",), SHA256 + "\n"),
        (("parity",), {"passed": True}),
    ],
)
def test_a_field_of_a_wrong_type_is_refused_by_name(path: tuple[str | int, ...], value: Any) -> None:
    assert ModelSpec.from_json(FULL.to_json(), "x") == FULL
    with pytest.raises(SpecError) as raised:
        ModelSpec.from_json(document(*path, value=value), "x")
    names = [step for step in path if isinstance(step, str)]
    assert "$." + ".".join(names) in raised.value.problem


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"channels": 1}, "channels is 1, which does not match color RGB"),
        ({"color": "L"}, "channels is 3, which does not match color L"),
        ({"mean": [0, 0]}, "mean has 2 values for 3 channels"),
        ({"std": [1]}, "std has 1 values for 3 channels"),
        ({"fill": [0, 0]}, "fill has 2 values for 3 channels"),
        ({"interpolation": "lanczos", "antialias": False}, "antialias is false"),
        ({"resize_to": 40}, "resize_to is 40, but resize stretch takes (height, width)"),
        ({"resize_to": [40]}, "resize_to is (40,), but resize stretch takes (height, width)"),
        ({"resize": "letterbox", "resize_to": 40}, "resize_to is 40, but resize letterbox takes none"),
        ({"resize": "shorter_side", "resize_to": [4, 4]}, "resize_to is (4, 4), but resize shorter_side takes one"),
        ({"resize": "shorter_side", "width": 48}, "resize_to is None, but resize shorter_side needs a number"),
    ],
)
def test_fields_of_the_input_that_do_not_fit_together_are_refused_by_name(fields: dict[str, Any], problem: str) -> None:
    input_ = {**json.loads(FULL.to_json())["input"], **fields}
    with pytest.raises(SpecError) as raised:
        ModelSpec.from_json(document("input", value=input_), "x")
    assert problem in raised.value.problem
    assert "`$.input`" in raised.value.problem


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"outputs": 1}, "outputs is 1, which needs activation sigmoid and 2 class names, not softmax and 2"),
        ({"outputs": 1, "activation": "sigmoid", "class_names": ["a", "b", "c"]}, "not sigmoid and 3"),
        ({"thresholds": [0.5, 0.5]}, "thresholds need activation sigmoid, not softmax"),
        ({"thresholds": [0.5], "activation": "sigmoid"}, "thresholds has 1 values for 2 outputs"),
        ({"thresholds": [0, 1], "activation": "sigmoid", "outputs": 1}, "thresholds has 2 values for 1 outputs"),
    ],
)
def test_fields_of_the_output_that_do_not_fit_together_are_refused_by_name(
    fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpecError) as raised:
        ModelSpec.from_json(json.dumps({**json.loads(FULL.to_json()), **fields}), "x")
    assert problem in raised.value.problem


def test_mean_and_std_default_to_one_value_per_channel() -> None:
    gray = InputSpec(height=4, width=4, channels=1, color="L")
    assert (gray.mean, gray.std) == ((0.0,), (1.0,))
    color = InputSpec(height=4, width=4, color="BGR")
    assert (color.mean, color.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_the_shape_follows_the_layout() -> None:
    spec = InputSpec(height=4, width=6)
    assert spec.shape == (3, 4, 6)
    assert msgspec.structs.replace(spec, layout="NHWC").shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("activation", "outputs", "output_size", "multi_label"),
    [("softmax", None, 2, False), ("sigmoid", None, 2, True), ("sigmoid", 1, 1, False)],
)
def test_the_outputs_of_two_classes(activation: Any, outputs: Any, output_size: int, multi_label: bool) -> None:
    spec = msgspec.structs.replace(FULL, activation=activation, outputs=outputs)
    assert (spec.output_size, spec.multi_label) == (output_size, multi_label)


@pytest.mark.parametrize("field", ["schema_version", "model", "class_names", "input"])
def test_a_missing_field_is_refused_by_name(field: str) -> None:
    fields = json.loads(SPEC.to_json())
    del fields[field]
    with pytest.raises(SpecError, match=field):
        ModelSpec.from_json(json.dumps(fields), "x")


def test_a_spec_is_immutable() -> None:
    with pytest.raises(AttributeError):
        SPEC.model = "other"  # type: ignore[misc]
    assert msgspec.structs.replace(SPEC, model="other").class_names == SPEC.class_names
