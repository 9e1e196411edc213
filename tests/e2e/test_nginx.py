"""The server behind nginx: the configuration in docs/serving.md, in front of a port and of a Unix socket."""

import http.client
import json
import queue
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.asgi_client import encode_image
from tests.support.browser import Browser, open_browser
from tests.support.certificates import client_ssl_context, create_certificate
from tests.support.color_model import write_onnx
from tests.support.free_port import free_port
from tests.support.nginx_process import run_nginx
from tests.support.server_process import ServerProcess, run_server, wait_until

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"
CLIENT, SPOOFED = "127.0.0.2", "203.0.113.9"
MIB = 2**20


class Proxied(NamedTuple):
    """A server behind nginx."""

    server: ServerProcess
    port: int
    context: ssl.SSLContext

    def connect(self) -> http.client.HTTPSConnection:
        """Connect to nginx from the address `CLIENT`."""
        return http.client.HTTPSConnection(
            "localhost", self.port, context=self.context, source_address=(CLIENT, 0), timeout=60
        )

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Send a request over a new connection; `_` in the name of a header stands for `-`."""
        with closing(self.connect()) as connection:
            return send(connection, method, path, body, **headers)

    def records(self) -> list[Any]:
        """Return the records of the access log, of which there must be some."""
        wait_until(lambda: self.server.out)
        return [json.loads(line) for line in self.server.out.splitlines()]


Start: TypeAlias = Callable[..., Proxied]


def send(
    connection: http.client.HTTPSConnection, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, bytes]:
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response.status, response.read()


def documented_configuration(grpc: bool) -> str:
    """Return the configuration in the guide, with that for gRPC inside of it."""
    server, location = re.findall(r"```nginx\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    end = server.rindex("}")
    return f"{server[:end]}{location}}}" if grpc else str(server)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server and nginx before it: `start(*options, edit={…}, uds=False)`; `edit` replaces text."""
    certificate, key = create_certificate(tmp_path)
    model = write_onnx(tmp_path / "colors.onnx")
    with ExitStack() as stack:

        def start(*options: object, edit: dict[str, str] | None = None, uds: bool = False) -> Proxied:
            if uds:
                options = (*options, "--uds", tmp_path / "cifarx.sock")
            server = stack.enter_context(run_server(tmp_path / "server", model, "--workers", 1, *options))
            port, grpc = free_port(), "--grpc-port" in options
            configuration = documented_configuration(grpc)
            edits = {
                "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
                "/etc/ssl/certs/example.org.pem": str(certificate),
                "/etc/ssl/private/example.org.key": str(key),
                "server 127.0.0.1:8000": f"server unix:{server.uds}" if uds else f"server 127.0.0.1:{server.port}",
                **({"grpc://127.0.0.1:8001": f"grpc://{server.grpc_address}"} if grpc else {}),
                **(edit or {}),
            }
            for old, new in edits.items():
                assert old in configuration
                configuration = configuration.replace(old, new)
            stack.enter_context(run_nginx(tmp_path / "nginx", port, configuration))
            return Proxied(server, port, client_ssl_context(certificate))

        yield start


@pytest.mark.parametrize("uds", [False, True])
def test_the_documented_configuration(start: Start, uds: bool) -> None:
    proxied = start("--trusted-proxy", "unix" if uds else "127.0.0.1", "--max-body-mb", 2, uds=uds)
    image = encode_image(Image.new("RGB", (6, 4), "red"))
    status, body = proxied.request(
        "POST", "/classify/v1/predict", image, Content_Type="image/png", X_Forwarded_For=SPOOFED
    )
    assert status == 200
    assert json.loads(body)["predictions"][0]["label"] == "red"
    [record] = proxied.records()
    assert (record["client"], record["path"], len(record["id"])) == (CLIENT, "/v1/predict", 32)

    assert proxied.request("GET", "/classify/metrics")[0] == 404
    assert json.loads(proxied.request("GET", "/classify/openapi.json")[1])["servers"] == [{"url": "/classify"}]
    assert proxied.request("GET", "/classify/openapi.json", X_Forwarded_Prefix="/spoofed")[1].count(b"spoofed") == 0
    assert proxied.request("GET", "/classify")[0] == 301

    noise = Image.effect_noise((1400, 1400), 200)
    large = encode_image(noise)
    assert MIB < len(large) < 2 * MIB
    assert proxied.request("POST", "/classify/v1/predict", large, Content_Type="image/png")[0] == 200
    status, body = proxied.request("POST", "/classify/v1/predict", bytes(3 * MIB), Content_Type="image/png")
    assert status == 413
    assert json.loads(body)["error"].startswith("the body of 3,145,728 bytes is over the limit of 2,097,152 bytes")


def test_connections_are_kept_alive_on_both_sides(start: Start) -> None:
    proxied = start("--trusted-proxy", "127.0.0.1")
    [worker] = proxied.server.workers()
    with closing(proxied.connect()) as connection:
        local = None
        for _ in range(10):
            assert send(connection, "GET", "/classify/readyz")[0] == 200
            assert connection.sock is not None
            assert local in (None, connection.sock.getsockname())
            local = connection.sock.getsockname()
        established = [each for each in worker.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
        assert len(established) == 1


def test_headers_of_clients_prove_nothing_without_a_trusted_proxy(start: Start) -> None:
    proxied = start()
    assert proxied.request("GET", "/classify/readyz", X_Forwarded_For=SPOOFED)[0] == 200
    assert proxied.records()[0]["client"] == "127.0.0.1"


def test_a_prefix_that_the_proxy_does_not_remove(start: Start) -> None:
    edit = {
        "location /classify/ {": "location /classify {",
        "proxy_pass http://cifarx/;": "proxy_pass http://cifarx;",
        "proxy_set_header X-Forwarded-Prefix /classify;": 'proxy_set_header X-Forwarded-Prefix "";',
    }
    proxied = start("--root-path", "/classify", "--trusted-proxy", "127.0.0.1", edit=edit)
    assert proxied.request("GET", "/classify/readyz")[0] == 200
    assert json.loads(proxied.request("GET", "/classify/openapi.json")[1])["servers"] == [{"url": "/classify"}]
    with closing(proxied.connect()) as connection:
        connection.request("GET", "/classify")
        response = connection.getresponse()
        assert (response.status, response.headers["location"]) == (307, "/classify/")
    assert {record["path"] for record in proxied.records()} == {"/readyz", "/openapi.json", ""}


# gevent, which Triton's HTTP client uses, patches modules of the standard library that are already imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_grpc(start: Start, tmp_path: Path) -> None:
    from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
    from tritonclient.utils import InferenceServerException

    proxied = start("--trusted-proxy", "127.0.0.1", "--grpc-port", 0, "--max-body-mb", 2)
    files = np.array([encode_image(Image.new("RGB", (6, 4), color)) for color in ("red", "lime")], object)
    tensor = InferInput("input", list(files.shape), "BYTES").set_data_from_numpy(files)
    certificate = str(tmp_path / "certificate.pem")
    with InferenceServerClient(f"localhost:{proxied.port}", ssl=True, root_certificates=certificate) as client:
        assert client.is_model_ready("colors")
        for _ in range(5):
            result = client.infer("colors", [tensor], headers={"x-forwarded-for": SPOOFED})
            assert result.as_numpy("logits").argmax(axis=1).tolist() == [0, 1]
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            client.infer("absent", [tensor])
        large = np.array([bytes(3 * MIB)], object)
        with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
            client.infer("colors", [InferInput("input", [1], "BYTES").set_data_from_numpy(large)])
        answers: queue.Queue[tuple[InferResult | None, Exception | None]] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        for _ in range(20):
            client.async_stream_infer("colors", [tensor])
        for _ in range(20):
            result, error = answers.get(timeout=60)
            assert error is None
            assert result is not None
            assert result.as_numpy("logits").argmax(axis=1).tolist() == [0, 1]
        client.stop_stream()
    assert proxied.request("GET", "/classify/readyz")[0] == 200
    wait_until(lambda: len(proxied.records()) >= 29)
    calls = [record for record in proxied.records() if record["method"] == "gRPC" and record["status"] == "OK"]
    assert len(calls) >= 25
    # Triton's client has the trusted address of nginx, so what it says is used.
    assert {record["client"] for record in calls} == {SPOOFED, "127.0.0.1"}


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Browser]:
    with open_browser(tmp_path) as browser:
        yield browser


def test_the_pages_work_under_the_prefix(browse: Browser, start: Start, tmp_path: Path) -> None:
    proxied = start("--trusted-proxy", "127.0.0.1")
    page = browse(f"https://localhost:{proxied.port}/classify")
    page.wait_text("state", "ready")
    Image.new("RGB", (32, 24), (100, 120, 90)).save(tmp_path / "greenish.png")
    page.choose(tmp_path / "greenish.png")
    page.wait_text("best", "green")
    page.driver.find_element("link text", "API documentation").click()
    page.wait(lambda: "/v2/models/{model}/infer" in page.text("openapi"), "the reference is not shown")
    example = f"https://localhost:{proxied.port}/classify/v1/predict?model=colors"
    page.wait(lambda: any(example in code for code in page.texts("pre")), "no prefix in the examples")
    assert any(f'("localhost:{proxied.port}/classify", ssl=True)' in code for code in page.texts("pre"))
    page.driver.find_element("link text", "Try it in your browser").click()
    page.wait_text("state", "ready")
    assert page.driver.current_url == f"https://localhost:{proxied.port}/classify/"


def test_the_page_shows_that_the_proxy_refuses_a_large_image(browse: Browser, start: Start, tmp_path: Path) -> None:
    proxied = start("--trusted-proxy", "127.0.0.1", edit={"client_max_body_size 33m;": ""})
    page = browse(f"https://localhost:{proxied.port}/classify")
    page.wait_text("state", "ready")
    Image.effect_noise((1400, 1400), 200).save(tmp_path / "large.png")
    page.choose(tmp_path / "large.png")
    page.wait(lambda: page.text("error-text"), "no error is shown")
    assert "413" in page.text("error-text")
