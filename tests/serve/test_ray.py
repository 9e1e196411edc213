"""The application for Ray Serve, on a local Ray cluster that the tests start and stop."""

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml
from PIL import Image

from tests.support.color_model import write_onnx
from tests.support.free_port import free_port

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docs" / "deploy" / "ray-serve.yaml"
PROGRAMS = Path(sys.executable).parent
START_S = 90

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='no Ray: pip install "cifarx[ray]"')


class Response(NamedTuple):
    """A response of the server."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class RayServer(NamedTuple):
    """Ray Serve with two applications: one from the configuration file at /, one from the environment at /plain."""

    port: int
    directory: Path

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Response:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, names)
            response = connection.getresponse()
            return Response(response.status, response.getheaders(), response.read())
        finally:
            connection.close()


@contextmanager
def run_program(
    command: list[object], environment: dict[str, str], log: Path, stop_signal: signal.Signals
) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent
        )
        try:
            yield
        finally:
            process.send_signal(stop_signal)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ray_processes(directory: str) -> list[psutil.Process]:
    """Return the processes of the Ray cluster with this temporary directory."""
    processes = []
    for process in psutil.process_iter():
        try:
            if any(directory in part for part in process.cmdline()):
                processes.append(process)
        except psutil.Error:  # the process has ended
            continue
    return processes


@contextmanager
def local_ray(log: Path) -> Iterator[dict[str, str]]:
    """Run a Ray cluster with two CPUs and without optional services; yield the environment for its clients."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CIFARX_"))},
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",  # Ray listens on the machine's address, regardless of its options
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:  # short, for the Unix sockets in it
        start = [
            *(PROGRAMS / "ray", "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard", "false"),
            *("--num-cpus", 2, "--object-store-memory", 100_000_000, "--temp-dir", directory, "--port", port),
            *("--min-worker-port", 0, "--max-worker-port", 0, "--ray-client-server-port", free_port()),
        ]
        try:
            with run_program(start, environment, log, signal.SIGTERM):
                yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
            psutil.wait_procs(ray_processes(directory), 20)
        finally:
            remaining = ray_processes(directory)
            for process in remaining:
                process.kill()
        assert not remaining


def wait_started(log: Path) -> None:
    end = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def wait_ready(server: RayServer, path: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            if server.request("GET", path).status == 200:
                return
        except OSError:  # it does not listen yet
            pass
        time.sleep(0.2)
    pytest.fail(log.read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    directory = tmp_path_factory.mktemp("ray")
    server = RayServer(free_port(), directory)
    model = write_onnx(directory / "colors.onnx")
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = server.port
    (application,) = config["applications"]
    application["args"] |= {"files": [str(model)], "max_images": 2}
    application["deployments"][0]["ray_actor_options"]["num_cpus"] = 0.5
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    Image.new("RGB", (30, 20), (10, 200, 30)).save(directory / "green.png")
    (directory / "keys.txt").write_text("open-sesame\n")
    run = [PROGRAMS / "serve", "run"]
    plain = [*run, "--name", "plain", "--route-prefix", "/plain", "cifarx_serve.ray:app", "device=cpu"]
    variables = {"CIFARX_SERVE_FILES": str(model), "CIFARX_SERVE_API_KEY_FILE": str(directory / "keys.txt")}
    logs = {name: directory / f"{name}.log" for name in ("ray", "config", "plain")}
    with local_ray(logs["ray"]) as environment:
        wait_started(logs["ray"])
        with run_program([*run, "config.yaml"], environment, logs["config"], signal.SIGINT):
            wait_ready(server, "/readyz", logs["config"])
            with run_program(plain, {**environment, **variables}, logs["plain"], signal.SIGINT):
                wait_ready(server, "/plain/readyz", logs["plain"])
                yield server


@needs_ray
@pytest.mark.slow
def test_predictions_are_those_of_infer(server: RayServer) -> None:
    image = server.directory / "green.png"
    model = server.directory / "colors.onnx"
    infer: list[str | Path] = [PROGRAMS / "cifarx", "infer", image, "--model", model, "--json"]
    (expected,) = json.loads(subprocess.run(infer, capture_output=True, check=True).stdout)
    response = server.request("POST", "/v1/predict", image.read_bytes(), content_type="image/png", x_request_id="my-id")
    assert response.status == 200
    (prediction,) = response.json["predictions"]
    assert (prediction["label"], prediction["index"]) == (expected["label"], expected["index"]) == ("green", 1)
    assert prediction["score"] == pytest.approx(expected["score"], abs=1e-6)
    assert [value for name, value in response.headers if name.lower() == "x-request-id"] == ["my-id"]


@needs_ray
@pytest.mark.slow
def test_the_api_is_that_of_the_server(server: RayServer) -> None:
    assert server.request("GET", "/readyz").json == {"status": "ready"}
    assert server.request("GET", "/v2/health/ready").status == 200
    metadata = server.request("GET", "/v2/models/colors").json
    assert metadata["inputs"][0]["shape"] == [-1, 3, 4, 6]
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 3, 4, 6], "data": [1.0] * 24 + [0.0] * 48}
    inferred = server.request("POST", "/v2/models/colors/infer", json.dumps({"inputs": [tensor]}).encode()).json
    assert inferred["outputs"][0]["data"] == pytest.approx([10, 0, 0])
    assert b'cifarx_batch_images_count{model="colors"}' in server.request("GET", "/metrics").body
    page = server.request("GET", "/")
    assert page.status == 200
    assert "content-security-policy" in {name.lower() for name, _ in page.headers}


@needs_ray
@pytest.mark.slow
def test_errors_are_those_of_the_server(server: RayServer) -> None:
    invalid = server.request("POST", "/v1/predict", b"no image", content_type="image/png")
    assert invalid.status == 400
    assert "is not an image" in invalid.json["error"]
    assert server.request("GET", "/v1/nowhere").status == 404
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx\r\n'
    many = server.request(
        "POST", "/v1/predict", 3 * part + b"--x--\r\n", content_type="multipart/form-data; boundary=x"
    )
    assert many.status == 413  # `max_images` of the configuration file


@needs_ray
@pytest.mark.slow
def test_an_application_with_a_route_prefix_is_configured_by_the_environment(server: RayServer) -> None:
    assert server.request("GET", "/plain/v1/models").status == 401
    models = server.request("GET", "/plain/v1/models", x_api_key="open-sesame").json["models"]
    assert [(model["name"], model["provider"]) for model in models] == [("colors", "CPUExecutionProvider")]


@pytest.fixture
def ray_python(fresh_python: Callable[..., str]) -> Callable[..., str]:
    """A Python that has imported Ray; warnings of Ray are ignored."""
    start = "import warnings; warnings.simplefilter('ignore'); import cifarx_serve.ray as r\n"
    return lambda code, *arguments: fresh_python(start + code, *arguments)


@needs_ray
@pytest.mark.slow
def test_arguments_override_the_environment(
    ray_python: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFARX_SERVE_FILES", os.pathsep.join(["a.onnx", str(tmp_path / "b.onnx")]))
    monkeypatch.setenv("CIFARX_SERVE_MAX_BATCH", "8")
    monkeypatch.setenv("CIFARX_SERVE_DEADLINE_MS", "1500")
    code = "s = r.app({'max_batch': 16})._bound_deployment.init_args[0]; print(s.files, s.limits)"
    output = ray_python(code)
    assert str({"a": str(tmp_path / "a.onnx"), "b": str(tmp_path / "b.onnx")}) in output
    assert "max_batch=16" in output
    assert "deadline_s=1.5" in output


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "no file to serve: set CIFARX_SERVE_FILES, or pass the argument files"),
        ({"files": "a.onnx", "max_batch": 0}, "$.max_batch"),
        ({"files": "a.onnx", "batch": 1}, "unknown field `batch`"),
        ({"files": ["a.onnx", "a.onnx"]}, "a.onnx is named twice: name each file once"),
    ],
)
def test_invalid_arguments_are_refused(ray_python: Callable[..., str], arguments: dict[str, Any], problem: str) -> None:
    code = "import json, sys\ntry: r.app(json.loads(sys.argv[1]))\nexcept r.UsageError as error: print(error)"
    assert problem in ray_python(code, json.dumps(arguments))


def test_without_ray_the_error_names_the_extra(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\ntry: import cifarx_serve.ray\nexcept Exception as error: print(error)"
    )
    assert fresh_python(code) == 'Ray Serve is not installed: pip install "cifarx[ray]"'
