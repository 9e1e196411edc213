"""The protocol against its own texts, against Triton's client, and against what nobody should send."""

import json
from http import HTTPStatus
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from cifarx_serve.server.api.open_inference import (
    InferRequest,
    infer_response,
    model_metadata,
    parse_infer,
    server_metadata,
)
from cifarx_serve.server.errors import RequestError
from tests.support.color_model import SPEC

PICTURES = msgspec.structs.replace(SPEC, embedded_preprocessing=True)
MAX_IMAGES, MAX_PIXELS = 4, 2000

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tensors = st.integers(1, MAX_IMAGES).flatmap(
    lambda images: arrays.arrays(np.float32, (images, 3, 4, 6), elements=finite, fill=finite)
)
pixels = st.integers(1, MAX_IMAGES).flatmap(lambda images: arrays.arrays(np.uint8, (images, 4, 6, 3)))
pictures = st.tuples(st.integers(1, MAX_IMAGES), st.integers(1, 20), st.integers(1, 20), st.just(3)).flatmap(
    lambda shape: arrays.arrays(np.uint8, shape)
)
logits = st.tuples(st.integers(1, 5), st.integers(2, 12)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(width=32))
)
ids = st.text(st.characters(exclude_categories=["Cs"]))


def parse(body: bytes, header_length: int | None = None, spec: Any = SPEC) -> InferRequest:
    return parse_infer(body, header_length, spec, MAX_IMAGES, MAX_PIXELS)


def datatype(tensor: NDArray[Any]) -> str:
    return {"float32": "FP32", "uint8": "UINT8"}[tensor.dtype.name]


def tensor_input(tensor: NDArray[Any], **fields: Any) -> dict[str, Any]:
    entry = {
        "name": "input",
        "shape": list(tensor.shape),
        "datatype": datatype(tensor),
        "data": tensor.ravel().tolist(),
    }
    kept = entry | fields
    return {name: value for name, value in kept.items() if value is not None}


def request(*inputs: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **fields}).encode()


def with_bytes(tensor: NDArray[Any], **fields: Any) -> tuple[bytes, int]:
    raw = tensor.tobytes()
    header = request(tensor_input(tensor, data=None, parameters={"binary_data_size": len(raw)}), **fields)
    return header + raw, len(header)


def same(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


BLANK = np.zeros((1, 3, 4, 6), np.float32)
BLACK = np.zeros((1, 4, 6, 3), np.uint8)


# What the texts say


def test_a_request_in_json() -> None:
    asked = parse(request(tensor_input(BLANK + 0.5), id="42", outputs=[{"name": "logits"}]))
    assert asked.id == "42"
    assert same(asked.tensor, BLANK + np.float32(0.5))
    assert not asked.binary_output


def test_an_answer_in_json() -> None:
    asked = InferRequest("42", BLANK, binary_output=False)
    body, header_length = infer_response(asked, "lzh_9", "3f2a", np.array([[1.0, 1.5], [2.0, -0.25]], np.float32))
    assert header_length is None
    assert body == (
        b'{"model_name":"lzh_9","model_version":"3f2a","id":"42","outputs":['
        b'{"name":"logits","datatype":"FP32","shape":[2,2],"data":[1.0,1.5,2.0,-0.25]}]}'
    )


def test_an_answer_in_bytes() -> None:
    asked = InferRequest(None, BLANK, binary_output=True)
    body, header_length = infer_response(asked, "lzh_9", "3f2a", np.array([[1.0, 1.5]], np.float32))
    header = (
        b'{"model_name":"lzh_9","model_version":"3f2a","outputs":['
        b'{"name":"logits","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}]}'
    )
    assert (body, header_length) == (header + b"\x00\x00\x80\x3f\x00\x00\xc0\x3f", len(header))


def test_logits_that_json_has_no_number_for_are_null() -> None:
    answer = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    body, _ = infer_response(InferRequest(None, BLANK, binary_output=False), "m", "1", answer)
    assert json.loads(body)["outputs"][0]["data"] == [None, None, None, 1.0]
    read = InferenceServerClient.parse_response_body(body).as_numpy("logits")
    assert np.isnan(read[0, :3]).all()
    assert read[0, 3] == 1.0


def test_the_server_says_what_it_is() -> None:
    assert msgspec.to_builtins(server_metadata("0.1.0")) == {
        "name": "cifarx",
        "version": "0.1.0",
        "extensions": ("binary_tensor_data",),
    }


@pytest.mark.parametrize(
    ("spec", "taken"),
    [
        (SPEC, {"name": "input", "datatype": "FP32", "shape": [-1, 3, 4, 6]}),
        (PICTURES, {"name": "input", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}),
    ],
)
def test_a_model_says_what_it_takes(spec: Any, taken: dict[str, Any]) -> None:
    told = json.loads(msgspec.json.encode(model_metadata("lzh_9", ["3f2a"], "onnx_onnxruntime", spec)))
    assert told == {
        "name": "lzh_9",
        "versions": ["3f2a"],
        "platform": "onnx_onnxruntime",
        "inputs": [taken],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
    }


# The same bits, however they come


@given(tensors | pixels)
def test_flat_nested_and_binary_give_the_same_bits(tensor: NDArray[Any]) -> None:
    assert same(parse(request(tensor_input(tensor))).tensor, tensor)
    assert same(parse(request(tensor_input(tensor, data=tensor.tolist()))).tensor, tensor)
    assert same(parse(*with_bytes(tensor)).tensor, tensor)


@given(pictures)
def test_pictures_of_any_size_give_the_same_bits(tensor: NDArray[Any]) -> None:
    assert same(parse(request(tensor_input(tensor)), spec=PICTURES).tensor, tensor)
    assert same(parse(request(tensor_input(tensor, data=tensor.tolist())), spec=PICTURES).tensor, tensor)
    assert same(parse(*with_bytes(tensor), PICTURES).tensor, tensor)


@pytest.mark.parametrize("offset", range(8))
def test_binary_numbers_are_aligned_wherever_the_json_ends(offset: int) -> None:
    tensor = np.arange(72, dtype=np.float32).reshape(1, 3, 4, 6)
    found = parse(*with_bytes(tensor, id="x" * offset)).tensor
    assert found.flags.aligned
    assert found.flags.c_contiguous
    assert same(found, tensor)


def test_aligned_binary_numbers_are_not_copied() -> None:
    for padding in range(4):
        body, header_length = with_bytes(BLANK, id="x" * padding)
        if header_length % 4 == 0:
            assert np.shares_memory(parse(body, header_length).tensor, np.frombuffer(body, np.uint8))
            return
    pytest.fail("no JSON ended at a multiple of four bytes")


def test_the_data_may_stand_before_its_type() -> None:
    entry = tensor_input(BLACK + 7)
    assert same(parse(request({name: entry[name] for name in sorted(entry)})).tensor, BLACK + np.uint8(7))


def test_whole_numbers_are_numbers() -> None:
    assert same(parse(request(tensor_input(BLANK, data=[3] * 72))).tensor, BLANK + np.float32(3))


def test_a_header_length_may_come_with_json_alone() -> None:
    body = request(tensor_input(BLANK))
    assert same(parse(body, len(body)).tensor, BLANK)


@pytest.mark.parametrize(
    ("of_all", "of_the_output", "binary"),
    [
        ({}, None, False),
        ({}, {}, False),
        ({"binary_data_output": True}, None, True),
        ({"binary_data_output": True}, {}, True),
        ({"binary_data_output": True}, {"binary_data": False}, False),
        ({"binary_data_output": False}, {"binary_data": True}, True),
        ({"priority": 1, "sequence_id": "a"}, {"unheard_of": 0.5}, False),
    ],
)
def test_the_output_goes_before_the_request(of_all: Any, of_the_output: Any, binary: bool) -> None:
    outputs = [] if of_the_output is None else [{"name": "logits", "parameters": of_the_output}]
    asked = parse(request(tensor_input(BLANK), parameters=of_all, outputs=outputs))
    assert asked.binary_output is binary


# Triton's own client


@given(tensors | pixels, st.booleans(), st.booleans() | st.none(), ids)
def test_requests_of_tritonclient(tensor: NDArray[Any], binary: bool, binary_output: bool | None, name: str) -> None:
    entry = InferInput("input", list(tensor.shape), datatype(tensor))
    entry.set_data_from_numpy(tensor, binary_data=binary)
    outputs = None if binary_output is None else [InferRequestedOutput("logits", binary_data=binary_output)]
    asked = parse(*InferenceServerClient.generate_request_body([entry], outputs, request_id=name))
    assert asked.id == (name or None)  # it leaves an empty one out
    assert same(asked.tensor, tensor)
    assert asked.binary_output is (binary_output is not False)  # its default is binary


@given(logits, st.booleans(), st.none() | ids)
def test_answers_to_tritonclient(answer: NDArray[np.float32], binary: bool, name: str | None) -> None:
    body, header_length = infer_response(InferRequest(name, BLANK, binary), "lzh_9", "3f2a", answer)
    read = InferenceServerClient.parse_response_body(body, header_length=header_length)
    told = read.get_response()
    assert (told["model_name"], told["model_version"], told.get("id")) == ("lzh_9", "3f2a", name)
    expected = answer if binary else np.where(np.isfinite(answer), answer, np.float32(np.nan))
    np.testing.assert_array_equal(read.as_numpy("logits"), expected)
    if binary:
        assert same(read.as_numpy("logits"), answer)


# What is wrong is told


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no inference request"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `inputs`"),
        (b'{"inputs": "\xff"}', "no inference request"),
        (b'{"inputs": ' + b"[" * 100_000, "no inference request"),
        (b'{"x": ' + b"[" * 100_000, "recursion"),
        (request(), "the request has no inputs: give one, named 'input'"),
        (request(tensor_input(BLANK), id=42), "$.id"),
        (request(tensor_input(BLANK), id=None), "$.id"),
        (request(tensor_input(BLANK, name="image")), "unknown input 'image': the model has one input, 'input'"),
        (request(tensor_input(BLANK, name=LONG)), "unknown input 'xxx"),
        (request(tensor_input(BLANK), tensor_input(BLANK)), "'input' stands there 2 times"),
        (request(tensor_input(BLANK), outputs=[{"name": "softmax"}]), "unknown output 'softmax'"),
        (request(tensor_input(BLANK), outputs=[{"name": "logits"}] * 3), "'logits' stands there 3 times"),
        (request(tensor_input(BLANK), outputs=[{"name": "logits", "parameters": {"binary_data": 1}}]), "binary_data"),
        (
            request(tensor_input(BLANK), outputs=[{"name": "logits", "parameters": {"classification": 3}}]),
            "asks for classification: leave it out",
        ),
        (request(tensor_input(BLANK), parameters={"binary_data_output": "yes"}), "binary_data_output"),
        (request(tensor_input(BLANK, datatype="FP64")), "FP64"),
        (request(tensor_input(BLANK, datatype=LONG)), "FP32 [N, 3, 4, 6] or UINT8 [N, 4, 6, 3]"),
        (request(tensor_input(BLANK, datatype=None)), "missing required field `datatype`"),
        (request(tensor_input(BLANK, shape=None)), "missing required field `shape`"),
        (request(tensor_input(BLANK, shape=[3, 4, 6])), "FP32 [3, 4, 6]: the model takes FP32 [N, 3, 4, 6] or UINT8"),
        (request(tensor_input(BLANK, shape=[1, 3, 6, 4])), "FP32 [1, 3, 6, 4]"),
        (request(tensor_input(BLANK, shape=[1, 4, 6, 3])), "FP32 [1, 4, 6, 3]"),
        (request(tensor_input(BLANK, shape=[0, 3, 4, 6], data=[])), "FP32 [0, 3, 4, 6]"),
        (request(tensor_input(BLANK, shape=[-1, 3, 4, 6])), "$.inputs[0].shape[0]"),
        (request(tensor_input(BLANK, shape=[2**63, 3, 4, 6])), "$.inputs[0].shape[0]"),
        (request(tensor_input(BLANK, shape=[1, 3, 4, 6.5])), "$.inputs[0].shape[3]"),
        (request(tensor_input(BLANK, shape=[1, 3, 4, True])), "$.inputs[0].shape[3]"),
        (request(tensor_input(BLANK, shape=[1] * 500)), "FP32 [1, 1, 1"),
        (request(tensor_input(BLANK, data=None)), "neither data nor binary_data_size"),
        (request(tensor_input(BLANK, data=[0.5] * 71)), "71 numbers: its shape is [1, 3, 4, 6], so give 72 numbers"),
        (request(tensor_input(BLANK, data=[])), "0 numbers"),
        (request(tensor_input(BLANK, data="AAAA")), "$.inputs[0].data"),
        (request(tensor_input(BLANK, data=[0.5] * 71 + [None])), "$.inputs[0].data[71]"),
        (request(tensor_input(BLANK, data=[0.5] * 71 + ["1"])), "$.inputs[0].data[71]"),
        (request(tensor_input(BLANK, data=[0.5] * 71 + [True])), "$.inputs[0].data[71]"),
        (request(tensor_input(BLANK, data=[0.5] * 71 + [[0.5]])), "$.inputs[0].data[71]"),
        (request(tensor_input(BLANK, data=[0.5] * 71 + [-1e39])), "-1e+39, which no float32 holds"),
        (request(tensor_input(BLANK, data=[0.5] * 71 + [10**400])), "out of range"),
        (request(tensor_input(BLANK, data=[0.5] * 71 + [float("nan")])), "malformed"),
        (request(tensor_input(BLANK, data=[0.5] * 71 + [float("-inf")])), "malformed"),
        (request(tensor_input(BLANK, data=[[[0.5] * 6] * 4] * 3)), "$.inputs[0].data[0][0][0]"),
        (request(tensor_input(BLANK, data=[[[["a"] * 6] * 4] * 3])), "$.inputs[0].data[0][0][0][0]"),
        (request(tensor_input(BLANK, data=[[[[0.5] * 6] * 4] * 3] * 2)), "144 numbers"),
        (request(tensor_input(BLANK, data=[[[[0.5] * 4] * 6] * 3])), "lists of 6 elements at depth 2"),
        (request(tensor_input(BLANK, data=[[[[0.5] * 6] * 3 + [[0.5] * 5]] * 3])), "lists of 5, 6 elements at depth 3"),
        (request(tensor_input(BLACK, data=[0] * 71 + [256])), "$.inputs[0].data[71]"),
        (request(tensor_input(BLACK, data=[0] * 71 + [-1])), "$.inputs[0].data[71]"),
        (request(tensor_input(BLACK, data=[0] * 71 + [0.5])), "$.inputs[0].data[71]"),
        (request(tensor_input(BLANK, parameters={"binary_data_size": 288})), "both data and binary_data_size"),
        (
            request(tensor_input(BLANK, data=None, parameters={"binary_data_size": 288})),
            "without the header Inference-Header-Content-Length",
        ),
        (request(tensor_input(BLANK, data=None, parameters={"binary_data_size": -1})), "binary_data_size"),
        (request(tensor_input(BLANK, data=None, parameters={"shared_memory_region": "r"})), "neither data nor"),
    ],
)
def test_what_is_wrong_is_told(body: bytes, words: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse(body)
    assert words in str(raised.value)
    assert raised.value.status == HTTPStatus.BAD_REQUEST
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("more", "longer", "words"),
    [
        (b"\0", 0, "binary_data_size is 288, and 289 bytes follow the JSON"),
        (b"", 1, "no inference request"),
        (b"", -1, "no inference request"),
        (b"", 10_000, "and the body has"),
        (b"", -10_000, "Inference-Header-Content-Length is -"),
    ],
)
def test_lengths_that_do_not_fit_are_told(more: bytes, longer: int, words: str) -> None:
    body, header_length = with_bytes(BLANK)
    with pytest.raises(RequestError) as raised:
        parse(body + more, header_length + longer)
    assert words in str(raised.value)
    assert raised.value.status == HTTPStatus.BAD_REQUEST


def test_a_size_that_is_not_the_shapes_is_told() -> None:
    header = request(tensor_input(BLANK, data=None, parameters={"binary_data_size": 284}))
    with pytest.raises(RequestError, match=r"284 bytes of binary data: FP32 \[1, 3, 4, 6\] takes 288"):
        parse(header + bytes(284), len(header))


def test_bytes_that_no_input_asks_for_are_told() -> None:
    header = request(tensor_input(BLANK))
    with pytest.raises(RequestError, match="3 bytes follow the JSON, and no input has binary_data_size"):
        parse(header + b"abc", len(header))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_binary_numbers_that_are_not_finite_are_told(number: float) -> None:
    tensor = BLANK.copy()
    tensor[0, 1, 0, 0] = number
    with pytest.raises(RequestError, match=f"number 24 of the binary data is {number}") as raised:
        parse(*with_bytes(tensor))
    assert raised.value.status == HTTPStatus.BAD_REQUEST


def test_a_model_of_pictures_takes_pictures_alone() -> None:
    with pytest.raises(RequestError, match=r"'FP32'.*the model takes UINT8 \[N, H, W, 3\]"):
        parse(request(tensor_input(BLANK)), spec=PICTURES)
    with pytest.raises(RequestError, match=r"a tensor of UINT8 \[1, 0, 6, 3\]"):
        parse(request(tensor_input(BLACK, shape=[1, 0, 6, 3])), spec=PICTURES)
    with pytest.raises(RequestError, match=r"a tensor of UINT8 \[1, 4, 6, 4\]"):
        parse(request(tensor_input(BLACK, shape=[1, 4, 6, 4])), spec=PICTURES)


@pytest.mark.parametrize(
    ("tensor", "spec", "words"),
    [
        (np.zeros((5, 3, 4, 6), np.float32), SPEC, "5 images in one request: send at most 4"),
        (np.zeros((5, 4, 6, 3), np.uint8), SPEC, "5 images in one request: send at most 4"),
        (np.zeros((1, 1, 2001, 3), np.uint8), PICTURES, "1 images of 2001 x 1 are 2001 pixels: send at most 2000"),
        (np.zeros((4, 3, 40, 60), np.float32), SPEC, "the JSON holds over 28"),
    ],
)
def test_too_much_is_told(tensor: NDArray[Any], spec: Any, words: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse(request(tensor_input(tensor)), spec=spec)
    assert words in str(raised.value)
    assert raised.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def test_shapes_beyond_any_memory_are_told() -> None:
    header = request(tensor_input(BLACK, shape=[1, 2**62, 2**62, 3], data=None, parameters={"binary_data_size": 0}))
    with pytest.raises(RequestError, match="pixels: send at most 2000") as raised:
        parse(header, len(header), PICTURES)
    assert raised.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


# What nobody should send


def survives(body: bytes, header_length: int | None) -> None:
    """It is read, or refused in words."""
    for spec in (SPEC, PICTURES):
        try:
            parse(body, header_length, spec)
        except RequestError as error:
            assert error.status in {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE}
            assert len(str(error)) < 500


lengths = st.none() | st.integers(-5, 600) | st.integers()


@given(st.binary(max_size=300), lengths)
@example(b"", 0)
@example(b"", None)
def test_any_bytes_are_survived(body: bytes, header_length: int | None) -> None:
    survives(body, header_length)


@given(st.data())
def test_damaged_requests_are_survived(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([(request(tensor_input(BLANK), id="a"), None), with_bytes(BLACK)]))
    body = bytearray(whole[0])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        end = data.draw(st.integers(start, min(len(body), start + 20)))
        body[start:end] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"[" * 3000, b"NaN", b"1e999", b"\\ud800"])
        )
    survives(bytes(body), data.draw(st.just(whole[1]) | lengths))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=10,
)
odd_inputs = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("input") | anything,
        "datatype": st.sampled_from(["FP32", "UINT8"]) | anything,
        "shape": st.sampled_from([[1, 3, 4, 6], [1, 4, 6, 3]]) | st.lists(st.integers()) | anything,
        "data": st.just([1] * 72) | st.lists(st.integers() | st.floats()) | anything,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.just(72) | anything}) | anything,
    },
)
odd_requests = st.fixed_dictionaries(
    {},
    optional={
        "id": anything,
        "inputs": st.lists(odd_inputs, max_size=2) | anything,
        "outputs": st.lists(st.fixed_dictionaries({"name": st.just("logits") | anything, "parameters": anything})),
        "parameters": anything,
    },
)


@given(odd_requests, lengths, st.binary(max_size=80))
def test_odd_requests_are_survived(odd: dict[str, Any], header_length: int | None, more: bytes) -> None:
    header = json.dumps(odd).encode()
    survives(header, header_length)
    survives(header + more, len(header))
