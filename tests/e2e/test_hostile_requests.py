"""Ten thousand requests that nobody should send, to a real server: it answers each, says why, and goes on.

No answer is an error of the server's but 503 and 504, none is waited for without end, no worker ends or tells of a
defect, and the server gives the right label after every thousand.
"""

import json
import random
import re
import socket
import sys
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
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.support.color_model import SPEC, write_onnx
from tests.support.hostile_images import bombs, cut, damaged, encoded
from tests.support.running_server import Running, request, serving, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform == "win32", reason="a worker is a POSIX process"),
]

DESCRIBED, TENSORS, IMAGES, NO_HTTP = 3_400, 3_300, 2_500, 1_000
PATIENCE_S = 20.0
"""No answer takes so long: the deadline is half of it."""

GOOD = encoded(Image.new("RGB", (9, 7), "red"), "PNG")
INFER = "/v2/models/colours/infer"


class Target:
    """The server, and what it answered."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.answered: Counter[str] = Counter()

    def send(self, data: bytes, ends: bool = False) -> list[int]:
        """The statuses of all that is answered to some bytes on a connection of their own; `ends`: and no more come."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE_S) as client:
            try:
                client.sendall(data)
                if ends:
                    client.shutdown(socket.SHUT_WR)
                answer = b""
                while part := client.recv(1 << 16):
                    answer += part
            except (ConnectionResetError, BrokenPipeError):
                pass
        statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", answer, re.MULTILINE)]
        for status in statuses or [0]:
            self.count(status)
        return statuses

    def ask(self, method: str, path: str, body: bytes, **headers: str) -> int:
        """The status of one whole request."""
        statuses = self.send(request(method, path, body, connection="close", **headers))
        assert len(statuses) == 1
        return statuses[0]

    def count(self, status: int) -> None:
        assert status < 500 or status in (503, 504), status
        self.answered[str(status or "closed")] += 1
        if self.answered.total() % 1000 == 0:
            self.require_good()

    def require_good(self) -> None:
        reply = self.server.ask("POST", "/v1/predict", GOOD, content_type="image/png")
        assert reply.status == 200, reply.body
        assert reply.json["predictions"][0]["label"] == "red"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hostile")
    model = write_onnx(folder / "colours.onnx")
    with serving(folder / "server", model, "--workers", "1", "--device", "cpu", "--max-body-mb", "4") as running:
        yield running


@pytest.fixture
def target(server: Running) -> Iterator[Target]:
    """Afterwards the same worker is there, sound and silent."""
    before = server.workers()
    said, logged = server.err, server.out.count("\n")
    target = Target(server)
    yield target
    target.require_good()
    assert server.workers() == before
    # What libtiff finds wrong with a file it writes there itself.
    assert not re.search("Traceback|[Ee]xception|error|note", server.err.removeprefix(said)), server.err
    *lines, _ = server.out.split("\n")  # the last may be half written
    records = [json.loads(line) for line in lines[logged:]]
    assert not [record for record in records if record.get("cause") == "internal"]
    print(dict(sorted(target.answered.items())), f"{memory(before):.0f} MiB")  # noqa: T201 - shown by pytest -s


def memory(workers: list[psutil.Process]) -> float:
    return float(sum(worker.memory_info().rss for worker in workers) / 2**20)


def examples(count: int) -> Any:
    """The same ones every time."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def test_what_its_own_description_does_not_allow(target: Target) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{target.server.port}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    taking = [operation for operation in operations if operation.method == "post"]
    shares = {operation.label: 100 for operation in operations} | {operation.label: 550 for operation in taking}
    for operation in operations:
        for mode in GenerationMode:
            named = {"path_parameters": {"model": "colours"}} if operation.path == "/v2/models/{model}/infer" else {}
            attack(target, operation.as_strategy(generation_mode=mode, **named), shares[operation.label])
    assert target.answered.total() >= DESCRIBED


def attack(target: Target, cases: Any, count: int) -> None:
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]

    @examples(count)
    @given(case=cases)
    def run(case: Any) -> None:
        response = case.call(timeout=PATIENCE_S)
        target.count(response.status_code)
        if response.status_code not in (503, 504):
            case.validate_response(response, checks=checks)

    with suppress(Unsatisfiable):  # where there is nothing that could be wrong
        run()


numbers = st.one_of(st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=5))
shapes = st.lists(st.one_of(st.integers(0, 7), st.integers()), max_size=6)
anything = st.recursive(
    numbers, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
)


@st.composite
def tensor_bodies(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """A body of the binary protocol, more or less, and its header's length, more or less."""
    sound = st.sampled_from([("FP32", [1, 3, 4, 6], bytes(288)), ("UINT8", [2, 4, 6, 3], bytes(144))])
    wrong = st.tuples(st.sampled_from(["FP32", "UINT8", "FP16", "BYTES", ""]), shapes, st.binary(max_size=300))
    datatype, shape, raw = draw(st.one_of(sound, sound, wrong, st.just(("FP32", [1, 3, 4, 6], b"\0\0\xc0\x7f" * 72))))
    size = draw(st.one_of(st.just(len(raw)), st.just(len(raw)), st.integers(-2, 2**65)))
    entry: dict[str, Any] = {"name": "input", "datatype": datatype, "shape": shape}
    entry["parameters"] = {"binary_data_size": size}
    document: dict[str, Any] = {"inputs": [entry] * draw(st.sampled_from([1, 1, 1, 0, 2]))}
    for field in draw(st.lists(st.sampled_from(["id", "outputs", "parameters", "inputs", "other"]), max_size=2)):
        document[field] = draw(anything)
    for field in draw(st.lists(st.sampled_from(["name", "shape", "data", "parameters", "datatype"]), max_size=1)):
        entry[field] = draw(anything)
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
        target.ask("POST", INFER, data, **({} if length is None else {"inference_header_content_length": length}))

    run()
    # Hypothesis may end before its last example; what it lacks are bytes of the right length.
    rng = random.Random(0)
    head = {
        "inputs": [
            {"name": "input", "datatype": "FP32", "shape": [1, 3, 4, 6], "parameters": {"binary_data_size": 288}}
        ]
    }
    header = json.dumps(head).encode()
    while target.answered.total() < TENSORS:
        target.ask("POST", INFER, header + rng.randbytes(288), inference_header_content_length=str(len(header)))
    assert target.answered["200"], "some of them are sound"


def test_images(target: Target) -> None:
    short = list(cut(0))
    for data in short:
        target.ask("POST", "/v1/predict", data)
    rng = random.Random(0)
    for data, kind in ((data, kind) for data in bombs() for kind in ("image/png", "application/octet-stream")):
        target.ask("POST", "/v1/predict", data, content_type=kind)
    target.ask("POST", "/v1/predict", form(bombs()[-20:]), content_type="multipart/form-data; boundary=b")
    for data in damaged(0):
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
        target.ask("POST", "/v1/predict", body, **({"content_type": kind} if kind else {}))
        if target.answered.total() >= IMAGES:
            break
    assert len(short) > 1000
    assert target.answered["200"], "some of them can still be read"


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


def test_what_is_no_http(target: Target) -> None:
    rng = random.Random(0)
    for head in HEADS:
        target.send(head, ends=True)
    while target.answered.total() < NO_HTTP:
        data = bytearray(rng.choice(HEADS)[:2000])
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 2)] = rng.choice(
                [b"\r\n", b"\0", b" ", b":", b"%", b"\xff", rng.randbytes(2)]
            )
        target.send(bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data), ends=True)


def test_the_names_of_the_model_fit_the_tests() -> None:
    assert SPEC.class_names[0] == "red"
    assert np.prod([1, 3, SPEC.input.height, SPEC.input.width]) * 4 == 288
    assert Path(INFER).parent.name == "colours"


def test_requests_without_end_and_no_answer_read(target: Target) -> None:
    """Of a client that reads nothing no more than some requests are taken, and its connection is not kept."""
    (worker,) = target.server.workers()
    before = memory([worker])
    clients = [socket.create_connection(("127.0.0.1", target.server.port)) for _ in range(20)]
    for client in clients:
        client.setblocking(False)
        with suppress(OSError):
            while True:
                client.send(b"GET /docs HTTP/1.1\r\n\r\n" * 10_000)
    target.require_good()
    assert memory([worker]) < before + 100
    wait_until(lambda: not [held for held in worker.net_connections() if held.status == psutil.CONN_ESTABLISHED])
    for client in clients:
        client.close()
