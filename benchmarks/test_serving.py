"""`cifarx serve` compared with other servers and with the bare session, its start-up, and its behavior under overload.

The servers and the load generator share `CORES` CPUs. LitServe and BentoML are installed in another environment:

    python -m venv peers && peers/bin/pip install litserve bentoml onnxruntime pillow uvloop httptools
    CIFARX_PEERS=$PWD/peers/bin/python pytest benchmarks/test_serving.py
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

from benchmarks.support.http_load import Load, Post, closed_loop, generator, open_loop
from benchmarks.support.limits import require
from benchmarks.support.models import Models
from benchmarks.support.server_process import PROJECT, ServerProcess, memory, serving
from benchmarks.support.servers import PEER_SCRIPTS, PEERS, Candidate, cifarx_serve, peers, versions
from cifarx_serve.predictor import load
from cifarx_train.data.selection import select_dataset
from cifarx_train.models.registry import get_architecture

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="setting the CPU affinity needs Linux")

QUIET = ("--workers", "auto", "--no-access-log")
CORES = 2
CONNECTIONS = 16

READY_RESPONSES = 20
"""Number of consecutive good responses, each on a new connection, after which all workers are assumed to be ready."""

ROUNDS = 5
TURN_S = 4
WARM_UP_S = 1
MIN_OVER_LITSERVE = 3.0
MIN_OVER_BARE_ASGI = 1.3

TENSOR_BATCH = 32
TENSOR_QUEUE = 1024
"""More images than all connections send at once; the default queue holds 256."""
MIN_SHARE = 0.60
MIN_SHARE_OF_STEPS = 0.85

STARTS = 5
MAX_START_S = 1.5

SUSTAINED_S = 120
SETTLED_S = 20
"""Memory is measured after this time, when every queue and buffer has been full."""
SAMPLES = 5
OVER_CAPACITY = 1.2
OPEN_CONNECTIONS = 900
"""More than the queues hold, but fewer than the server accepts."""
DEADLINE_S = 1.0
MAX_GROWTH = 0.05


@dataclass
class Rounds:
    """The results of one server, one per round."""

    candidate: Candidate
    results: list[Load] = field(default_factory=list)
    mebibytes: float = 0.0

    def median(self, of: str) -> float:
        """Return the median of a field of `Load`."""
        return float(statistics.median(getattr(result, of) for result in self.results))


@pytest.fixture(scope="module", autouse=True)
def cores() -> Iterator[list[int]]:
    """Pin this process and its children to `CORES` CPUs, so that figures are comparable between machines."""
    before = os.sched_getaffinity(0)
    chosen = sorted(before)[:CORES]
    os.sched_setaffinity(0, chosen)
    yield chosen
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of one synthetic image, 32x32."""
    path = tmp_path_factory.mktemp("picture") / "drawn.png"
    Image.fromarray(select_dataset("builtin").load("test", get_architecture("lzh").input).images[0]).save(path)
    return path


@pytest.fixture(scope="module")
def model(models: Models) -> Path:
    return models.files["onnxruntime"]


@pytest.fixture(scope="module")
def race(
    model: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory, tables: list[Table], notes: list[str]
) -> list[Rounds]:
    """Measure all servers in turns; each is suspended while another is measured.

    The limits apply to `cifarx serve` with its defaults, including the access log. The peers write no log, so it is
    measured without one as well.
    """
    others, absent = peers(model)
    candidates = (cifarx_serve(model), cifarx_serve(model, *QUIET), *others)
    rounds = [Rounds(candidate) for candidate in candidates]
    with load(model, device="cpu") as predictor:
        label = predictor.predict(picture).label
    folder = tmp_path_factory.mktemp("race")
    with ExitStack() as stack:
        servers = [_started(stack, each.candidate, picture, label, folder) for each in rounds]
        for number in range(ROUNDS):
            pairs = list(zip(rounds, servers, strict=True))
            for each, server in pairs if number % 2 == 0 else reversed(pairs):
                _turn(each, server, picture, label)
    tables.append(_race_table(rounds))
    notes.append(_conditions(label, absent))
    return rounds


def _started(stack: ExitStack, candidate: Candidate, picture: Path, label: str, folder: Path) -> ServerProcess:
    """Start a server, wait until it returns the right label, and suspend it."""
    server = stack.enter_context(serving(candidate.command, folder))
    server.wait(lambda server: all(_label(candidate, server, picture) == label for _ in range(READY_RESPONSES)))
    server.pause()
    return server


def _label(candidate: Candidate, server: ServerProcess, picture: Path) -> str | None:
    """Return the label the server predicts for the picture, or None on an error."""
    reply = server.request("POST", candidate.path, picture.read_bytes(), {"Content-Type": "image/png"})
    return candidate.label(reply.json()) if reply.status == 200 else None


def _turn(rounds: Rounds, server: ServerProcess, picture: Path, label: str) -> None:
    """Measure one server; every response must be good, and the label right before and after."""
    candidate = rounds.candidate
    post = Post(server.url + candidate.path, picture, {"Content-Type": "image/png"})
    with _running(server):
        assert _label(candidate, server, picture) == label
        closed_loop(post, CONNECTIONS, WARM_UP_S)
        answers = closed_loop(post, CONNECTIONS, TURN_S)
        assert _label(candidate, server, picture) == label
        rounds.mebibytes = server.memory().pss
    assert (answers.bad, answers.broken) == (0, 0), f"{candidate.name} {candidate.settings}: {server.log()}"
    rounds.results.append(answers)


@contextmanager
def _running(server: ServerProcess) -> Iterator[None]:
    server.resume()
    yield
    server.pause()


def _over(rounds: list[Rounds], peer: Rounds) -> float:
    """Return the requests per second of `cifarx serve` divided by those of a peer, the median over the rounds."""
    pairs = zip(rounds[0].results, peer.results, strict=True)
    return statistics.median(our.per_s / their.per_s for our, their in pairs)


def _race_table(rounds: list[Rounds]) -> Table:
    title = f"one 32x32 PNG per request, {CONNECTIONS} connections; medians of {ROUNDS} rounds of {TURN_S} s, in turns"
    table = Table("server", "settings", "requests/s", "p50 ms", "p99 ms", "cifarx ÷ it", "MiB", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for each in rounds:
        p50, p99 = each.median("p50_ms"), each.median("p99_ms")
        figures = (f"{each.median('per_s'):,.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{_over(rounds, each):.2f}")
        table.add_row(each.candidate.name, each.candidate.settings, *figures, f"{each.mebibytes:,.0f}")
    return table


def _conditions(label: str, absent: str) -> str:
    """Return the conditions of the measurement."""
    cores = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
    lines = [
        f"servers and load generator ({generator()}) share CPUs {cores}; "
        f"every response was 200 with the label {label!r}"
    ]
    for whose, python in (("cifarx and bare ASGI", sys.executable), ("the other peers", os.environ.get(PEERS))):
        if python:
            found = ", ".join(f"{name} {version}" for name, version in versions(python).items())
            lines.append(f"{whose}: {found}")
    return "\n".join([*lines, absent] if absent else lines)


@pytest.mark.timeout(900)
def test_requests_per_s_against_litserve(race: list[Rounds]) -> None:
    """Compare with the best of the settings of LitServe."""
    settings = [each for each in race if each.candidate.name == "LitServe"]
    if not settings:
        pytest.skip(f"{PEERS} is not the Python of an environment with LitServe")
    best = max(settings, key=lambda each: each.median("per_s"))
    ratio, p99, peer_p99 = _over(race, best), race[0].median("p99_ms"), best.median("p99_ms")
    require(ratio >= MIN_OVER_LITSERVE, f"{ratio:.2f} times LitServe's requests/s is under {MIN_OVER_LITSERVE}")
    require(p99 <= peer_p99, f"a p99 of {p99:.1f} ms is over LitServe's {peer_p99:.1f} ms")


@pytest.mark.timeout(900)
def test_requests_per_s_against_one_bare_asgi_process(race: list[Rounds]) -> None:
    (bare,) = [each for each in race if each.candidate.name == "bare ASGI"]
    ratio = _over(race, bare)
    require(ratio >= MIN_OVER_BARE_ASGI, f"{ratio:.2f} times a bare process is under {MIN_OVER_BARE_ASGI}")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Start `cifarx serve` with one worker per CPU."""
    candidate = cifarx_serve(model, *QUIET, "--max-queue", str(TENSOR_QUEUE))
    with serving(candidate.command, tmp_path_factory.mktemp("server")) as started:
        started.wait(_are_ready)
        yield started


def _is_ready(server: ServerProcess) -> bool:
    return server.request("GET", "/readyz").status == 200


def _are_ready(server: ServerProcess) -> bool:
    """Check every worker: any of them can accept a connection."""
    return all(_is_ready(server) for _ in range(READY_RESPONSES))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", [1, TENSOR_BATCH])
def test_tensors_against_the_bare_session(
    batch: int, server: ServerProcess, model: Path, tmp_path: Path, cores: list[int], notes: list[str]
) -> None:
    """Compare binary FP32 tensors over the Open Inference Protocol with `session.run` alone on the same CPUs."""
    images = np.random.default_rng(0).random((batch, 3, 32, 32), np.float32)
    post = _tensor_post(server, model, images, tmp_path)
    expected = _logits(server, post)
    with load(model, device="cpu") as predictor:
        np.testing.assert_allclose(expected, predictor.run(images), rtol=1e-4, atol=1e-4)
    pairs = []
    with _bare_session(model, batch, len(cores)) as bare:
        for _ in range(ROUNDS):
            alone = bare(TURN_S)
            closed_loop(post, CONNECTIONS, WARM_UP_S)
            answers = closed_loop(post, CONNECTIONS, TURN_S)
            assert (answers.bad, answers.broken) == (0, 0), server.log()
            pairs.append((answers.per_s * batch, alone, answers.p99_ms))
    np.testing.assert_allclose(_logits(server, post), expected, rtol=1e-4, atol=1e-4)
    served, alone, p99 = (statistics.median(column) for column in zip(*pairs, strict=True))
    share = statistics.median(ours / bare for ours, bare, _ in pairs)
    limit = f" (at least {MIN_SHARE:.0%})" if batch == TENSOR_BATCH else ""
    notes.append(
        f"binary FP32 tensors of batch {batch}, {CONNECTIONS} connections: {served:,.0f} images/s through the "
        f"server, p99 {p99:.1f} ms; bare session.run in a process alone {alone:,.0f} images/s; share {share:.0%}{limit}"
        f", medians of {ROUNDS} in turns"
    )
    if batch == TENSOR_BATCH:
        require(share >= MIN_SHARE, f"{share:.0%} of the bare session is under {MIN_SHARE:.0%}")


def _tensor_post(server: ServerProcess, model: Path, images: np.ndarray, folder: Path) -> Post:
    """Return a request with binary tensors that asks for binary logits."""
    raw = images.tobytes()
    size = {"binary_data_size": len(raw)}
    tensor = {"name": "input", "datatype": "FP32", "shape": images.shape, "parameters": size}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body = folder / "tensor.bin"
    body.write_bytes(header + raw)
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
    return Post(f"{server.url}/v2/models/{model.stem}/infer", body, headers)


def _logits(server: ServerProcess, post: Post) -> np.ndarray:
    """Send one request and return its logits."""
    reply = server.request("POST", post.url.removeprefix(server.url), post.body.read_bytes(), post.headers)
    assert reply.status == 200, reply.body
    length = int(reply.headers["Inference-Header-Content-Length"])
    (output,) = json.loads(reply.body[:length])["outputs"]
    return np.frombuffer(reply.body[length:], np.float32).reshape(output["shape"])


@contextmanager
def _bare_session(model: Path, batch: int, threads: int) -> Iterator[Callable[[float], float]]:
    """Start a process that runs the bare session; the function takes seconds and returns images per second."""
    program = PEER_SCRIPTS / "bare_session.py"
    command = [sys.executable, str(program), str(model), str(batch), str(threads)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def turn(seconds: float) -> float:
            stdin.write(f"{seconds}\n")
            stdin.flush()
            return float(stdout.readline())

        turn(WARM_UP_S)
        yield turn
        stdin.close()


@pytest.mark.timeout(600)
def test_share_of_what_its_steps_allow(
    model: Path, picture: Path, tmp_path: Path, cores: list[int], notes: list[str]
) -> None:
    """Compare with a server that would cost no more than decoding, the model and an empty request do alone.

    The empty request is answered by a protocol of uvloop and httptools with a constant, under the same load.
    """
    candidate = cifarx_serve(model, *QUIET)
    post = Post("{}" + candidate.path, picture, {"Content-Type": "image/png"})
    served, empty, steps = [], [], []
    with ExitStack() as stack:
        server = stack.enter_context(serving(candidate.command, tmp_path))
        server.wait(_are_ready)
        reply = server.request("POST", candidate.path, picture.read_bytes(), post.headers)
        command = [sys.executable, str(PEER_SCRIPTS / "constant_response_peer.py"), "{port}"]
        peer = stack.enter_context(serving([*command, str(len(cores)), str(len(reply.body))], tmp_path))
        peer.wait(_accepts)
        _per_s(server, post, WARM_UP_S)
        images = _images_per_batch(server)
        for _ in range(ROUNDS):
            served.append(_per_s(server, post, TURN_S))
            empty.append(_per_s(peer, post, TURN_S))
            steps.append(_steps_us(model, picture, images))
    step_us, empty_us = statistics.median(steps), len(cores) * 1e6 / statistics.median(empty)
    allowed = [len(cores) * 1e6 / (us + len(cores) * 1e6 / each) for us, each in zip(steps, empty, strict=True)]
    share = statistics.median(ours / most for ours, most in zip(served, allowed, strict=True))
    notes.append(
        f"one 32x32 PNG per request, {CONNECTIONS} connections, in batches of {images}: "
        f"{statistics.median(served):,.0f} requests/s; decoding and the model take {step_us:.0f} µs per image, an "
        f"empty request {empty_us:.0f} µs with the load generator, which allow {statistics.median(allowed):,.0f}; "
        f"share {share:.0%} (at least {MIN_SHARE_OF_STEPS:.0%}), medians of {ROUNDS} in turns"
    )
    require(share >= MIN_SHARE_OF_STEPS, f"{share:.0%} of what its steps allow is under {MIN_SHARE_OF_STEPS:.0%}")


def _accepts(server: ServerProcess) -> bool:
    return server.request("POST", "/").status == 200


def _per_s(server: ServerProcess, post: Post, seconds: int) -> float:
    """Return the requests per second that a server answers; every response must be good."""
    answers = closed_loop(post._replace(url=post.url.format(server.url)), CONNECTIONS, seconds)
    assert (answers.bad, answers.broken) == (0, 0), server.log()
    return answers.per_s


def _images_per_batch(server: ServerProcess) -> int:
    """Return the mean number of images per batch so far."""
    lines = server.request("GET", "/metrics").body.decode().splitlines()
    images, batches = (
        sum(float(line.split()[-1]) for line in lines if line.startswith(f"cifarx_batch_images_{name}"))
        for name in ("sum", "count")
    )
    return max(1, round(images / batches))


def _steps_us(model: Path, picture: Path, images: int) -> float:
    """Return the microseconds per image of decoding and of the model, in a process alone."""
    command = [sys.executable, str(PEER_SCRIPTS / "bare_steps.py"), str(model), str(picture), str(images)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.timeout(600)
def test_start_to_ready(model: Path, tmp_path: Path, notes: list[str]) -> None:
    """Measure the time from process start until /readyz returns 200 with one worker, and the memory of a worker."""
    seconds, memories = [], []
    for _ in range(STARTS):
        started = time.perf_counter()
        with serving(cifarx_serve(model, "--workers", "1").command, tmp_path) as server:
            server.wait(_is_ready)
            seconds.append(time.perf_counter() - started)
            supervisor, *workers = server.processes()
            memories.append((memory([supervisor]), memory(workers)))
    median = statistics.median(seconds)
    (one_pss, one_rss), (worker_pss, worker_rss) = memories[-1]
    notes.append(
        f"cifarx serve with one worker, start to ready: {median:.2f} s (under {MAX_START_S}), median of {STARTS} "
        f"({min(seconds):.2f} to {max(seconds):.2f}); the worker {worker_pss:,.0f} MiB PSS ({worker_rss:,.0f} RSS), "
        f"the supervisor {one_pss:,.0f} ({one_rss:,.0f})"
    )
    require(median < MAX_START_S, f"{median:.2f} s from start to ready is over {MAX_START_S} s")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_overload_is_rejected_and_memory_is_constant(
    model: Path, picture: Path, tmp_path: Path, notes: list[str]
) -> None:
    """Send requests at a fixed rate, regardless of the responses; see `http_client.py`."""
    candidate = cifarx_serve(model, *QUIET, "--deadline-ms", str(int(DEADLINE_S * 1e3)))
    with serving(candidate.command, tmp_path) as server:
        server.wait(_are_ready)
        post = Post(server.url + candidate.path, picture, {"Content-Type": "image/png"})
        open_loop(post, 4 * CONNECTIONS, WARM_UP_S)
        capacity = open_loop(post, 4 * CONNECTIONS, TURN_S)["statuses"]["200"]["count"] / TURN_S
        found, before, after = _sustained(server, post, OVER_CAPACITY * capacity)
        assert server.request("GET", "/readyz").status == 200
    good, growth = found["statuses"]["200"], after / before - 1
    counts = ", ".join(f"{answers['count']:,} of {status}" for status, answers in found["statuses"].items())
    notes.append(
        f"{SUSTAINED_S} s at {OVER_CAPACITY} times {capacity:,.0f} requests/s, open loop "
        f"({OPEN_CONNECTIONS} connections): {counts}, {found['unsent']:,} unsent because no connection was free, "
        f"{found['broken']} broken; of those with status 200: {good['count'] / SUSTAINED_S:,.0f}/s, p50 "
        f"{good['p50_us'] / 1e3:.0f} ms, p99 {good['p99_us'] / 1e3:.0f} ms (under {DEADLINE_S * 1e3:.0f}); memory "
        f"{before:,.1f} to {after:,.1f} MiB PSS, {growth:+.1%} (under {MAX_GROWTH:.0%})"
    )
    assert set(found["statuses"]) <= {"200", "503", "504"}, counts
    assert found["broken"] == 0
    assert growth < MAX_GROWTH
    late = found["statuses"].get("504", {"count": 0})["count"]
    require(late == 0, f"{late} requests ran into the deadline instead of being rejected at once")
    require(good["p99_us"] / 1e6 < DEADLINE_S, f"a p99 of {good['p99_us'] / 1e3:.0f} ms is over the deadline")


def _sustained(server: ServerProcess, post: Post, rate: float) -> tuple[dict[str, Any], float, float]:
    """Return the results of the load generator, and the memory in MiB after settling and at the end."""
    samples = []
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(open_loop, post, OPEN_CONNECTIONS, SUSTAINED_S, rate)
        started = time.perf_counter()
        while (passed := time.perf_counter() - started) < SUSTAINED_S and not loading.done():
            if passed >= SETTLED_S:
                samples.append(server.memory().pss)
            time.sleep(1)
        return loading.result(), statistics.median(samples[:SAMPLES]), statistics.median(samples[-SAMPLES:])
