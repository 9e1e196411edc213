"""The deployment files for containers, clusters and systemd agree with the server and with each other."""

import configparser
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cifarx_serve.server.inference.decoder_process import BASE_CPU_S
from cifarx_serve.server.settings import Limits

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
GUIDE = ROOT / "docs" / "serving.md"
DOCKERFILES = [ROOT / "serve" / "Dockerfile", ROOT / "serve" / "Dockerfile.gpu"]
UNIT = DEPLOY / "cifarx-serve.service"
PORT = 8000
PROBES = {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
INSTRUCTIONS = {
    *("FROM", "ARG", "ENV", "LABEL", "WORKDIR", "COPY", "RUN", "USER"),
    *("EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
}

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, with its continuation lines joined."""

    name: str
    arguments: str


def instructions(dockerfile: Path) -> list[Instruction]:
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def last(dockerfile: Path, name: str) -> str:
    """Return the arguments of the last instruction of this name, which overrides the earlier ones."""
    return [each.arguments for each in instructions(dockerfile) if each.name == name][-1]


def documents(name: str) -> dict[str, dict[str, Any]]:
    """Return the YAML documents of a file by kind."""
    found = list(yaml.safe_load_all((DEPLOY / name).read_text()))
    by_kind = {document["kind"]: document for document in found}
    assert len(by_kind) == len(found)
    return by_kind


def container(name: str) -> dict[str, Any]:
    if name == "kserve.yaml":
        pod = documents(name)["InferenceService"]["spec"]["predictor"]
    else:
        pod = documents(name)["Deployment"]["spec"]["template"]["spec"]
    (only,) = pod["containers"]
    return dict(only)


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def long_options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


@cache
def serve_options() -> frozenset[str]:
    """Return the options of `cifarx serve`."""
    result = subprocess.run(
        [sys.executable, "-m", "cifarx", "serve", "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return frozenset(long_options(result.stdout))


def commands() -> dict[str, list[str]]:
    """Return the arguments of `cifarx serve` in every file that runs it."""
    command = unit()["Service"]["ExecStart"].split()
    found = {path.name: json.loads(last(path, "CMD")) for path in DOCKERFILES}
    found |= {name: container(name)["args"] for name in ("kubernetes.yaml", "kserve.yaml")}
    return found | {UNIT.name: command[2:]}


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return parser


def test_uses_only_options_of_the_command() -> None:
    for file, arguments in commands().items():
        options = {argument for argument in arguments if argument.startswith("--")}
        assert options <= serve_options(), file


def test_guide_lists_every_option_and_no_others() -> None:
    guide = GUIDE.read_text()
    ours = "\n".join(
        line for line in guide.splitlines() if not re.search(r"\bdocker (build|run|kill)\b|--cap-drop", line)
    )
    others = {"--batch", "--ckpt", "--format", "--sign"}  # of cifarx bench and export
    others |= {"--compressed", "--data-binary", "--unix-socket", "--health-cmd"}  # of curl and docker
    assert long_options(ours) - others <= serve_options()
    listed = long_options(ours) | {"--help"}
    listed |= {name.replace("--no-", "--") for name in listed} | {name.replace("--", "--no-", 1) for name in listed}
    assert serve_options() <= listed


def test_guide_lists_the_default_limits() -> None:
    rows = re.findall(r"^\| `?([^`|]+?)`? \| ([\d]+) ", GUIDE.read_text(), flags=re.MULTILINE)
    limits = Limits()
    expected = {
        "--max-batch": limits.max_batch,
        "--max-delay-us": limits.max_delay_us,
        "--max-queue": limits.max_queue,
        "--load-timeout-s": limits.load_timeout_s,
        "CPU time of one image": BASE_CPU_S,
        "--deadline-ms": limits.deadline_s * 1000,
        "--max-body-mb": limits.max_body_bytes / 2**20,
        "--max-pixels": limits.max_pixels,
        "--max-images": limits.max_images,
        "--max-connections": limits.max_connections,
        "head of a request": limits.header_timeout_s,
        "body of a request": limits.body_timeout_s,
        "idle connection": limits.keep_alive_s,
    }
    assert {name: int(value) for name, value in rows} == expected


def test_guide_links_to_existing_files_and_headings() -> None:
    guide = GUIDE.read_text()
    titles = re.findall(r"^##+ (.+)$", guide, re.MULTILINE)
    headings = {"#" + re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", guide):
        path = target.partition("#")[0]
        assert (GUIDE.parent / path).is_file() if path else target in headings, target


@each_dockerfile
def test_dockerfile_has_valid_instructions_and_existing_sources(dockerfile: Path) -> None:
    assert {name for name, _ in instructions(dockerfile)} <= INSTRUCTIONS
    included = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name, arguments in instructions(dockerfile):
        if name == "COPY" and not arguments.startswith("--from="):
            sources = set(arguments.split()[:-1])
            assert all((ROOT / source).exists() for source in sources)
            assert sources <= included
    assert "constraints.txt" in included


@each_dockerfile
def test_dockerfile_builds_in_two_stages_from_official_images(dockerfile: Path) -> None:
    bases = [arguments.split() for name, arguments in instructions(dockerfile) if name == "FROM"]
    assert bases == [["python:3.12-slim", "AS", "build"], ["python:3.12-slim"]]


@each_dockerfile
def test_image_runs_as_a_user_and_stops_on_sigterm(dockerfile: Path) -> None:
    assert json.loads(last(dockerfile, "ENTRYPOINT")) == ["cifarx", "serve"]
    arguments = json.loads(last(dockerfile, "CMD"))
    assert option(arguments, "--host") == "0.0.0.0"
    assert arguments[-1] == "/models/model.onnx"
    assert last(dockerfile, "USER") == "10001:10001"
    assert last(dockerfile, "EXPOSE") == str(PORT)
    assert last(dockerfile, "STOPSIGNAL") == "SIGTERM"


@each_dockerfile
def test_image_does_not_install_pytorch(dockerfile: Path) -> None:
    installs = [arguments for name, arguments in instructions(dockerfile) if name == "RUN" and "install" in arguments]
    assert installs
    assert not any(re.search(r"torch|\[(train|dev)", command) for command in installs)
    assert any("[cuda]" in command for command in installs) == (dockerfile.suffix == ".gpu")


@contextmanager
def readyz_server(status: int) -> Iterator[int]:
    """Run a server whose /readyz returns this status; yield its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@each_dockerfile
def test_health_check_succeeds_only_if_ready(dockerfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    command = json.loads(last(dockerfile, "HEALTHCHECK").split(" CMD ", maxsplit=1)[-1].removeprefix("CMD "))
    assert command[:2] == ["python", "-c"]
    for status, healthy in ((200, True), (503, False)):
        with readyz_server(status) as port:
            code = command[2].replace(f":{PORT}/", f":{port}/")
            result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert (result.returncode == 0) == healthy


def test_kubernetes_selectors_match_the_labels() -> None:
    found = documents("kubernetes.yaml")
    deployment = found["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels
    spread = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert all(constraint["labelSelector"]["matchLabels"] == labels for constraint in spread)
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}


def test_kubernetes_autoscaler_sets_the_replicas_and_has_a_cpu_request() -> None:
    found = documents("kubernetes.yaml")
    assert "replicas" not in found["Deployment"]["spec"]
    assert found["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > 1
    assert container("kubernetes.yaml")["resources"]["requests"]["cpu"]


@pytest.mark.parametrize("file", ["kubernetes.yaml", "kserve.yaml"])
def test_ports_probes_and_user(file: str) -> None:
    serving = container(file)
    (port,) = serving["ports"]
    assert port["containerPort"] == PORT == int(option(serving["args"], "--port"))
    assert option(serving["args"], "--host") == "0.0.0.0"
    probes = {name: probe["httpGet"] for name, probe in serving.items() if name.endswith("Probe")}
    assert {"readinessProbe", "livenessProbe"} <= probes.keys()
    for probe in probes.values():
        assert probe["path"] in PROBES
        assert probe["port"] in {PORT, port.get("name", PORT)}
    assert not re.search("ready", probes["livenessProbe"]["path"])
    assert serving["securityContext"]["readOnlyRootFilesystem"]
    assert serving["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"name": "tmp", "mountPath": "/tmp"} in serving["volumeMounts"]
    assert serving["resources"]["requests"]["cpu"] == serving["resources"]["limits"]["cpu"]


def test_kubernetes_user_and_port_match_the_image() -> None:
    found = documents("kubernetes.yaml")
    pod = found["Deployment"]["spec"]["template"]
    context = pod["spec"]["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == last(DOCKERFILES[0], "USER")
    assert [port["targetPort"] for port in found["Service"]["spec"]["ports"]] == ["http"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(PORT)


def test_kubernetes_leaves_time_to_drain() -> None:
    pod = documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]
    (served,) = pod["containers"]
    sleep = served["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep[0] == "sleep"
    deadline = int(option(served["args"], "--deadline-ms")) / 1000
    assert pod["terminationGracePeriodSeconds"] > int(sleep[1]) + deadline


def test_kubernetes_mounts_every_volume() -> None:
    for pod in (
        documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"],
        documents("kserve.yaml")["InferenceService"]["spec"]["predictor"],
    ):
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes


@pytest.mark.parametrize("version", ["1.25", "1.30", "1.34"])
def test_kubernetes_accepts_every_field(version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in documents("kubernetes.yaml").values():
        schemas.validate(document, version, strict=True)


def test_kserve_custom_predictor() -> None:
    service = documents("kserve.yaml")["InferenceService"]
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    served = container("kserve.yaml")
    assert served["name"] == "kserve-container"  # the name that KServe requires of the predictor
    environment = {variable["name"]: variable["value"] for variable in served["env"]}
    assert environment["PROTOCOL"] == "v2"
    assert "CHANGE-ME" in environment["STORAGE_URI"]
    assert Path(served["args"][-1]).parent == Path("/mnt/models")
    assert service["spec"]["predictor"]["timeout"] > int(option(served["args"], "--deadline-ms")) / 1000


def test_unit_reloads_drains_and_restarts() -> None:
    service = unit()["Service"]
    command = service["ExecStart"].split()
    assert Path(command[0]).name == "cifarx"
    assert command[1] == "serve"
    assert option(command, "--host") == "127.0.0.1"
    assert option(command, "--port") == str(PORT)
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > int(option(command, "--deadline-ms")) / 1000
    assert service["Restart"] == "on-failure"
    assert int(service["LimitNOFILE"]) > Limits().max_connections
    assert service["DynamicUser"] == "yes"
    assert not service["CapabilityBoundingSet"]


def systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    # systemd requires an executable that exists, and nothing is installed at the path of the unit here.
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("=/opt/cifarx/bin/cifarx ", f"={Path(sys.executable).resolve()} "))
    result = systemd_analyze("verify", "--man=no", str(copy))
    assert (result.returncode, result.stderr.strip()) == (0, "")


def test_systemd_rates_the_unit_as_confined() -> None:
    result = systemd_analyze("security", "--offline=yes", "--no-pager", "--threshold=20", str(UNIT))
    if "unrecognized option" in result.stderr:
        pytest.skip("systemd before 250 cannot analyze a unit that is not loaded")
    assert result.returncode == 0, result.stdout
