"""Counting the fields of a message before it is parsed."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.grpc.wire_format import require_few_fields

LARGE = bytes(70_000)
"""Enough raw data that a message is counted."""


def test_a_request_with_much_data_has_few_fields() -> None:
    request = service_pb2.ModelInferRequest(model_name="colors", id="1", raw_input_contents=[bytes(4_000_000)])
    request.parameters["priority"].int64_param = -1
    tensor = request.inputs.add(name="input", datatype="FP32", shape=[1, 3, 4, 6])
    tensor.contents.fp32_contents.extend([0.5] * 100_000)
    require_few_fields(request.SerializeToString())


@pytest.mark.parametrize("field", ["inputs", "outputs", "raw_input_contents"])
def test_many_small_fields_are_refused(field: str) -> None:
    elements: list[Any] = [b"" if field == "raw_input_contents" else {}] * 50_000
    with pytest.raises(RequestError, match="has more than 4096 fields: send numbers as raw_input_contents, or packed"):
        require_few_fields(service_pb2.ModelInferRequest(**{field: elements}).SerializeToString())


@pytest.mark.parametrize("of_input", [False, True], ids=["request", "input"])
def test_many_parameters_are_refused(of_input: bool) -> None:
    request = service_pb2.ModelInferRequest()
    parameters = request.inputs.add().parameters if of_input else request.parameters
    for number in range(20_000):
        parameters[str(number)].bool_param = True
    with pytest.raises(RequestError, match="has more than 4096 fields"):
        require_few_fields(request.SerializeToString())


def test_a_small_message_is_not_counted() -> None:
    require_few_fields(service_pb2.ModelInferRequest(raw_input_contents=[b""] * 30_000).SerializeToString())


def test_a_group_cannot_hide_what_follows() -> None:
    group = bytes([(1 << 3) | 3, (1 << 3) | 4])
    with pytest.raises(RequestError, match="a field of wire type 3: send it in the encoding of proto3"):
        require_few_fields(group + LARGE)


@given(st.binary(max_size=200))
def test_malformed_messages_are_left_to_the_parser_or_refused(start: bytes) -> None:
    try:
        require_few_fields(start + LARGE)
    except RequestError as error:
        assert error.status == 400
