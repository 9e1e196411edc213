"""The Open Inference Protocol against its specification, Triton's client and invalid requests."""

import base64
import json
import re
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
from cifarx_serve.spec import InputSpec
from tests.support.color_model import SPEC
from tests.support.spec_model import GRAYSCALE, RGB, make_spec

EMBEDDED = msgspec.structs.replace(SPEC, embedded_preprocessing=True)
NHWC = make_spec(msgspec.structs.replace(RGB, layout="NHWC"))
GRAY = make_spec(GRAYSCALE)
EMBEDDED_GRAY = make_spec(GRAYSCALE, embedded_preprocessing=True)
BINARY = make_spec(class_names=("no", "yes"), output="probabilities", activation="sigmoid", outputs=1)
MAX_IMAGES, MAX_PIXELS = 4, 2000

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tensors = st.integers(1, MAX_IMAGES).flatmap(
    lambda images: arrays.arrays(np.float32, (images, 3, 4, 6), elements=finite, fill=finite)
)
pixels = st.integers(1, MAX_IMAGES).flatmap(lambda images: arrays.arrays(np.uint8, (images, 4, 6, 3)))
images_of_any_size = st.tuples(st.integers(1, MAX_IMAGES), st.integers(1, 20), st.integers(1, 20), st.just(3)).flatmap(
    lambda shape: arrays.arrays(np.uint8, shape)
)
logits = st.tuples(st.integers(1, 5), st.integers(2, 12)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(width=32))
)
ids = st.text(st.characters(exclude_categories=["Cs"]))


def parse(body: bytes, header_length: int | None = None, spec: Any = SPEC) -> InferRequest:
    return parse_infer(body, header_length, spec, MAX_IMAGES, MAX_PIXELS)


def shape_of(parsed: InferRequest) -> tuple[int, ...]:
    assert isinstance(parsed.tensor, np.ndarray)
    return parsed.tensor.shape


def datatype(tensor: NDArray[Any]) -> str:
    return {"float32": "FP32", "uint8": "UINT8"}[tensor.dtype.name]


def tensor_input(tensor: NDArray[Any], **fields: Any) -> dict[str, Any]:
    entry = {
        "name": "input",
        "shape": list(tensor.shape),
        "datatype": datatype(tensor),
        "data": tensor.ravel().tolist(),
    }
    return {name: value for name, value in (entry | fields).items() if value is not None}


def request(*inputs: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **fields}).encode()


def binary_request(tensor: NDArray[Any], **fields: Any) -> tuple[bytes, int]:
    raw = tensor.tobytes()
    header = request(tensor_input(tensor, data=None, parameters={"binary_data_size": len(raw)}), **fields)
    return header + raw, len(header)


def is_identical(tensor: object, expected: NDArray[Any]) -> bool:
    assert isinstance(tensor, np.ndarray)
    return tensor.dtype == expected.dtype and tensor.shape == expected.shape and tensor.tobytes() == expected.tobytes()


ZEROS = np.zeros((1, 3, 4, 6), np.float32)
BLACK = np.zeros((1, 4, 6, 3), np.uint8)


# Examples of the specification


def test_a_request_in_json() -> None:
    parsed = parse(request(tensor_input(ZEROS + 0.5), id="42", outputs=[{"name": "logits"}]))
    assert parsed.id == "42"
    assert is_identical(parsed.tensor, ZEROS + np.float32(0.5))
    assert not parsed.binary_output


def test_a_response_in_json() -> None:
    parsed = InferRequest("42", ZEROS, binary_output=False)
    values = np.array([[1.0, 1.5], [2.0, -0.25]], np.float32)
    body, header_length = infer_response(parsed, "lzh_9", "3f2a", "logits", values)
    assert header_length is None
    assert body == (
        b'{"model_name":"lzh_9","model_version":"3f2a","id":"42","outputs":['
        b'{"name":"logits","datatype":"FP32","shape":[2,2],"data":[1.0,1.5,2.0,-0.25]}]}'
    )


def test_a_binary_response() -> None:
    parsed = InferRequest(None, ZEROS, binary_output=True)
    body, header_length = infer_response(parsed, "lzh_9", "3f2a", "logits", np.array([[1.0, 1.5]], np.float32))
    header = (
        b'{"model_name":"lzh_9","model_version":"3f2a","outputs":['
        b'{"name":"logits","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}]}'
    )
    assert (body, header_length) == (header + b"\x00\x00\x80\x3f\x00\x00\xc0\x3f", len(header))


def test_logits_that_are_not_finite_are_null_in_json() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    body, _ = infer_response(InferRequest(None, ZEROS, binary_output=False), "m", "1", "logits", values)
    assert json.loads(body)["outputs"][0]["data"] == [None, None, None, 1.0]
    read = InferenceServerClient.parse_response_body(body).as_numpy("logits")
    assert np.isnan(read[0, :3]).all()
    assert read[0, 3] == 1.0


def test_server_metadata() -> None:
    assert msgspec.to_builtins(server_metadata("0.1.0")) == {
        "name": "cifarx",
        "version": "0.1.0",
        "extensions": ("binary_tensor_data", "model_configuration", "model_repository", "statistics"),
    }


@pytest.mark.parametrize(
    ("spec", "input_metadata"),
    [
        (SPEC, {"name": "input", "datatype": "FP32", "shape": [-1, 3, 4, 6]}),
        (EMBEDDED, {"name": "input", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}),
        (NHWC, {"name": "input", "datatype": "FP32", "shape": [-1, 4, 6, 3]}),
        (GRAY, {"name": "input", "datatype": "FP32", "shape": [-1, 1, 4, 6]}),
        (EMBEDDED_GRAY, {"name": "input", "datatype": "UINT8", "shape": [-1, -1, -1, 1]}),
    ],
)
def test_model_metadata(spec: Any, input_metadata: dict[str, Any]) -> None:
    metadata = json.loads(msgspec.json.encode(model_metadata("lzh_9", ["3f2a"], "onnx_onnxruntime", spec)))
    assert metadata == {
        "name": "lzh_9",
        "versions": ["3f2a"],
        "platform": "onnx_onnxruntime",
        "inputs": [input_metadata],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
    }


def test_the_metadata_name_the_output_and_what_was_assumed() -> None:
    metadata = json.loads(msgspec.json.encode(model_metadata("m", ["1"], "onnx_onnxruntime", BINARY)))
    assert metadata["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 1]}]
    assert "parameters" not in metadata
    assumed = msgspec.structs.replace(BINARY, assumed=("class_names", "preprocessing"))
    metadata = json.loads(msgspec.json.encode(model_metadata("m", ["1"], "onnx_onnxruntime", assumed)))
    assert metadata["parameters"]["assumption"].startswith("ASSUMED class names, preprocessing: ")


@pytest.mark.parametrize(
    ("spec", "shape", "pixel_shape"),
    [
        (NHWC, (2, 4, 6, 3), (2, 4, 6, 3)),
        (GRAY, (2, 1, 4, 6), (2, 4, 6, 1)),
        (EMBEDDED_GRAY, None, (2, 9, 7, 1)),
    ],
    ids=["NHWC", "grayscale", "embedded grayscale"],
)
def test_the_shapes_are_those_of_the_spec(
    spec: Any, shape: tuple[int, ...] | None, pixel_shape: tuple[int, ...]
) -> None:
    random = np.random.default_rng(0)
    accepted: list[NDArray[Any]] = [random.integers(0, 256, pixel_shape, np.uint8)]
    if shape:
        accepted.append(random.random(shape, np.float32))
    for tensor in accepted:
        assert is_identical(parse(request(tensor_input(tensor)), spec=spec).tensor, tensor)
        body, length = binary_request(tensor)
        assert is_identical(parse(body, length, spec).tensor, tensor)
        wrong = np.ascontiguousarray(tensor[:, :, :, [0, 0]])
        with pytest.raises(RequestError) as raised:
            parse(request(tensor_input(wrong)), spec=spec)
        assert raised.value.status == HTTPStatus.BAD_REQUEST
        assert ", 1]" in raised.value.remedy or ", 3]" in raised.value.remedy


def test_the_limit_of_pixels_counts_images_of_every_layout() -> None:
    for spec, shape in ((NHWC, (3, 4, 6, 3)), (GRAY, (3, 1, 4, 6))):
        body = request(tensor_input(np.zeros(shape, np.float32)))
        assert shape_of(parse_infer(body, None, spec, MAX_IMAGES, max_pixels=72)) == shape
        with pytest.raises(RequestError, match="3 images of 6 x 4 have 72 pixels"):
            parse_infer(body, None, spec, MAX_IMAGES, max_pixels=71)


def test_the_limit_of_pixels_counts_those_before_the_model_crops_an_image() -> None:
    spec = make_spec(InputSpec(height=4, width=6, resize="shorter_side", resize_to=20), embedded_preprocessing=True)
    body = request(tensor_input(np.zeros((1, 2, 20, 3), np.uint8)))
    assert shape_of(parse_infer(body, None, spec, MAX_IMAGES, max_pixels=4000)) == (1, 2, 20, 3)
    with pytest.raises(RequestError, match="1 images of 20 x 2 have 4000 pixels") as raised:
        parse_infer(body, None, spec, MAX_IMAGES, max_pixels=3999)
    assert raised.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def test_the_output_has_the_name_of_the_spec() -> None:
    parsed = parse(request(tensor_input(ZEROS), outputs=[{"name": "probabilities"}]), spec=BINARY)
    body, _ = infer_response(parsed, "m", "1", "probabilities", np.array([[0.25]], np.float32))
    output = {"name": "probabilities", "datatype": "FP32", "shape": [1, 1], "data": [0.25]}
    assert json.loads(body)["outputs"] == [output]
    with pytest.raises(RequestError, match="unknown output 'logits': the model has one output, 'probabilities'"):
        parse(request(tensor_input(ZEROS), outputs=[{"name": "logits"}]), spec=BINARY)


# Tensors keep every bit in every encoding


@given(tensors | pixels)
def test_flat_nested_and_binary_data_have_the_same_bits(tensor: NDArray[Any]) -> None:
    assert is_identical(parse(request(tensor_input(tensor))).tensor, tensor)
    assert is_identical(parse(request(tensor_input(tensor, data=tensor.tolist()))).tensor, tensor)
    assert is_identical(parse(*binary_request(tensor)).tensor, tensor)


@given(images_of_any_size)
def test_images_of_any_size_have_the_same_bits(tensor: NDArray[Any]) -> None:
    assert is_identical(parse(request(tensor_input(tensor)), spec=EMBEDDED).tensor, tensor)
    assert is_identical(parse(request(tensor_input(tensor, data=tensor.tolist())), spec=EMBEDDED).tensor, tensor)
    assert is_identical(parse(*binary_request(tensor), EMBEDDED).tensor, tensor)


@pytest.mark.parametrize("offset", range(8))
def test_binary_data_is_aligned_wherever_the_json_ends(offset: int) -> None:
    tensor = np.arange(72, dtype=np.float32).reshape(1, 3, 4, 6)
    parsed = parse(*binary_request(tensor, id="x" * offset)).tensor
    assert isinstance(parsed, np.ndarray)
    assert parsed.flags.aligned
    assert parsed.flags.c_contiguous
    assert is_identical(parsed, tensor)


def test_aligned_binary_data_is_not_copied() -> None:
    for padding in range(4):
        body, header_length = binary_request(ZEROS, id="x" * padding)
        if header_length % 4 == 0:
            assert np.shares_memory(parse(body, header_length).tensor, np.frombuffer(body, np.uint8))
            return
    pytest.fail("no JSON ended at a multiple of four bytes")


def test_the_data_may_precede_the_datatype() -> None:
    entry = tensor_input(BLACK + 7)
    assert is_identical(parse(request({name: entry[name] for name in sorted(entry)})).tensor, BLACK + np.uint8(7))


def test_integers_are_valid_fp32_data() -> None:
    assert is_identical(parse(request(tensor_input(ZEROS, data=[3] * 72))).tensor, ZEROS + np.float32(3))


def test_the_header_length_may_cover_the_whole_body() -> None:
    body = request(tensor_input(ZEROS))
    assert is_identical(parse(body, len(body)).tensor, ZEROS)


@pytest.mark.parametrize(
    ("request_parameters", "output_parameters", "binary"),
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
def test_output_parameters_take_precedence(request_parameters: Any, output_parameters: Any, binary: bool) -> None:
    outputs = [] if output_parameters is None else [{"name": "logits", "parameters": output_parameters}]
    parsed = parse(request(tensor_input(ZEROS), parameters=request_parameters, outputs=outputs))
    assert parsed.binary_output is binary


# Triton's client


@given(tensors | pixels, st.booleans(), st.booleans() | st.none(), ids)
def test_requests_of_tritonclient(tensor: NDArray[Any], binary: bool, binary_output: bool | None, name: str) -> None:
    entry = InferInput("input", list(tensor.shape), datatype(tensor))
    entry.set_data_from_numpy(tensor, binary_data=binary)
    outputs = None if binary_output is None else [InferRequestedOutput("logits", binary_data=binary_output)]
    parsed = parse(*InferenceServerClient.generate_request_body([entry], outputs, request_id=name))
    assert parsed.id == (name or None)  # it leaves an empty one out
    assert is_identical(parsed.tensor, tensor)
    assert parsed.binary_output is (binary_output is not False)  # its default is binary


@given(logits, st.booleans(), st.none() | ids)
def test_responses_to_tritonclient(values: NDArray[np.float32], binary: bool, name: str | None) -> None:
    body, header_length = infer_response(InferRequest(name, ZEROS, binary), "lzh_9", "3f2a", "logits", values)
    read = InferenceServerClient.parse_response_body(body, header_length=header_length)
    header = read.get_response()
    assert (header["model_name"], header["model_version"], header.get("id")) == ("lzh_9", "3f2a", name)
    expected = values if binary else np.where(np.isfinite(values), values, np.float32(np.nan))
    np.testing.assert_array_equal(read.as_numpy("logits"), expected)
    if binary:
        assert is_identical(read.as_numpy("logits"), values)


# Invalid requests


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not a valid inference request"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `inputs`"),
        (b'{"inputs": "\xff"}', "not a valid inference request"),
        (b'{"inputs": ' + b"[" * 100_000, "not a valid inference request"),
        (b'{"x": ' + b"[" * 100_000, "recursion"),
        (request(), "the request has no inputs: send one, named 'input'"),
        (request(tensor_input(ZEROS), id=42), "$.id"),
        (request(tensor_input(ZEROS), id=None), "$.id"),
        (request(tensor_input(ZEROS, name="image")), "unknown input 'image': the model has one input, 'input'"),
        (request(tensor_input(ZEROS, name=LONG)), "unknown input 'xxx"),
        (request(tensor_input(ZEROS), tensor_input(ZEROS)), "input 'input' occurs 2 times: name it once"),
        (request(tensor_input(ZEROS), outputs=[{"name": "softmax"}]), "unknown output 'softmax'"),
        (
            request(tensor_input(ZEROS), outputs=[{"name": "logits"}] * 3),
            "output 'logits' occurs 3 times: name it once",
        ),
        (request(tensor_input(ZEROS), outputs=[{"name": "logits", "parameters": {"binary_data": 1}}]), "binary_data"),
        (
            request(tensor_input(ZEROS), outputs=[{"name": "logits", "parameters": {"classification": 3}}]),
            "has the parameter classification, which is not supported: leave it out",
        ),
        (request(tensor_input(ZEROS), parameters={"binary_data_output": "yes"}), "binary_data_output"),
        (request(tensor_input(ZEROS, datatype="FP64")), "FP64"),
        (request(tensor_input(ZEROS, datatype=LONG)), "FP32 [N, 3, 4, 6] or UINT8 [N, 4, 6, 3] or BYTES [N]"),
        (request(tensor_input(ZEROS, datatype=None)), "missing required field `datatype`"),
        (request(tensor_input(ZEROS, shape=None)), "missing required field `shape`"),
        (request(tensor_input(ZEROS, shape=[3, 4, 6])), "FP32 [3, 4, 6]: the model takes FP32 [N, 3, 4, 6] or UINT8"),
        (request(tensor_input(ZEROS, shape=[1, 3, 6, 4])), "FP32 [1, 3, 6, 4]"),
        (request(tensor_input(ZEROS, shape=[1, 4, 6, 3])), "FP32 [1, 4, 6, 3]"),
        (request(tensor_input(ZEROS, shape=[0, 3, 4, 6], data=[])), "FP32 [0, 3, 4, 6]"),
        (request(tensor_input(ZEROS, shape=[-1, 3, 4, 6])), "$.inputs[0].shape[0]"),
        (request(tensor_input(ZEROS, shape=[2**63, 3, 4, 6])), "$.inputs[0].shape[0]"),
        (request(tensor_input(ZEROS, shape=[1, 3, 4, 6.5])), "$.inputs[0].shape[3]"),
        (request(tensor_input(ZEROS, shape=[1, 3, 4, True])), "$.inputs[0].shape[3]"),
        (request(tensor_input(ZEROS, shape=[1] * 500)), "FP32 [1, 1, 1"),
        (request(tensor_input(ZEROS, data=None)), "neither data nor binary_data_size"),
        (
            request(tensor_input(ZEROS, data=[0.5] * 71)),
            "the data has 71 numbers and the shape is [1, 3, 4, 6]: send 72 numbers, flat or nested like the shape",
        ),
        (request(tensor_input(ZEROS, data=[])), "0 numbers"),
        (request(tensor_input(ZEROS, data="AAAA")), "$.inputs[0].data"),
        (request(tensor_input(ZEROS, data=[0.5] * 71 + [None])), "$.inputs[0].data[71]"),
        (request(tensor_input(ZEROS, data=[0.5] * 71 + ["1"])), "$.inputs[0].data[71]"),
        (request(tensor_input(ZEROS, data=[0.5] * 71 + [True])), "$.inputs[0].data[71]"),
        (request(tensor_input(ZEROS, data=[0.5] * 71 + [[0.5]])), "$.inputs[0].data[71]"),
        (
            request(tensor_input(ZEROS, data=[0.5] * 71 + [-1e39])),
            "-1e+39, which is too large for float32: send numbers that are finite in float32",
        ),
        (request(tensor_input(ZEROS, data=[0.5] * 71 + [10**400])), "out of range"),
        (request(tensor_input(ZEROS, data=[0.5] * 71 + [float("nan")])), "malformed"),
        (request(tensor_input(ZEROS, data=[0.5] * 71 + [float("-inf")])), "malformed"),
        (request(tensor_input(ZEROS, data=[[[0.5] * 6] * 4] * 3)), "$.inputs[0].data[0][0][0]"),
        (request(tensor_input(ZEROS, data=[[[["a"] * 6] * 4] * 3])), "$.inputs[0].data[0][0][0][0]"),
        (request(tensor_input(ZEROS, data=[[[[0.5] * 6] * 4] * 3] * 2)), "144 numbers"),
        (request(tensor_input(ZEROS, data=[[[[0.5] * 4] * 6] * 3])), "lists of 6 elements at depth 2"),
        (request(tensor_input(ZEROS, data=[[[[0.5] * 6] * 3 + [[0.5] * 5]] * 3])), "lists of 5, 6 elements at depth 3"),
        (request(tensor_input(BLACK, data=[0] * 71 + [256])), "$.inputs[0].data[71]"),
        (request(tensor_input(BLACK, data=[0] * 71 + [-1])), "$.inputs[0].data[71]"),
        (request(tensor_input(BLACK, data=[0] * 71 + [0.5])), "$.inputs[0].data[71]"),
        (request(tensor_input(ZEROS, parameters={"binary_data_size": 288})), "both data and binary_data_size"),
        (
            request(tensor_input(ZEROS, data=None, parameters={"binary_data_size": 288})),
            "binary_data_size requires the header Inference-Header-Content-Length",
        ),
        (request(tensor_input(ZEROS, data=None, parameters={"binary_data_size": -1})), "binary_data_size"),
        (request(tensor_input(ZEROS, data=None, parameters={"shared_memory_region": "r"})), "neither data nor"),
    ],
)
def test_an_invalid_request_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse(body)
    assert message in str(raised.value)
    assert raised.value.status == HTTPStatus.BAD_REQUEST
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("more", "longer", "message"),
    [
        (b"\0", 0, "binary_data_size is 288 and 289 bytes follow the JSON"),
        (b"", 1, "not a valid inference request"),
        (b"", -1, "not a valid inference request"),
        (b"", 10_000, " and the body has "),
        (b"", -10_000, "Inference-Header-Content-Length is -"),
    ],
)
def test_a_wrong_length_is_refused(more: bytes, longer: int, message: str) -> None:
    body, header_length = binary_request(ZEROS)
    with pytest.raises(RequestError) as raised:
        parse(body + more, header_length + longer)
    assert message in str(raised.value)
    assert raised.value.status == HTTPStatus.BAD_REQUEST


def test_binary_data_that_does_not_match_the_shape_is_refused() -> None:
    header = request(tensor_input(ZEROS, data=None, parameters={"binary_data_size": 284}))
    with pytest.raises(
        RequestError, match=r"284 bytes of binary data do not match FP32 \[1, 3, 4, 6\]: send 288 bytes"
    ):
        parse(header + bytes(284), len(header))


def test_binary_data_without_binary_data_size_is_refused() -> None:
    header = request(tensor_input(ZEROS))
    with pytest.raises(RequestError, match="3 bytes follow the JSON and no input has binary_data_size"):
        parse(header + b"abc", len(header))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_binary_data_that_is_not_finite_is_refused(number: float) -> None:
    tensor = ZEROS.copy()
    tensor[0, 1, 0, 0] = number
    with pytest.raises(RequestError, match=f"number 24 of the binary data is {number}") as raised:
        parse(*binary_request(tensor))
    assert raised.value.status == HTTPStatus.BAD_REQUEST


def test_a_model_with_embedded_preprocessing_takes_only_pixels() -> None:
    with pytest.raises(RequestError, match=r"'FP32'.*the model takes UINT8 \[N, H, W, 3\]"):
        parse(request(tensor_input(ZEROS)), spec=EMBEDDED)
    with pytest.raises(RequestError, match=r"the input is UINT8 \[1, 0, 6, 3\]"):
        parse(request(tensor_input(BLACK, shape=[1, 0, 6, 3])), spec=EMBEDDED)
    with pytest.raises(RequestError, match=r"the input is UINT8 \[1, 4, 6, 4\]"):
        parse(request(tensor_input(BLACK, shape=[1, 4, 6, 4])), spec=EMBEDDED)


@pytest.mark.parametrize(
    ("tensor", "spec", "message"),
    [
        (np.zeros((5, 3, 4, 6), np.float32), SPEC, "5 images in one request: send at most 4"),
        (np.zeros((5, 4, 6, 3), np.uint8), SPEC, "5 images in one request: send at most 4"),
        (np.zeros((1, 1, 2001, 3), np.uint8), EMBEDDED, "1 images of 2001 x 1 have 2001 pixels: send at most 2000"),
        (np.zeros((4, 3, 40, 60), np.float32), SPEC, "the JSON has more than 28"),
    ],
)
def test_too_many_images_or_pixels_are_refused(tensor: NDArray[Any], spec: Any, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse(request(tensor_input(tensor)), spec=spec)
    assert message in str(raised.value)
    assert raised.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def test_a_shape_larger_than_any_memory_is_refused() -> None:
    header = request(tensor_input(BLACK, shape=[1, 2**62, 2**62, 3], data=None, parameters={"binary_data_size": 0}))
    with pytest.raises(RequestError, match="pixels: send at most 2000") as raised:
        parse(header, len(header), EMBEDDED)
    assert raised.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


# Fuzzing


def check_parses_or_refuses(body: bytes, header_length: int | None) -> None:
    """Check that the request is parsed, or refused with an error message."""
    for spec in (SPEC, EMBEDDED):
        try:
            parse(body, header_length, spec)
        except RequestError as error:
            assert error.status in {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE}
            assert len(str(error)) < 500


lengths = st.none() | st.integers(-5, 600) | st.integers()


@given(st.binary(max_size=300), lengths)
@example(b"", 0)
@example(b"", None)
def test_random_bytes(body: bytes, header_length: int | None) -> None:
    check_parses_or_refuses(body, header_length)


@given(st.data())
def test_corrupted_requests(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([(request(tensor_input(ZEROS), id="a"), None), binary_request(BLACK)]))
    body = bytearray(whole[0])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        end = data.draw(st.integers(start, min(len(body), start + 20)))
        body[start:end] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"[" * 3000, b"NaN", b"1e999", b"\\ud800"])
        )
    check_parses_or_refuses(bytes(body), data.draw(st.just(whole[1]) | lengths))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=10,
)
random_inputs = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("input") | anything,
        "datatype": st.sampled_from(["FP32", "UINT8"]) | anything,
        "shape": st.sampled_from([[1, 3, 4, 6], [1, 4, 6, 3]]) | st.lists(st.integers()) | anything,
        "data": st.just([1] * 72) | st.lists(st.integers() | st.floats()) | anything,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.just(72) | anything}) | anything,
    },
)
random_requests = st.fixed_dictionaries(
    {},
    optional={
        "id": anything,
        "inputs": st.lists(random_inputs, max_size=2) | anything,
        "outputs": st.lists(st.fixed_dictionaries({"name": st.just("logits") | anything, "parameters": anything})),
        "parameters": anything,
    },
)


@given(random_requests, lengths, st.binary(max_size=80))
def test_random_json(fields: dict[str, Any], header_length: int | None, more: bytes) -> None:
    header = json.dumps(fields).encode()
    check_parses_or_refuses(header, header_length)
    check_parses_or_refuses(header + more, len(header))


# Encoded images


def bytes_input(*images: bytes, **fields: Any) -> dict[str, Any]:
    data = [base64.b64encode(image).decode() for image in images]
    entry = {"name": "input", "shape": [len(images)], "datatype": "BYTES", "data": data} | fields
    return {name: value for name, value in entry.items() if value is not None}


def binary_images(*images: bytes, **fields: Any) -> tuple[bytes, int]:
    tensor = InferInput("input", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, object))
    raw = tensor._get_binary_data()
    entry = bytes_input(*images, data=None, parameters={"binary_data_size": len(raw)}, **fields)
    header = request(entry)
    return header + raw, len(header)


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=MAX_IMAGES))
def test_image_files_are_the_elements_of_a_bytes_tensor(images: list[bytes]) -> None:
    count = len(images)
    assert parse(*binary_images(*images)).tensor == images
    assert parse(*binary_images(*images, shape=[count, 1]), EMBEDDED).tensor == images
    assert parse(request(bytes_input(*images))).tensor == images
    nested = [[text] for text in bytes_input(*images)["data"]]
    assert parse(request(bytes_input(*images, shape=[count, 1], data=nested)), spec=EMBEDDED).tensor == images


def test_a_bytes_tensor_in_json_takes_data_urls() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"image").decode()
    assert parse(request(bytes_input(b"", data=[url]))).tensor == [b"image"]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (bytes_input(b"x", shape=[2]), "the data has 1 strings and the shape is [2]: send 2 images in base64"),
        (bytes_input(b"x", data=["not base64!"]), "element 0 is not base64"),
        (bytes_input(b"x", data=[""]), "element 0 is empty"),
        (bytes_input(b"x", data=[7]), "Expected `str`"),
        (bytes_input(shape=[0]), "the input is BYTES [0]: the model takes FP32"),
        (bytes_input(b"x", shape=[1, 2]), "the input is BYTES [1, 2]"),
        (bytes_input(b"x", shape=[]), "the input is BYTES []"),
        (bytes_input(*[b"x"] * 5), "5 images in one request: send at most 4"),
    ],
)
def test_invalid_bytes_tensors_are_refused(entry: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=re.escape(problem)):
        parse(request(entry))


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "the binary data has 0 elements and the shape is [2]: send 2 image files"),
        (b"\x01\0\0\0x", "the binary data has 1 elements"),
        (b"\x01\0\0\0x\x02\0\0\0x", "element 1 has 2 bytes and 1 follow its length"),
        (b"\x01\0\0\0x\xff\xff\xff\xffx", "element 1 has 4294967295 bytes and 1 follow"),
        (b"\x01\0\0\0x\x01\0", "element 1 has 0 bytes and 0 follow its length"),
        (b"\x01\0\0\0x" * 3, "the binary data has more than 2 elements"),
    ],
)
def test_elements_that_do_not_match_their_lengths_are_refused(raw: bytes, problem: str) -> None:
    header = request(bytes_input(b"", b"", data=None, parameters={"binary_data_size": len(raw)}))
    with pytest.raises(RequestError, match=re.escape(problem)):
        parse(header + raw, len(header))


@given(st.binary(max_size=64), st.integers(1, MAX_IMAGES))
@example(b"\0" * 8, 2)
def test_any_binary_elements_are_parsed_or_refused(raw: bytes, count: int) -> None:
    header = request(bytes_input(*[b""] * count, data=None, parameters={"binary_data_size": len(raw)}))
    try:
        images = parse(header + raw, len(header)).tensor
    except RequestError as error:
        assert error.status == HTTPStatus.BAD_REQUEST
    else:
        assert isinstance(images, list)
        assert b"".join(len(image).to_bytes(4, "little") + image for image in images) == raw
