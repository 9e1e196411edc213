"""Inference requests and answers as protobuf messages."""

from typing import Any

import msgspec
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import InferInput, service_pb2

from cifarx_serve.server.api.open_inference import model_metadata
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.grpc.messages import (
    InferRequest,
    infer_response,
    model_metadata_response,
    parse,
    parse_infer,
    stream_error,
    stream_response,
)
from cifarx_serve.server.settings import Limits
from tests.support.color_model import SPEC

LIMITS = Limits(max_images=8)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
BATCH = (PIXELS.transpose(0, 3, 1, 2) / 255).astype(np.float32)
FILES = [b"one", b"", bytes(300)]


def raw_request(array: Any, datatype: str) -> Any:
    """Return a request as Triton's client builds it."""
    tensor = InferInput("input", list(array.shape), datatype).set_data_from_numpy(array)
    request = service_pb2.ModelInferRequest(model_name="colors", id="7", inputs=[tensor._get_tensor()])
    request.raw_input_contents.append(tensor._get_content())
    return request


def typed_request(shape: list[int], datatype: str, **contents: Any) -> Any:
    request = service_pb2.ModelInferRequest(model_name="colors")
    request.inputs.add(name="input", datatype=datatype, shape=shape, contents=contents)
    return request


def refusal(request: Any) -> RequestError:
    with pytest.raises(RequestError) as raised:
        parse_infer(request, SPEC, LIMITS)
    return raised.value


@pytest.mark.parametrize("array", [BATCH, PIXELS], ids=["FP32", "UINT8"])
def test_raw_tensors(array: Any) -> None:
    parsed = parse_infer(raw_request(array, "UINT8" if array.dtype == np.uint8 else "FP32"), SPEC, LIMITS)
    assert parsed.id == "7"
    assert parsed.raw
    assert isinstance(parsed.tensor, np.ndarray)
    assert parsed.tensor.dtype == array.dtype
    np.testing.assert_array_equal(parsed.tensor, array)


def test_typed_tensors() -> None:
    floats = parse_infer(typed_request([2, 3, 4, 6], "FP32", fp32_contents=BATCH.ravel().tolist()), SPEC, LIMITS)
    assert not floats.raw
    assert isinstance(floats.tensor, np.ndarray)
    np.testing.assert_array_equal(floats.tensor, BATCH)
    pixels = parse_infer(typed_request([2, 4, 6, 3], "UINT8", uint_contents=PIXELS.ravel().tolist()), SPEC, LIMITS)
    assert isinstance(pixels.tensor, np.ndarray)
    assert pixels.tensor.dtype == np.uint8
    np.testing.assert_array_equal(pixels.tensor, PIXELS)


@pytest.mark.parametrize("shape", [[3], [3, 1]])
def test_image_files(shape: list[int]) -> None:
    typed = typed_request(shape, "BYTES", bytes_contents=FILES)
    assert parse_infer(typed, SPEC, LIMITS).tensor == FILES
    raw = raw_request(np.array(FILES, object).reshape(shape), "BYTES")
    assert parse_infer(raw, SPEC, LIMITS).tensor == FILES


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (service_pb2.ModelInferRequest(), "the request has 0 inputs: send one, named 'input'"),
        (service_pb2.ModelInferRequest(inputs=[{"name": "x"}]), "unknown input 'x': the model has one input, 'input'"),
        (service_pb2.ModelInferRequest(inputs=[{"name": "input"}] * 2), "the request has 2 inputs: send one, named"),
        (typed_request([1, 3, 4, 6], "FP64"), r"the input is FP64 \[1, 3, 4, 6\]: the model takes FP32 \[N, 3, 4, 6\]"),
        (typed_request([], "FP32"), r"the input is FP32 \[\]: the model takes"),
        (typed_request([-1, 3, 4, 6], "FP32"), r"the input is FP32 \[-1, 3, 4, 6\]: the model takes"),
        (typed_request([1, 3, 4, 6], "FP32"), "has neither contents nor raw_input_contents: send fp32_contents or raw"),
        (typed_request([1, 3, 4, 6], "FP32", fp64_contents=[1]), "has fp64_contents: send fp32_contents or raw"),
        (
            typed_request([1, 3, 4, 6], "FP32", fp32_contents=[1], int_contents=[1]),
            "has int_contents, fp32_contents: send fp32_contents",
        ),
        (typed_request([1, 3, 4, 6], "FP32", fp32_contents=[1]), "fp32_contents has 1 elements and the shape is"),
        (
            typed_request([1, 3, 4, 6], "FP32", fp32_contents=[float("nan")] * 72),
            "is nan: send numbers that are finite",
        ),
        (typed_request([1, 4, 6, 3], "UINT8", uint_contents=[256] * 72), "has 256: send numbers from 0 to 255"),
        (typed_request([2], "BYTES", bytes_contents=[b""]), "bytes_contents has 1 elements and the shape is"),
    ],
)
def test_invalid_requests(request_: Any, message: str) -> None:
    error = refusal(request_)
    assert error.status == 400
    with pytest.raises(RequestError, match=message):
        raise error


def test_raw_data_that_does_not_fit() -> None:
    short = raw_request(BATCH, "FP32")
    short.raw_input_contents[0] = short.raw_input_contents[0][:-1]
    assert "575 bytes of binary data do not match FP32 [2, 3, 4, 6]" in str(refusal(short))
    twice = raw_request(BATCH, "FP32")
    twice.raw_input_contents.append(b"")
    assert "one input, 2 raw_input_contents and 0 fields of contents: send one of either" in str(refusal(twice))
    both = raw_request(BATCH, "FP32")
    both.inputs[0].contents.fp32_contents.append(1)
    assert "1 raw_input_contents and 1 fields of contents" in str(refusal(both))
    cut = raw_request(np.array(FILES, object), "BYTES")
    cut.raw_input_contents[0] = cut.raw_input_contents[0][:-1]
    assert "element 2 has 300 bytes and 299 follow its length" in str(refusal(cut))


def test_too_many_images() -> None:
    error = refusal(typed_request([9, 3, 4, 6], "FP32"))
    assert (error.status, str(error)) == (413, "9 images in one request: send at most 8")
    large = typed_request([2**62, 4, 6, 3], "UINT8")
    assert refusal(large).status == 413


def test_outputs() -> None:
    request = raw_request(BATCH, "FP32")
    request.outputs.add(name="logits")
    assert parse_infer(request, SPEC, LIMITS).raw
    request.outputs.add(name="labels")
    assert "unknown output 'labels': the model has one output, 'logits'" in str(refusal(request))
    for parameter in ("classification", "shared_memory_region"):
        request = raw_request(BATCH, "FP32")
        request.outputs.add(name="logits").parameters[parameter].int64_param = 2
        assert f"output 'logits' has the parameter {parameter}, which is not supported" in str(refusal(request))


def test_an_input_in_shared_memory_is_refused() -> None:
    request = service_pb2.ModelInferRequest()
    tensor = request.inputs.add(name="input", datatype="FP32", shape=[1, 3, 4, 6])
    tensor.parameters["shared_memory_region"].string_param = "region"
    assert "input 'input' has the parameter shared_memory_region, which is not supported" in str(refusal(request))


def test_answers_have_the_form_of_the_request() -> None:
    values = np.array([[1.5, np.nan, -np.inf]], np.float32)
    raw = infer_response(InferRequest("7", BATCH, raw=True), "colors", "1", "logits", values)
    assert (raw.id, raw.model_name, raw.model_version) == ("7", "colors", "1")
    assert [(each.name, each.datatype, list(each.shape)) for each in raw.outputs] == [("logits", "FP32", [1, 3])]
    assert list(raw.raw_output_contents) == [values.tobytes()]
    typed = infer_response(InferRequest("", BATCH, raw=False), "colors", "1", "logits", values)
    assert not typed.raw_output_contents
    np.testing.assert_array_equal(np.array(typed.outputs[0].contents.fp32_contents, np.float32), values[0])


def test_answers_of_streams_are_final() -> None:
    answer = stream_response(service_pb2.ModelInferResponse(id="7"))
    assert answer.infer_response.parameters["triton_final_response"].bool_param
    error = stream_error("8", "wrong: right")
    assert (error.error_message, error.infer_response.id) == ("wrong: right", "8")
    assert error.infer_response.parameters["triton_final_response"].bool_param


def test_metadata() -> None:
    spec = msgspec.structs.replace(SPEC, class_names=("a", "b"))
    message = model_metadata_response(model_metadata("colors", ["1"], "onnx_onnxruntime", spec))
    assert (message.name, list(message.versions), message.platform) == ("colors", ["1"], "onnx_onnxruntime")
    assert [(each.name, each.datatype, list(each.shape)) for each in message.inputs] == [
        ("input", "FP32", [-1, 3, 4, 6])
    ]
    assert [(each.name, each.datatype, list(each.shape)) for each in message.outputs] == [("logits", "FP32", [-1, 2])]


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_refused(raw: bytes) -> None:
    try:
        service_pb2.ModelInferRequest().ParseFromString(raw)
    except DecodeError:
        with pytest.raises(RequestError, match=r"bytes are not a valid inference\.ModelInferRequest") as raised:
            parse(raw, service_pb2.ModelInferRequest)
        assert raised.value.status == 400
    else:
        parse(raw, service_pb2.ModelInferRequest)
