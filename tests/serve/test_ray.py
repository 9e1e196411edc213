"""Ray Serve: a real Ray on this machine, started and ended here, answers as `cifarx infer` does."""

import importlib.util
import json
import os
import secrets
import signal
import socket
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

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docs" / "deploy" / "ray-serve.yaml"
PROGRAMS = Path(sys.executable).parent
START_S = 90

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='no Ray: pip install "cifarx[ray]"')


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served(NamedTuple):
    """Ray Serve with two applications: of the configuration file at /, of the environment at /plain."""

    port: int
    folder: Path

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, names)
            response = connection.getresponse()
            return Answer(response.status, response.getheaders(), response.read())
        finally:
            connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program(command: list[object], environment: dict[str, str], log: Path, ends_by: signal.Signals) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent
        )
        try:
            yield
        finally:
            process.send_signal(ends_by)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def of_this_ray(folder: str) -> list[psutil.Process]:
    """Every process that was started with this folder for its files."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(folder in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has ended
            continue
    return found


@contextmanager
def local_ray(log: Path) -> Iterator[dict[str, str]]:
    """Ray on two CPUs, without what it does not need; the environment for programs that use it."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CIFARX_"))},
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",  # Ray listens on the machine's address, whatever it is told
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # Unix sockets in it: its name must be short
        start = [
            *(PROGRAMS / "ray", "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard", "false"),
            *("--num-cpus", 2, "--object-store-memory", 100_000_000, "--temp-dir", folder, "--port", port),
            *("--min-worker-port", 0, "--max-worker-port", 0, "--ray-client-server-port", free_port()),
        ]
        try:
            with program(start, environment, log, signal.SIGTERM):
                yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
            psutil.wait_procs(of_this_ray(folder), 20)
        finally:
            left = of_this_ray(folder)
            for process in left:
                process.kill()
        assert not left


def wait_started(log: Path) -> None:
    end = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def wait_ready(served: Served, path: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            if served.ask("GET", path).status == 200:
                return
        except OSError:  # nobody listens yet
            pass
        time.sleep(0.2)
    pytest.fail(log.read_text())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("ray")
    served = Served(free_port(), folder)
    model = write_onnx(folder / "colours.onnx")
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = served.port
    (application,) = config["applications"]
    application["args"] |= {"files": [str(model)], "max_images": 2}
    application["deployments"][0]["ray_actor_options"]["num_cpus"] = 0.5
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    Image.new("RGB", (30, 20), (10, 200, 30)).save(folder / "green.png")
    (folder / "keys.txt").write_text("open-sesame\n")
    run = [PROGRAMS / "serve", "run"]
    plain = [*run, "--name", "plain", "--route-prefix", "/plain", "cifarx_serve.ray:app", "device=cpu"]
    told = {"CIFARX_SERVE_FILES": str(model), "CIFARX_SERVE_API_KEY_FILE": str(folder / "keys.txt")}
    logs = {name: folder / f"{name}.log" for name in ("ray", "config", "plain")}
    with local_ray(logs["ray"]) as environment:
        wait_started(logs["ray"])
        with program([*run, "config.yaml"], environment, logs["config"], signal.SIGINT):
            wait_ready(served, "/readyz", logs["config"])
            with program(plain, {**environment, **told}, logs["plain"], signal.SIGINT):
                wait_ready(served, "/plain/readyz", logs["plain"])
                yield served


@needs_ray
@pytest.mark.slow
def test_replica_answers_as_infer_does(served: Served) -> None:
    image = served.folder / "green.png"
    infer = [PROGRAMS / "cifarx", "infer", image, "--model", served.folder / "colours.onnx", "--json"]
    (expected,) = json.loads(subprocess.run(infer, capture_output=True, check=True).stdout)
    answer = served.ask("POST", "/v1/predict", image.read_bytes(), content_type="image/png", x_request_id="mine")
    assert answer.status == 200
    (prediction,) = answer.json["predictions"]
    assert (prediction["label"], prediction["index"]) == (expected["label"], expected["index"]) == ("green", 1)
    assert prediction["score"] == pytest.approx(expected["score"], abs=1e-6)
    assert [value for name, value in answer.headers if name.lower() == "x-request-id"] == ["mine"]


@needs_ray
@pytest.mark.slow
def test_interface_is_the_server_s(served: Served) -> None:
    assert served.ask("GET", "/readyz").json == {"status": "ready"}
    assert served.ask("GET", "/v2/health/ready").status == 200
    metadata = served.ask("GET", "/v2/models/colours").json
    assert metadata["inputs"][0]["shape"] == [-1, 3, 4, 6]
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 3, 4, 6], "data": [1.0] * 24 + [0.0] * 48}
    inferred = served.ask("POST", "/v2/models/colours/infer", json.dumps({"inputs": [tensor]}).encode()).json
    assert inferred["outputs"][0]["data"] == pytest.approx([10, 0, 0])
    assert b'cifarx_batch_images_count{model="colours"}' in served.ask("GET", "/metrics").body
    page = served.ask("GET", "/")
    assert page.status == 200
    assert "content-security-policy" in {name.lower() for name, _ in page.headers}


@needs_ray
@pytest.mark.slow
def test_errors_are_the_server_s(served: Served) -> None:
    broken = served.ask("POST", "/v1/predict", b"no image", content_type="image/png")
    assert broken.status == 400
    assert "is not an image" in broken.json["error"]
    assert served.ask("GET", "/v1/nowhere").status == 404
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx\r\n'
    many = served.ask("POST", "/v1/predict", 3 * part + b"--x--\r\n", content_type="multipart/form-data; boundary=x")
    assert many.status == 413  # `max_images` of the configuration file


@needs_ray
@pytest.mark.slow
def test_environment_and_arguments_are_told_to_the_replicas_behind_a_prefix(served: Served) -> None:
    assert served.ask("GET", "/plain/v1/models").status == 401
    models = served.ask("GET", "/plain/v1/models", x_api_key="open-sesame").json["models"]
    assert [(model["name"], model["provider"]) for model in models] == [("colours", "CPUExecutionProvider")]


@pytest.fixture
def ray_python(fresh_python: Callable[..., str]) -> Callable[..., str]:
    """A Python that has imported Ray, whose own warnings are not ours."""
    start = "import warnings; warnings.simplefilter('ignore'); import cifarx_serve.ray as r\n"
    return lambda code, *arguments: fresh_python(start + code, *arguments)


@needs_ray
@pytest.mark.slow
def test_arguments_go_before_the_environment(
    ray_python: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFARX_SERVE_FILES", os.pathsep.join(["a.onnx", str(tmp_path / "b.onnx")]))
    monkeypatch.setenv("CIFARX_SERVE_MAX_BATCH", "8")
    monkeypatch.setenv("CIFARX_SERVE_DEADLINE_MS", "1500")
    code = "s = r.app({'max_batch': 16})._bound_deployment.init_args[0]; print(s.files, s.limits)"
    told = ray_python(code)
    assert str({"a": str(tmp_path / "a.onnx"), "b": str(tmp_path / "b.onnx")}) in told
    assert "max_batch=16" in told
    assert "deadline_s=1.5" in told


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "no file to serve: set CIFARX_SERVE_FILES, or give the argument files"),
        ({"files": "a.onnx", "max_batch": 0}, "$.max_batch"),
        ({"files": "a.onnx", "batch": 1}, "unknown field `batch`"),
        ({"files": ["a.onnx", "a.onnx"]}, "a.onnx is named twice: name each file once"),
    ],
)
def test_wrong_arguments_are_told(ray_python: Callable[..., str], arguments: dict[str, Any], problem: str) -> None:
    code = "import json, sys\ntry: r.app(json.loads(sys.argv[1]))\nexcept r.UsageError as error: print(error)"
    assert problem in ray_python(code, json.dumps(arguments))


def test_without_ray_the_extra_is_named(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\ntry: import cifarx_serve.ray\nexcept Exception as error: print(error)"
    )
    assert fresh_python(code) == 'Ray Serve is not installed: pip install "cifarx[ray]"'
