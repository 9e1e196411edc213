import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cifarx_serve.errors import SpecError
from cifarx_serve.spec import SCHEMA_VERSION, DataRecord, InputSpec, ModelSpec, ParitySummary, TrainingRecord
from tests.support.color_model import SPEC

SHA256 = "0123456789abcdef" * 4

positive = st.integers(1, 2**40)
finite = st.floats(allow_nan=False, allow_infinity=False)
triples = st.tuples(finite, finite, finite)
positive_floats = st.floats(min_value=2.0**-100, allow_infinity=False)
fractions = st.floats(0, 1)
words = st.dictionaries(st.text(), st.text(), max_size=3)
sha256 = st.text("0123456789abcdef", min_size=64, max_size=64)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
inputs = st.builds(
    InputSpec,
    height=positive,
    width=positive,
    value_range=st.tuples(finite, finite),
    mean=triples,
    std=st.tuples(positive_floats, positive_floats, positive_floats),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
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
specs = st.builds(
    ModelSpec,
    model=st.text(),
    class_names=st.lists(st.text(), min_size=2, max_size=5).map(tuple),
    input=inputs,
    precision=st.sampled_from(["fp32", "fp16", "int8"]),
    training=st.none() | training_records,
    checkpoint_sha256=st.none() | sha256,
    exporter=st.none() | words,
    parity=st.none() | parities,
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


@given(specs)
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


def test_schema_1_is_read() -> None:
    fields = json.loads(FULL.to_json()) | {"schema_version": 1}
    fields["input"] = {"height": 32, "width": 32, "colour": "RGB", "mean": [0.5, 0, 0], "resize": "lanczos"}
    spec = ModelSpec.from_json(json.dumps(fields), "x")
    assert spec.input == InputSpec(height=32, width=32, mean=(0.5, 0.0, 0.0), interpolation="lanczos")
    assert spec == ModelSpec.from_json(spec.to_json(), "x")


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
        (("input", "channels"), 1),
        (("input", "layout"), "CHWN"),
        (("input", "dtype"), "float16"),
        (("input", "color"), "L"),
        (("input", "value_range"), [0, 1, 2]),
        (("input", "mean"), [0, 0]),
        (("input", "std"), [1, 1, 0]),
        (("input", "interpolation"), "box"),
        (("output",), "classes"),
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
