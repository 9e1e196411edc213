import contextlib
import json
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

from cifarx_serve.server.inference.model import file_version
from cifarx_serve.server.processes.supervisor import listen
from tests.support.color_model import write_onnx
from tests.support.command_line import Cli
from tests.support.running_server import Running, request, serving
from tests.support.self_signed import self_signed, trusting


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colours.onnx")


@contextlib.contextmanager
def one(tmp_path: Path, *arguments: object) -> Iterator[Running]:
    with serving(tmp_path / "server", "--workers", 1, *arguments) as server:
        yield server


# What cannot be meant: one line, status 2, and nothing started.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0"], "--workers 0: give a number from 1"),
        (["--workers", "two"], "--workers two"),
        (["--workers", "-1"], "--workers"),
        (["--port", "70000"], "--port"),
        (["--max-batch", "0"], "--max-batch"),
        (["--deadline-ms", "0"], "--deadline-ms"),
        (["--device", "abacus"], "abacus"),
        (["--cors-origin", "nonsense"], "--cors-origin 'nonsense' is no origin"),
        (["--cors-origin", "https://example.org/path"], "without a path"),
        (["--certfile", "absent.pem"], "give both --certfile and --keyfile"),
        (["--keyfile", "absent.pem"], "give both --certfile and --keyfile"),
        (["--certfile", "absent.pem", "--keyfile", "absent.pem"], "absent.pem"),
        (["--api-key-file", "absent.txt"], "absent.txt"),
        (["--api-key-file", "."], "cannot read the API keys"),
        (["--api-key-file", "empty.txt"], "no API key in empty.txt"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--host", "no host"], "cannot listen on no host"),
        (["colours.onnx"], "named twice"),
        (["absent.onnx"], "no such file absent.onnx"),
        (["notes.txt"], "no backend opens notes.txt"),
        (["empty.onnx"], "empty.onnx"),
        (["."], "."),
    ],
)
def test_what_cannot_be_meant(cli: Cli, onnx: Path, options: list[str], words: str) -> None:
    for name in ("empty.txt", "empty.onnx", "notes.txt"):
        (onnx.parent / name).touch()
    ran = cli("serve", "colours.onnx", "--port", 0, *options)
    assert ran.status == 2
    assert words in ran.error
    assert ran.out == ""


def test_a_port_that_another_program_has(cli: Cli, onnx: Path) -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        ran = cli("serve", onnx, "--port", port)
    assert ran.status == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in ran.error
    assert ran.err.count("\n") == 1


def test_a_backend_that_does_not_open_the_file(tmp_path: Path, onnx: Path, cli: Cli) -> None:
    """Nobody knows before the worker; its error is the program's."""
    del tmp_path
    ran = cli("serve", onnx, "--port", 0, "--workers", 1, "--backend", "torchscript")
    assert ran.status == 2
    assert "does not open" in ran.error
    assert ran.err.count("\n") == 1


# What it does.


def test_serves_files_by_their_names(tmp_path: Path, onnx: Path) -> None:
    """Results go to standard output, which has the log of requests alone."""
    other = write_onnx(tmp_path / "other.onnx", order=(2, 1, 0))
    with one(tmp_path, onnx, other) as server:
        assert server.err == f"serving colours, other on http://127.0.0.1:{server.port} with 1 process\n"
        first, second = server.ask("GET", "/v1/models").json["models"]
        assert (first["name"], first["version"]) == ("colours", file_version(str(onnx)))
        assert (second["name"], second["version"]) == ("other", file_version(str(other)))
        answer = server.predict().json
        assert (answer["model"], answer["version"]) == ("colours", first["version"])
        assert answer["predictions"][0]["label"] == "red"
        asked = server.ask("GET", "/v2/models/other", x_request_id="mine")
        assert asked.json["versions"] == [second["version"]]
        assert asked.headers["x-request-id"] == "mine"
        assert server.end() == 0
        lines = [json.loads(line) for line in server.out.splitlines()]
        assert [line["path"] for line in lines] == ["/v1/models", "/v1/predict", "/v2/models/other"]
        assert lines[2]["id"] == "mine"
        assert server.err.count("\n") == 1


def test_without_a_log(tmp_path: Path, onnx: Path) -> None:
    with one(tmp_path, onnx, "--no-access-log") as server:
        assert server.predict().status == 200
        assert server.end() == 0
        assert server.out == ""


def test_asks_for_a_key(tmp_path: Path, onnx: Path) -> None:
    (tmp_path / "keys.txt").write_text("# of the tests\nfirst-key\n\nsecond-key\n")
    with one(tmp_path, onnx, "--api-key-file", tmp_path / "keys.txt") as server:
        for path in ("/v1/models", "/v2/models/colours", "/metrics"):
            refused = server.ask("GET", path)
            assert refused.status == HTTPStatus.UNAUTHORIZED
            assert "no API key" in refused.json["error"]
            assert server.ask("GET", path, x_api_key="third-key").status == HTTPStatus.UNAUTHORIZED
            assert server.ask("GET", path, x_api_key="second-key").status == HTTPStatus.OK
            assert server.ask("GET", path, authorization="Bearer first-key").status == HTTPStatus.OK
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v2/health/ready"):
            assert server.ask("GET", path).status == HTTPStatus.OK
        assert "key" not in server.out + server.err.partition("\n")[2]


def test_limits_and_origins_are_passed_on(tmp_path: Path, onnx: Path) -> None:
    options = ("--max-body-mb", 1, "--max-pixels", 10, "--max-images", 1, "--cors-origin", "https://example.org")
    with one(tmp_path, onnx, *options) as server:
        assert "1,048,576" in server.ask("POST", "/v1/predict", bytes(2**20 + 1)).json["error"]
        large = server.predict()  # of 24 pixels
        assert large.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        assert large.headers["access-control-allow-origin"] == "https://example.org"


def test_tls(tmp_path: Path, onnx: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with one(tmp_path, onnx, "--certfile", certificate, "--keyfile", key) as server:
        assert f"on https://127.0.0.1:{server.port} " in server.err
        server.tls = trusting(certificate)
        assert server.predict().status == HTTPStatus.OK
        with server.connect() as kept:
            kept.send(request("GET", "/healthz") * 2)
            assert [kept.answer().status for _ in range(2)] == [HTTPStatus.OK] * 2
        assert server.end() == 0
