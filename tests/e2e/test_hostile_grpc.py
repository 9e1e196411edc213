"""Ten thousand invalid gRPC messages to a running server: it refuses each with a reason, and continues to serve.

No answer has the code INTERNAL or UNKNOWN, no call hangs, no worker exits or logs an exception, and after every
thousand messages the server answers a valid request.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from tests.support.color_model import write_onnx
from tests.support.grpc_server import HEALTH, INFERENCE, REFLECTION
from tests.support.hostile_images import bombs, corrupted, truncated
from tests.support.server_process import ServerProcess, run_server
from tests.support.unharmed_server import memory, unharmed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform == "win32", reason="a worker is a POSIX process"),
]

RANDOM_BYTES, MUTATED, GENERATED, STREAMED, IMAGES = 3_000, 2_500, 2_500, 2_000, 600
TIMEOUT_S = 20.0
"""Twice the deadline of the server."""

FORBIDDEN = (StatusCode.INTERNAL, StatusCode.UNKNOWN)

REQUEST_TYPES: dict[str, Any] = {
    f"{INFERENCE}/{method.name}": getattr(service_pb2, method.input_type.name)
    for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
} | {f"{HEALTH}/Check": health_pb2.HealthCheckRequest}

STREAM_TYPES: dict[str, Any] = {
    f"{INFERENCE}/ModelStreamInfer": service_pb2.ModelInferRequest,
    f"{REFLECTION}/ServerReflectionInfo": reflection_pb2.ServerReflectionRequest,
}

INFER = f"{INFERENCE}/ModelInfer"


def good_request(typed: bool = False) -> Any:
    request = service_pb2.ModelInferRequest(model_name="colors", id="good")
    tensor = request.inputs.add(name="input", datatype="UINT8", shape=[1, 4, 6, 3])
    if typed:
        tensor.contents.uint_contents.extend([255, 0, 0] * 24)
    else:
        request.raw_input_contents.append(bytes([255, 0, 0] * 24))
    return request


class Target:
    """Sends messages to the server, and counts the codes of its answers."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.codes: Counter[str] = Counter()
        self.channel = grpc.insecure_channel(server.grpc_address, options=[("grpc.max_send_message_length", -1)])

    def call(self, method: str, message: bytes) -> StatusCode:
        """Send a message without a serializer, and return the code of the answer."""
        try:
            self.channel.unary_unary(method)(message, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            code = error.code()
            assert error.details()
        else:
            code = StatusCode.OK
        self.count(code, f"{method} {message[:200]!r}")
        return code

    def stream(self, method: str, messages: list[bytes]) -> list[bytes]:
        """Send messages in one stream, and return the answers; the stream may end with an error."""
        answers: list[bytes] = []
        code = StatusCode.OK
        try:
            for answer in self.channel.stream_stream(method)(iter(messages), timeout=TIMEOUT_S):
                answers.append(answer)
        except grpc.RpcError as error:
            code = error.code()
        for _ in messages:
            self.count(code, f"{method} {messages[:3]!r}")
        return answers

    def count(self, code: StatusCode, what: str) -> None:
        assert code not in FORBIDDEN, (code, what)
        assert code is not StatusCode.DEADLINE_EXCEEDED, what
        self.codes[code.name] += 1
        if self.codes.total() % 1000 == 0:
            self.check_answer()

    def check_answer(self) -> None:
        answer = self.channel.unary_unary(INFER)(good_request().SerializeToString(), timeout=TIMEOUT_S)
        (raw,) = service_pb2.ModelInferResponse.FromString(answer).raw_output_contents
        np.testing.assert_allclose(np.frombuffer(raw, np.float32), [10, 0, 0], atol=1e-4)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("hostile")
    model = write_onnx(directory / "colors.onnx")
    options = ("--workers", 1, "--device", "cpu", "--max-body-mb", 4, "--grpc-port", 0)
    with run_server(directory / "server", model, *options) as server:
        yield server


@pytest.fixture
def target(server: ServerProcess) -> Iterator[Target]:
    """The server; afterwards the same worker must be running, and have logged no errors."""
    target = Target(server)
    with unharmed(server), target.channel:
        yield target
        target.check_answer()
    print(dict(sorted(target.codes.items())), f"{memory(server.workers()):.0f} MiB")  # noqa: T201 - shown by pytest -s


def generate(count: int, strategy: st.SearchStrategy[Any], send: Callable[[Any], None]) -> None:
    """Call a function with generated examples, the same ones every time."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        send(example)

    run()


def test_random_bytes(target: Target) -> None:
    """To every method, and to methods that do not exist."""
    generator = random.Random(0)
    methods = [*REQUEST_TYPES, *STREAM_TYPES, f"{INFERENCE}/NoSuchMethod", "/no.Such/Service", "/"]
    for _ in range(RANDOM_BYTES):
        target.call(generator.choice(methods), generator.randbytes(generator.choice((0, 1, 2, 5, 20, 100, 5000))))
    assert target.codes["INVALID_ARGUMENT"] > RANDOM_BYTES / 20
    assert target.codes["UNIMPLEMENTED"] > RANDOM_BYTES / 20


def test_mutated_requests(target: Target) -> None:
    """Valid requests of which bytes are changed, removed, repeated or cut off."""
    generator = random.Random(1)
    originals = [good_request(typed).SerializeToString() for typed in (False, True)]
    for _ in range(MUTATED):
        message = bytearray(generator.choice(originals))
        for _ in range(generator.randint(1, 4)):
            position = generator.randrange(len(message))
            match generator.randrange(4):
                case 0:
                    message[position] = generator.randrange(256)
                case 1:
                    del message[position : position + generator.randint(1, 8)]
                case 2:
                    message[position:position] = message[position : position + generator.randint(1, 40)]
                case _:
                    del message[position:]
            if not message:
                break
        target.call(INFER, bytes(message))
    assert target.codes["INVALID_ARGUMENT"] > MUTATED / 2


SIZES = st.sampled_from((-(2**63), -1, 0, 1, 2, 3, 4, 6, 64, 65, 2**31, 2**63 - 1))
SHAPES = st.sampled_from(([1, 4, 6, 3], [1, 3, 4, 6], [1], [1, 1])) | st.lists(SIZES, max_size=6)
NAMES = st.sampled_from(("input", "logits", "colors", "", "é", "x" * 300, "shared_memory_region"))
PARAMETERS: st.SearchStrategy[dict[str, dict[str, Any]]] = st.dictionaries(
    NAMES | st.sampled_from(("classification", "timeout", "triton_enable_empty_final_response", "binary_data")),
    st.sampled_from(({"bool_param": True}, {"int64_param": -1}, {"string_param": "é"}, {"double_param": float("nan")})),
    max_size=2,
)
NUMBERS = {
    "bool_contents": st.booleans(),
    "int_contents": st.integers(-(2**31), 2**31 - 1),
    "int64_contents": st.integers(-(2**63), 2**63 - 1),
    "uint_contents": st.integers(0, 300) | st.integers(0, 2**32 - 1),
    "uint64_contents": st.integers(0, 2**64 - 1),
    "fp32_contents": st.floats(width=32),
    "fp64_contents": st.floats(),
    "bytes_contents": st.binary(max_size=20),
}
DATATYPES = st.sampled_from(("FP32", "UINT8", "BYTES", "FP64", "INT64", "BOOL", "", "fp32"))


@st.composite
def infer_requests(draw: st.DrawFn) -> Any:
    """Draw a message that is an inference request, valid in parts."""
    request = service_pb2.ModelInferRequest(
        model_name=draw(st.sampled_from(("colors",) * 10 + ("shapes", ""))),
        model_version=draw(st.sampled_from(("",) * 10 + ("é", "x" * 300))),
        id=draw(st.text(max_size=10).filter(lambda text: text.isprintable())),
    )
    for _ in range(draw(st.sampled_from((1, 1, 1, 1, 0, 2)))):
        tensor = request.inputs.add(
            name=draw(st.sampled_from(("input", "input", "input", "x"))), datatype=draw(DATATYPES), shape=draw(SHAPES)
        )
        for field in draw(st.lists(st.sampled_from(list(NUMBERS)), max_size=2, unique=True)):
            count = draw(st.sampled_from((0, 1, 2, 71, 72, 73)))
            getattr(tensor.contents, field).extend([draw(NUMBERS[field])] * count)
        add_parameters(tensor.parameters, draw(PARAMETERS))
    for name in draw(st.lists(NAMES, max_size=2)):
        add_parameters(request.outputs.add(name=name).parameters, draw(PARAMETERS))
    add_parameters(request.parameters, draw(PARAMETERS))
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2)))):
        length = draw(st.sampled_from((0, 1, 3, 4, 71, 72, 73, 287, 288, 289)))
        request.raw_input_contents.append(draw(st.sampled_from((b"\x00", b"\xff", b"\x7f"))) * length)
    return request


def add_parameters(parameters: Any, drawn: dict[str, dict[str, Any]]) -> None:
    for name, value in drawn.items():
        for field, content in value.items():
            setattr(parameters[name], field, content)


def test_generated_requests(target: Target) -> None:
    generate(GENERATED, infer_requests(), lambda request: send_request(target, request))
    assert target.codes["INVALID_ARGUMENT"] > GENERATED / 2


def send_request(target: Target, request: Message) -> None:
    target.call(INFER, request.SerializeToString())


def test_streams(target: Target) -> None:
    """Of an inference stream, every message has an answer, in order, whatever came before."""
    generator = random.Random(2)
    batches: list[list[Any]] = []

    def collect(request: Message) -> None:
        if not batches or len(batches[-1]) == 20:
            batches.append([])
        batches[-1].append(request.SerializeToString())

    generate(STREAMED // 2, infer_requests(), collect)
    for batch in batches:
        messages = [part for message in batch for part in (message, generator.randbytes(generator.randrange(50)))]
        answers = target.stream(f"{INFERENCE}/ModelStreamInfer", [*messages, good_request().SerializeToString()])
        assert len(answers) == len(messages) + 1
        last = service_pb2.ModelStreamInferResponse.FromString(answers[-1])
        assert (last.error_message, last.infer_response.id) == ("", "good")
        target.stream(f"{REFLECTION}/ServerReflectionInfo", messages[:5])


def test_images(target: Target) -> None:
    """Files that are no images, or bombs, in BYTES tensors."""
    files = [*bombs(), *islice(truncated(0), IMAGES // 2), *islice(corrupted(1), IMAGES // 2)]
    for file in files:
        request = service_pb2.ModelInferRequest(model_name="colors")
        request.inputs.add(name="input", datatype="BYTES", shape=[1], contents={"bytes_contents": [file]})
        target.call(INFER, request.SerializeToString())


def test_messages_of_the_largest_size(target: Target) -> None:
    """Fields that are small on the wire and large in memory, and messages that are too large."""
    workers = target.server.workers()
    small_fields = [b"\x2a\x00", b"\x32\x00", b"\x3a\x00", b"\x22\x00", b"\x0b\x0c"]
    for field in small_fields:
        assert target.call(INFER, field * (2 << 20)) is StatusCode.INVALID_ARGUMENT
    for typed in ("uint_contents", "int64_contents", "bool_contents"):
        request = good_request()
        getattr(request.inputs[0].contents, typed).extend([0] * (4_000_000))
        assert target.call(INFER, request.SerializeToString()) is StatusCode.INVALID_ARGUMENT
    assert target.call(INFER, bytes(5 << 20)) is StatusCode.RESOURCE_EXHAUSTED
    bomb = target.channel.unary_unary(INFER)
    with pytest.raises(grpc.RpcError) as raised:
        bomb(bytes(1 << 28), timeout=TIMEOUT_S, compression=grpc.Compression.Gzip)
    assert raised.value.code() is StatusCode.RESOURCE_EXHAUSTED
    assert sum(worker.memory_info().rss for worker in workers) < 600 * 2**20
