import contextlib
import importlib.util
import json
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from cifarx_serve.server.inference.model import file_version
from cifarx_serve.server.processes.supervisor import listen
from tests.support.certificates import client_ssl_context, create_certificate
from tests.support.color_model import write_onnx
from tests.support.command_line import Cli
from tests.support.server_process import ServerProcess, encode_request, run_server


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


@contextlib.contextmanager
def one_worker(tmp_path: Path, *arguments: object) -> Iterator[ServerProcess]:
    with run_server(tmp_path / "server", "--workers", 1, *arguments) as server:
        yield server


# Invalid options: one line on standard error and exit status 2, before a process is started.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers '0' is not a number from 1 to 9999: give the number of processes, or auto"),
        (["--workers", "two"], "--workers 'two' is not a number"),
        (["--workers", "-1"], "--workers"),
        (["--port", "70000"], "--port"),
        (["--grpc-port", "70000"], "--grpc-port"),
        (["--max-batch", "0"], "--max-batch"),
        (["--deadline-ms", "0"], "--deadline-ms"),
        (["--device", "abacus"], "abacus"),
        (
            ["--cors-origin", "nonsense"],
            "--cors-origin 'nonsense' is not an origin: give it as https://example.org, without a path",
        ),
        (["--cors-origin", "https://example.org/path"], "without a path"),
        (["--certfile", "missing.pem"], "give both --certfile and --keyfile"),
        (["--keyfile", "missing.pem"], "give both --certfile and --keyfile"),
        (["--certfile", "missing.pem", "--keyfile", "missing.pem"], "missing.pem"),
        (["--api-key-file", "missing.txt"], "missing.txt"),
        (["--api-key-file", "."], "cannot read the API keys"),
        (["--api-key-file", "empty.txt"], "no API key in empty.txt"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--host", "no host"], "cannot listen on no host"),
        (["colors.onnx"], "named twice"),
        (["missing.onnx"], "no such file missing.onnx"),
        (["colors@two=other.onnx"], "'two' in 'colors@two=other.onnx' is not a version: number versions from 1"),
        (["--model-control", "poll"], "--model-control poll without --model-repository: name the directory"),
        (["--model-control", "always"], "--model-control"),
        (["--model-repository", "missing"], "the model repository missing cannot be read"),
        (["--model-repository", "."], "the model repository . has colors too: serve it under another name"),
        (["--shadow", "colors"], "--shadow 'colors' names no file: give it as NAME=FILE"),
        (["--shadow", "shapes=colors.onnx"], "unknown model 'shapes'"),
        (["--shadow", "colors=missing.onnx"], "no such file missing.onnx"),
        (["--shadow", "colors=colors.onnx", "--shadow", "colors=colors.onnx"], "two shadows for colors: give one"),
        (["--shadow-share", "0.5"], "--shadow-share 0.5 without --shadow: name the model"),
        (["--shadow", "colors=colors.onnx", "--shadow-share", "0"], "--shadow-share"),
        (["notes.txt"], "no backend opens notes.txt"),
        (["empty.onnx"], "empty.onnx"),
        (["."], "."),
    ],
)
def test_rejects_invalid_options(cli: Cli, onnx: Path, options: list[str], message: str) -> None:
    for name in ("empty.txt", "empty.onnx", "notes.txt"):
        (onnx.parent / name).touch()
    result = cli("serve", "colors.onnx", "--port", 0, *options)
    assert result.status == 2
    assert message in result.error
    assert result.out == ""


def test_rejects_a_port_in_use(cli: Cli, onnx: Path) -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        result = cli("serve", onnx, "--port", port)
    assert result.status == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in result.error
    assert result.err.count("\n") == 1


def test_rejects_a_port_for_grpc_in_use(cli: Cli, onnx: Path) -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        result = cli("serve", onnx, "--port", 0, "--grpc-port", port)
    assert result.status == 2
    assert f"cannot listen on 127.0.0.1 port {port} for gRPC" in result.error
    assert result.err.count("\n") == 1


def test_names_the_extra_for_grpc(monkeypatch: pytest.MonkeyPatch, cli: Cli, onnx: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "grpc_health" else find_spec(name))
    result = cli("serve", onnx, "--port", 0, "--grpc-port", 0)
    assert result.status == 2
    assert 'needs grpc_health, which is not installed: pip install "cifarx[grpc]"' in result.error


def test_rejects_a_backend_that_cannot_open_the_file(tmp_path: Path, onnx: Path, cli: Cli) -> None:
    """Only the worker finds out; the program reports its error."""
    del tmp_path
    result = cli("serve", onnx, "--port", 0, "--workers", 1, "--backend", "torchscript")
    assert result.status == 2
    assert "does not open" in result.error
    assert result.err.count("\n") == 1


def test_rejects_unknown_image_formats(monkeypatch: pytest.MonkeyPatch, cli: Cli, onnx: Path) -> None:
    """The server does not start, instead of failing at the first image."""
    monkeypatch.setenv("CIFARX_IMAGE_FORMATS", "ICNS,PICTURE")
    result = cli("serve", onnx, "--port", 0, "--workers", 1)
    assert result.status == 2
    assert "CIFARX_IMAGE_FORMATS names 'PICTURE', which cannot be opened: choose from" in result.error
    assert result.err.count("\n") == 1


# Serving


def test_serves_files_under_their_names(tmp_path: Path, onnx: Path) -> None:
    """Standard output has the access log only."""
    other = write_onnx(tmp_path / "other.onnx", order=(2, 1, 0))
    with one_worker(tmp_path, onnx, f"turned={other}") as server:
        assert server.err == f"serving colors, turned on http://127.0.0.1:{server.port} with 1 process\n"
        first, second = server.request("GET", "/v1/models").json["models"]
        assert (first["name"], first["version"]) == ("colors", file_version(str(onnx)))
        assert (second["name"], second["version"]) == ("turned", file_version(str(other)))
        prediction = server.predict().json
        assert (prediction["model"], prediction["version"]) == ("colors", first["version"])
        assert prediction["predictions"][0]["label"] == "red"
        metadata = server.request("GET", "/v2/models/turned", x_request_id="mine")
        assert metadata.json["versions"] == [second["version"]]
        assert metadata.headers["x-request-id"] == "mine"
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.out.splitlines()]
        assert [line["path"] for line in lines] == ["/v1/models", "/v1/predict", "/v2/models/turned"]
        assert lines[2]["id"] == "mine"
        assert server.err.count("\n") == 1


def test_serves_grpc_as_well(tmp_path: Path, onnx: Path) -> None:
    with one_worker(tmp_path, onnx, "--grpc-port", 0) as server:
        url, address = f"http://127.0.0.1:{server.port}", server.grpc_address
        assert server.err == f"serving colors on {url} with 1 process, gRPC on {address}\n"
        with grpc.insecure_channel(address) as channel:
            answer = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60)
            assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING
        assert server.predict().status == 200
        assert server.stop() == 0
        records = [json.loads(line) for line in server.out.splitlines()]
        assert [(record["method"], record["status"]) for record in records] == [("gRPC", "OK"), ("POST", 200)]
        assert server.err.count("\n") == 1


def test_no_access_log(tmp_path: Path, onnx: Path) -> None:
    with one_worker(tmp_path, onnx, "--no-access-log") as server:
        assert server.predict().status == 200
        assert server.stop() == 0
        assert server.out == ""


def test_api_key_file(tmp_path: Path, onnx: Path) -> None:
    (tmp_path / "keys.txt").write_text("# a comment\nfirst-key\n\nsecond-key\n")
    with one_worker(tmp_path, onnx, "--api-key-file", tmp_path / "keys.txt") as server:
        for path in ("/v1/models", "/v2/models/colors", "/metrics"):
            rejected = server.request("GET", path)
            assert rejected.status == HTTPStatus.UNAUTHORIZED
            assert rejected.json["error"] == "missing or invalid API key: send Authorization: Bearer KEY"
            assert server.request("GET", path, x_api_key="third-key").status == HTTPStatus.UNAUTHORIZED
            assert server.request("GET", path, x_api_key="second-key").status == HTTPStatus.OK
            assert server.request("GET", path, authorization="Bearer first-key").status == HTTPStatus.OK
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v2/health/ready"):
            assert server.request("GET", path).status == HTTPStatus.OK
        assert "key" not in server.out + server.err.partition("\n")[2]


def test_limits_and_cors_origin(tmp_path: Path, onnx: Path) -> None:
    options = ("--max-body-mb", 1, "--max-pixels", 10, "--max-images", 1, "--cors-origin", "https://example.org")
    with one_worker(tmp_path, onnx, *options) as server:
        large_body = server.request("POST", "/v1/predict", bytes(2**20 + 1))
        assert "over the limit of 1,048,576 bytes" in large_body.json["error"]
        large_image = server.predict()  # 24 pixels
        assert large_image.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        assert large_image.headers["access-control-allow-origin"] == "https://example.org"


def test_tls(tmp_path: Path, onnx: Path) -> None:
    certificate, key = create_certificate(tmp_path)
    with one_worker(tmp_path, onnx, "--certfile", certificate, "--keyfile", key) as server:
        assert f"on https://127.0.0.1:{server.port} " in server.err
        server.ssl_context = client_ssl_context(certificate)
        assert server.predict().status == HTTPStatus.OK
        with server.connect() as kept:
            kept.send(encode_request("GET", "/healthz") * 2)
            assert [kept.read_response().status for _ in range(2)] == [HTTPStatus.OK] * 2
        assert server.stop() == 0
