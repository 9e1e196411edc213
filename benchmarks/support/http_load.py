"""Load on a server from a process of its own: `wrk` where it is installed, else `http_client.py`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

WRK = shutil.which("wrk")
HERE = Path(__file__).parent
PATIENCE_S = 60.0
"""What a generator may take longer than it was told."""


class Post(NamedTuple):
    """One request, always the same."""

    url: str
    body: Path
    headers: dict[str, str]


class Answers(NamedTuple):
    """What a server made of a load. `bad` answers were not 2xx; `broken` ones never came."""

    per_s: float
    p50_ms: float
    p99_ms: float
    bad: int
    broken: int


def generator() -> str:
    """The load generator that is used, with its version."""
    if WRK is None:
        return f"http_client.py, Python {sys.version.split()[0]}"
    said = subprocess.run([WRK, "--version"], capture_output=True, text=True, check=False)  # it ends with 1
    return " ".join(said.stdout.split()[:2])


def answer_by_answer(post: Post, connections: int, seconds: int) -> Answers:
    """Every connection sends its next request once it has its answer."""
    if WRK is None:
        return _answers(open_load(post, connections, seconds))
    script = ["-s", str(HERE / "wrk_post.lua"), post.url, "--", str(post.body)]
    script += [text for header in post.headers.items() for text in header]
    found = _last_line([WRK, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", *script], seconds)
    return Answers(
        found["requests"] / found["seconds"],
        found["p50_us"] / 1e3,
        found["p99_us"] / 1e3,
        found["bad_status"],
        found["broken"],
    )


def open_load(post: Post, connections: int, seconds: float, rate: float | None = None) -> dict[str, Any]:
    """What `http_client.py` prints; with a rate, requests leave at it whatever became of those before."""
    command = [sys.executable, str(HERE / "http_client.py"), post.url, str(post.body), json.dumps(post.headers)]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    return _last_line([*command, "--rate", str(rate)] if rate else command, seconds)


def _last_line(command: list[str], seconds: float) -> dict[str, Any]:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds + PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.strip().rpartition("\n")[2])
    return found


def _answers(found: dict[str, Any]) -> Answers:
    good = found["statuses"].get("200", {"count": 0, "p50_us": float("inf"), "p99_us": float("inf")})
    every = sum(answers["count"] for answers in found["statuses"].values())
    return Answers(
        every / found["seconds"], good["p50_us"] / 1e3, good["p99_us"] / 1e3, every - good["count"], found["broken"]
    )
