"""Generate load from another process: with `wrk` if it is installed, else with `http_client.py`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

WRK = shutil.which("wrk")
HERE = Path(__file__).parent
PATIENCE_S = 60.0
"""Extra time a generator can take beyond its duration."""


class Post(NamedTuple):
    """The request to send."""

    url: str
    body: Path
    headers: dict[str, str]


class Load(NamedTuple):
    """Throughput and latency of a server under load: `bad` responses were not 2xx; `broken` ones never arrived."""

    per_s: float
    p50_ms: float
    p99_ms: float
    bad: int
    broken: int


def generator() -> str:
    """Return the name and version of the load generator."""
    if WRK is None:
        return f"http_client.py, Python {sys.version.split()[0]}"
    said = subprocess.run([WRK, "--version"], capture_output=True, text=True, check=False)  # it exits with status 1
    return " ".join(said.stdout.split()[:2])


def closed_loop(post: Post, connections: int, seconds: int) -> Load:
    """Measure a server whose clients send the next request after each response (closed loop)."""
    if WRK is None:
        return _load(open_loop(post, connections, seconds))
    script = ["-s", str(HERE / "wrk_post.lua"), post.url, "--", str(post.body)]
    script += [text for header in post.headers.items() for text in header]
    found = _last_line([WRK, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", *script], seconds)
    return Load(
        found["requests"] / found["seconds"],
        found["p50_us"] / 1e3,
        found["p99_us"] / 1e3,
        found["bad_status"],
        found["broken"],
    )


def open_loop(post: Post, connections: int, seconds: float, rate: float | None = None) -> dict[str, Any]:
    """Return the JSON of `http_client.py`; with a rate, requests are sent at fixed times (open loop)."""
    command = [sys.executable, str(HERE / "http_client.py"), post.url, str(post.body), json.dumps(post.headers)]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    return _last_line([*command, "--rate", str(rate)] if rate else command, seconds)


def _last_line(command: list[str], seconds: float) -> dict[str, Any]:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds + PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.strip().rpartition("\n")[2])
    return found


def _load(found: dict[str, Any]) -> Load:
    good = found["statuses"].get("200", {"count": 0, "p50_us": float("inf"), "p99_us": float("inf")})
    every = sum(answers["count"] for answers in found["statuses"].values())
    return Load(
        every / found["seconds"], good["p50_us"] / 1e3, good["p99_us"] / 1e3, every - good["count"], found["broken"]
    )
