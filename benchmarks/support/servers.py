"""The servers to compare: `cifarx serve`, and the alternatives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PEERS = "CIFARX_PEERS"
"""Environment variable with the path of the Python interpreter whose environment has the peers installed."""

PACKAGES = (
    "litserve",
    "bentoml",
    "uvicorn",
    "uvloop",
    "httptools",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "pillow",
)
PEER_SCRIPTS = Path(__file__).parents[1] / "peers"
VERSIONS_SCRIPT = """
import importlib.metadata, json, sys
installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
print(json.dumps({name: installed[name] for name in sys.argv[1:] if name in installed}))
"""


class Candidate(NamedTuple):
    """A server to measure.

    Attributes:
        name: of the server.
        settings: its options, for the table.
        command: its command line with `{port}`.
        path: the URL path to post an image to.
        label: returns the label in the JSON response.
    """

    name: str
    settings: str
    command: list[str]
    path: str
    label: Callable[[Any], str]


def versions(python: str) -> dict[str, str]:
    """Return the versions of those `PACKAGES` that are installed for a Python interpreter."""
    ran = subprocess.run([python, "-c", VERSIONS_SCRIPT, *PACKAGES], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(ran.stdout)
    return found


def cifarx_serve(model: Path, *options: str) -> Candidate:
    """Return `cifarx serve` with options; by default, one worker per CPU."""
    chosen = options or ("--workers", "auto")
    command = [str(Path(sys.executable).with_name("cifarx")), "serve", str(model), "--port", "{port}", *chosen]
    return Candidate("cifarx serve", " ".join(chosen), command, "/v1/predict", _cifarx_label)


def _cifarx_label(answer: Any) -> str:
    return str(answer["predictions"][0]["label"])


def bare_asgi(model: Path) -> Candidate:
    """Return one process of uvicorn with uvloop and httptools and a session of one thread (two were slower)."""
    command = [sys.executable, str(PEER_SCRIPTS / "bare_asgi_peer.py"), str(model), "{port}"]
    return Candidate("bare ASGI", "1 process", command, "/", lambda answer: str(answer["label"]))


def litserve(model: Path, python: str) -> list[Candidate]:
    """Return LitServe with the three best settings of thirty: workers, API servers, batch size, timeout, queue."""
    settings = (
        ("--workers", "1", "--api-servers", "1", "--max-batch", "16", "--batch-timeout-ms", "0.3", "--fast-queue"),
        ("--workers", "1", "--api-servers", "2", "--max-batch", "16", "--batch-timeout-ms", "1"),
        ("--workers", "2", "--api-servers", "2", "--max-batch", "64", "--batch-timeout-ms", "1"),
    )
    return [
        Candidate(
            "LitServe",
            " ".join(options),
            [python, str(PEER_SCRIPTS / "litserve_peer.py"), str(model), "{port}", *options],
            "/predict",
            lambda answer: str(answer["label"]),
        )
        for options in settings
    ]


def bentoml(model: Path, python: str) -> Candidate:
    """Return BentoML with adaptive batching and one worker per CPU."""
    options = ["--workers", "2", "--max-batch", "16", "--max-latency-ms", "5000"]
    command = [python, str(PEER_SCRIPTS / "bentoml_peer.py"), str(model), "{port}", *options]
    return Candidate("BentoML", " ".join(options), command, "/classify", lambda answer: str(answer[0]["label"]))


def peers(model: Path) -> tuple[list[Candidate], str]:
    """Return the peers that can run here, and why the others cannot (empty if all can)."""
    found = [bare_asgi(model)]
    python = os.environ.get(PEERS)
    if not python:
        return found, f"LitServe and BentoML are not measured: {PEERS} is not set"
    installed = versions(python)
    if "litserve" in installed:
        found += litserve(model, python)
    if "bentoml" in installed:
        found.append(bentoml(model, python))
    absent = [name for name in ("litserve", "bentoml") if name not in installed]
    return found, f"{' and '.join(absent)} not installed for {python}" if absent else ""
