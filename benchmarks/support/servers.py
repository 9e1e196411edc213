"""The servers that are measured against each other: ours, and what others would take in its place."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PEERS = "CIFARX_PEERS"
"""The environment variable with the Python of the environment that the peers are installed in."""

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
HERE = Path(__file__).parents[1] / "peers"
VERSIONS_SCRIPT = """
import importlib.metadata, json, sys
installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
print(json.dumps({name: installed[name] for name in sys.argv[1:] if name in installed}))
"""


class Contestant(NamedTuple):
    """A server: its command, which holds {port}; where an image is posted; the label in what it answers."""

    name: str
    settings: str
    command: list[str]
    path: str
    label: Callable[[Any], str]


def versions(python: str) -> dict[str, str]:
    """Of `PACKAGES`, those that a Python has."""
    ran = subprocess.run([python, "-c", VERSIONS_SCRIPT, *PACKAGES], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(ran.stdout)
    return found


def ours(model: Path, *options: str) -> Contestant:
    """`cifarx serve`, one worker a CPU where nothing else is said."""
    told = options or ("--workers", "auto")
    command = [str(Path(sys.executable).with_name("cifarx")), "serve", str(model), "--port", "{port}", *told]
    return Contestant("cifarx serve", " ".join(told), command, "/v1/predict", _our_label)


def _our_label(answer: Any) -> str:
    return str(answer["predictions"][0]["label"])


def bare_asgi(model: Path) -> Contestant:
    """One process of uvicorn with uvloop and httptools, and a session of one thread: two were slower."""
    command = [sys.executable, str(HERE / "bare_asgi_peer.py"), str(model), "{port}"]
    return Contestant("bare ASGI", "1 process", command, "/", lambda answer: str(answer["label"]))


def litserve(model: Path, python: str) -> list[Contestant]:
    """LitServe at the settings that were best of thirty on two CPUs: workers, API servers, batches, waits, queues."""
    settings = (
        ("--workers", "1", "--api-servers", "1", "--max-batch", "16", "--batch-timeout-ms", "0.3", "--fast-queue"),
        ("--workers", "1", "--api-servers", "2", "--max-batch", "16", "--batch-timeout-ms", "1"),
        ("--workers", "2", "--api-servers", "2", "--max-batch", "64", "--batch-timeout-ms", "1"),
    )
    return [
        Contestant(
            "LitServe",
            " ".join(options),
            [python, str(HERE / "litserve_peer.py"), str(model), "{port}", *options],
            "/predict",
            lambda answer: str(answer["label"]),
        )
        for options in settings
    ]


def bentoml(model: Path, python: str) -> Contestant:
    """BentoML with adaptive batching and a worker a CPU."""
    options = ["--workers", "2", "--max-batch", "16", "--max-latency-ms", "5000"]
    command = [python, str(HERE / "bentoml_peer.py"), str(model), "{port}", *options]
    return Contestant("BentoML", " ".join(options), command, "/classify", lambda answer: str(answer[0]["label"]))


def others(model: Path) -> tuple[list[Contestant], str]:
    """The peers that can be run here, and why others cannot: empty where all can."""
    found = [bare_asgi(model)]
    python = os.environ.get(PEERS)
    if not python:
        return found, f"no LitServe and no BentoML: {PEERS} names no Python that has them"
    installed = versions(python)
    if "litserve" in installed:
        found += litserve(model, python)
    if "bentoml" in installed:
        found.append(bentoml(model, python))
    absent = [name for name in ("litserve", "bentoml") if name not in installed]
    return found, f"{python} has no {' and no '.join(absent)}" if absent else ""
