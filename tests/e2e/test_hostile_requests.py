"""Ten thousand invalid requests to a running server: it rejects each with a reason, and continues to serve.

No response has a server error other than 503 and 504, no request hangs, no worker exits or logs an exception, and
after every thousand requests the server predicts the right label.
"""

import base64
import gzip
import json
import random
import re
import socket
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.support.asgi_client import encode_image
from tests.support.color_model import SPEC, write_onnx
from tests.support.hostile_images import bombs, corrupted, truncated
from tests.support.server_process import ServerProcess, encode_request, run_server, wait_until
from tests.support.unharmed_server import memory, unharmed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform == "win32", reason="a worker is a POSIX process"),
]

API_REQUESTS, TENSORS, COMPRESSED, IMAGES, NOT_HTTP = 3_400, 3_300, 600, 2_500, 1_000
TIMEOUT_S = 20.0
"""Twice the deadline of the server."""

GOOD = encode_image(Image.new("RGB", (9, 7), "red"), "PNG")
INFER = "/v2/models/colors/infer"


class Target:
    """Sends requests to the server and counts the statuses of its responses."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.statuses: Counter[str] = Counter()

    def send(self, data: bytes, half_close: bool = False) -> list[int]:
        """Send bytes over a new connection, and return the statuses of all responses."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=TIMEOUT_S) as client:
            try:
                client.sendall(data)
                if half_close:
                    client.shutdown(socket.SHUT_WR)
                received = b""
                while part := client.recv(1 << 16):
                    received += part
            except (ConnectionResetError, BrokenPipeError):
                pass
        statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", received, re.MULTILINE)]
        for status in statuses or [0]:
            self.count(status)
        return statuses

    def request(self, method: str, path: str, body: bytes, **headers: str) -> int:
        """Send one request over a new connection, and return the status of its response."""
        statuses = self.send(encode_request(method, path, body, connection="close", **headers))
        assert len(statuses) == 1
        return statuses[0]

    def count(self, status: int) -> None:
        assert status < 500 or status in (503, 504), status
        self.statuses[str(status or "closed")] += 1
        if self.statuses.total() % 1000 == 0:
            self.check_prediction()

    def check_prediction(self) -> None:
        response = self.server.request("POST", "/v1/predict", GOOD, content_type="image/png")
        assert response.status == 200, response.body
        assert response.json["predictions"][0]["label"] == "red"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("hostile")
    model = write_onnx(directory / "colors.onnx")
    with run_server(directory / "server", model, "--workers", "1", "--device", "cpu", "--max-body-mb", "4") as server:
        yield server


@pytest.fixture
def target(server: ServerProcess) -> Iterator[Target]:
    """The server; afterwards the same worker must be running, and have logged no errors."""
    target = Target(server)
    with unharmed(server):
        yield target
        target.check_prediction()
    print(dict(sorted(target.statuses.items())), f"{memory(server.workers()):.0f} MiB")  # noqa: T201 - shown by pytest -s


def examples(count: int) -> Any:
    """Return settings that generate the same examples every time."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def test_requests_generated_from_the_openapi_document(target: Target) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{target.server.port}/openapi.json")
    results = list(schema.get_all_operations())
    operations = [result.ok() for result in results if isinstance(result, Ok)]
    assert len(operations) == len(results)
    with_body = [operation for operation in operations if operation.method == "post"]
    counts = {operation.label: 100 for operation in operations} | {operation.label: 160 for operation in with_body}
    for operation in operations:
        for mode in GenerationMode:
            fixed: dict[str, Any] = {}
            if operation.path == "/v2/models/{model}/infer":
                fixed["path_parameters"] = {"model": "colors"}
            send_cases(target, operation.as_strategy(generation_mode=mode, **fixed), counts[operation.label])
    assert target.statuses.total() >= API_REQUESTS


def send_cases(target: Target, cases: Any, count: int) -> None:
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]

    @examples(count)
    @given(case=cases)
    def run(case: Any) -> None:
        response = case.call(timeout=TIMEOUT_S)
        target.count(response.status_code)
        if response.status_code not in (503, 504):
            case.validate_response(response, checks=checks)

    with suppress(Unsatisfiable):  # an operation without parameters has no invalid requests
        run()


numbers = st.one_of(st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=5))
shapes = st.lists(st.one_of(st.integers(0, 7), st.integers()), max_size=6)
any_json = st.recursive(
    numbers, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
)


def element(image: bytes) -> bytes:
    """Return an image file as the element of a BYTES tensor."""
    return len(image).to_bytes(4, "little") + image


@st.composite
def tensor_bodies(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """Generate a body with binary tensor data and its header length, with or without errors."""
    valid = st.sampled_from(
        [
            ("FP32", [1, 3, 4, 6], bytes(288)),
            ("UINT8", [2, 4, 6, 3], bytes(144)),
            ("BYTES", [1], element(GOOD)),
            ("BYTES", [2, 1], element(GOOD) + element(GOOD[:40])),
        ]
    )
    invalid = st.tuples(st.sampled_from(["FP32", "UINT8", "FP16", "BYTES", ""]), shapes, st.binary(max_size=300))
    datatype, shape, raw = draw(st.one_of(valid, valid, invalid, st.just(("FP32", [1, 3, 4, 6], b"\0\0\xc0\x7f" * 72))))
    size = draw(st.one_of(st.just(len(raw)), st.just(len(raw)), st.integers(-2, 2**65)))
    entry: dict[str, Any] = {"name": "input", "datatype": datatype, "shape": shape}
    entry["parameters"] = {"binary_data_size": size}
    document: dict[str, Any] = {"inputs": [entry] * draw(st.sampled_from([1, 1, 1, 0, 2]))}
    for field in draw(st.lists(st.sampled_from(["id", "outputs", "parameters", "inputs", "other"]), max_size=2)):
        document[field] = draw(any_json)
    for field in draw(st.lists(st.sampled_from(["name", "shape", "data", "parameters", "datatype"]), max_size=1)):
        entry[field] = draw(any_json)
    header = json.dumps(document).encode()
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(header)))
        header = header[:place] + draw(st.binary(max_size=3)) + header[place + draw(st.integers(0, 3)) :]
    length = draw(
        st.one_of(*[st.just(str(len(header)))] * 3, st.none(), st.integers().map(str), st.text("0123456789abcxe+-. "))
    )
    return header + raw, length


def test_tensors(target: Target) -> None:
    @examples(TENSORS)
    @given(body=tensor_bodies() | st.tuples(st.binary(max_size=200), st.none() | st.integers(0, 220).map(str)))
    def run(body: tuple[bytes, str | None]) -> None:
        data, length = body
        target.request("POST", INFER, data, **({} if length is None else {"inference_header_content_length": length}))

    run()
    # Hypothesis may stop before its last example; fill up with random tensors of the right size.
    rng = random.Random(0)
    head = {
        "inputs": [
            {"name": "input", "datatype": "FP32", "shape": [1, 3, 4, 6], "parameters": {"binary_data_size": 288}}
        ]
    }
    header = json.dumps(head).encode()
    while target.statuses.total() < TENSORS:
        target.request("POST", INFER, header + rng.randbytes(288), inference_header_content_length=str(len(header)))
    assert target.statuses["200"], "some of them are valid"


def test_compressed_bodies(target: Target) -> None:
    tensor = {"name": "input", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(GOOD).decode()]}
    valid = [("/v1/predict", GOOD), (INFER, json.dumps({"inputs": [tensor]}).encode())]
    rng = random.Random(0)
    for number in range(COMPRESSED):
        coding = rng.choice(["gzip", "deflate"])
        path, body = rng.choice(valid)
        data = bytearray((gzip.compress if coding == "gzip" else zlib.compress)(body))
        if number % 3:
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
        sent = data[: rng.randint(1, len(data))] if number % 7 == 6 else data
        status = target.request("POST", path, bytes(sent), content_encoding=coding, accept_encoding="gzip, deflate")
        if not number % 3 and number % 7 != 6:
            assert status == 200
    for coding, bomb in (("gzip", gzip.compress(bytes(1 << 28), 1)), ("deflate", zlib.compress(bytes(1 << 28), 1))):
        assert target.request("POST", INFER, bomb, content_encoding=coding) == 413
    assert target.statuses["400"], "some of them are damaged"


def test_images(target: Target) -> None:
    truncated_images = list(truncated(0))
    for data in truncated_images:
        target.request("POST", "/v1/predict", data)
    rng = random.Random(0)
    for data, kind in ((data, kind) for data in bombs() for kind in ("image/png", "application/octet-stream")):
        target.request("POST", "/v1/predict", data, content_type=kind)
    target.request("POST", "/v1/predict", form(bombs()[-20:]), content_type="multipart/form-data; boundary=b")
    for data in corrupted(0):
        kinds = (
            "image/png",
            "image/svg+xml",
            "multipart/form-data; boundary=b",
            "multipart/form-data",
            "text/plain",
            "",
        )
        kind = rng.choice(kinds)
        body = form([data]) if rng.random() < 0.5 and kind.startswith("multi") else data
        target.request("POST", "/v1/predict", body, **({"content_type": kind} if kind else {}))
        if target.statuses.total() >= IMAGES:
            break
    assert len(truncated_images) > 1000
    assert target.statuses["200"], "some of them can still be decoded"


def form(images: list[bytes]) -> bytes:
    part = b'--b\r\ncontent-disposition: form-data; name="image"; filename="\xff\0.png"\r\n\r\n%b\r\n'
    return b"".join(part % image for image in images) + b"--b--\r\n"


HEADS = [
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999999\r\n\r\nab",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nabc\r\n",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n7fffffffffffffff\r\nabc\r\n",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;"
    + b"e" * 200_000
    + b"\r\nabc\r\n0\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 400_000,
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + b"i" * 200_000 + b"\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 40_000 + b"\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\0b\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\tb\xff\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\n Set-Cookie: b\r\n\r\n",
    b"GET /healthz HTTP/1.1\nHost: x\nX-Request-Id: a\nSet-Cookie: b\n\n",
    b"GET /heal\0thz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v2/models/%ff%fe%00%0d%0aSet-Cookie:x/ready HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v2/models/" + b"%F0%9F%92%A9" * 1000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v2/models/../../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /..%2f..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://elsewhere.example/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://elsewhere.example HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET //healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT elsewhere.example:443 HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"TRACE /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PUT /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
    b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models?" + b"a=b&" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/predict?top_k=" + b"9" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/predict?model=%ff%00&top_k=%e2%80%ae HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET /healthz\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    b"\r\n" * 1000,
    b"\0" * 1000,
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 500,
]


def test_data_that_is_not_http(target: Target) -> None:
    rng = random.Random(0)
    for head in HEADS:
        target.send(head, half_close=True)
    while target.statuses.total() < NOT_HTTP:
        data = bytearray(rng.choice(HEADS)[:2000])
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 2)] = rng.choice(
                [b"\r\n", b"\0", b" ", b":", b"%", b"\xff", rng.randbytes(2)]
            )
        target.send(bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data), half_close=True)


def test_the_model_matches_the_constants() -> None:
    assert SPEC.class_names[0] == "red"
    assert np.prod([1, 3, SPEC.input.height, SPEC.input.width]) * 4 == 288
    assert Path(INFER).parent.name == "colors"


def test_endless_requests_from_clients_that_read_no_response(target: Target) -> None:
    """Only some requests of such a client are read, and its connection is closed."""
    (worker,) = target.server.workers()
    before = memory([worker])
    clients = [socket.create_connection(("127.0.0.1", target.server.port)) for _ in range(20)]
    for client in clients:
        client.setblocking(False)
        with suppress(OSError):
            while True:
                client.send(b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000)
    target.check_prediction()
    assert memory([worker]) < before + 100
    wait_until(lambda: not [entry for entry in worker.net_connections() if entry.status == psutil.CONN_ESTABLISHED])
    for client in clients:
        client.close()
