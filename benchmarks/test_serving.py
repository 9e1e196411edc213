"""`cifarx serve` on loopback: against other servers, against the bare session, at its start, and under too much load.

Servers and the load generator share `CORES` CPUs. LitServe and BentoML come from an environment of their own:

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

from benchmarks.support.http_load import Answers, Post, answer_by_answer, generator, open_load
from benchmarks.support.limits import require
from benchmarks.support.models import Models
from benchmarks.support.server_process import ServerProcess, memory, serving
from benchmarks.support.servers import PEERS, Contestant, others, ours, versions
from cifarx_serve.predictor import load
from cifarx_train.data.selection import select_dataset
from cifarx_train.models.registry import get_architecture

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPUs can be chosen on Linux only")

QUIET = ("--workers", "auto", "--no-access-log")
CORES = 2
CONNECTIONS = 16

ASKED = 20
"""Good answers in a row, each on a connection of its own, before all workers of a server are taken to be ready."""

ROUNDS = 5
TURN_S = 4
WARM_UP_S = 1
MIN_OVER_LITSERVE = 3.0
MIN_OVER_BARE_ASGI = 1.3

TENSOR_BATCH = 32
TENSOR_QUEUE = 1024
"""More images than all connections send at once; by default 256 may wait."""
MIN_SHARE = 0.60

STARTS = 5
MAX_START_S = 1.5

SUSTAINED_S = 120
SETTLED_S = 20
"""Memory counts from here on: by then every queue and every buffer has been full."""
SAMPLES = 5
OVER_CAPACITY = 1.2
OPEN_CONNECTIONS = 900
"""More than all queues hold, fewer than the server accepts."""
DEADLINE_S = 1.0
MAX_GROWTH = 0.05


@dataclass
class Rounds:
    """What one server did, round by round."""

    contestant: Contestant
    answers: list[Answers] = field(default_factory=list)
    mebibytes: float = 0.0

    def median(self, of: str) -> float:
        """Of a field of `Answers`."""
        return float(statistics.median(getattr(answers, of) for answers in self.answers))


@pytest.fixture(scope="module", autouse=True)
def cores() -> Iterator[list[int]]:
    """This process and all that it starts keep to so many CPUs, that figures of large machines compare."""
    before = os.sched_getaffinity(0)
    chosen = sorted(before)[:CORES]
    os.sched_setaffinity(0, chosen)
    yield chosen
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One drawn image of 32x32."""
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
    """All servers in turns, ours first; each is paused while another is measured.

    Ours as it is by default, with its access log: that is eval_model. The others write none, so it is told without too.
    """
    peers, absent = others(model)
    rounds = [Rounds(contestant) for contestant in (ours(model), ours(model, *QUIET), *peers)]
    with load(model, device="cpu") as predictor:
        label = predictor.predict(picture).label
    folder = tmp_path_factory.mktemp("race")
    with ExitStack() as stack:
        servers = [_started(stack, each.contestant, picture, label, folder) for each in rounds]
        for number in range(ROUNDS):
            pairs = list(zip(rounds, servers, strict=True))
            for each, server in pairs if number % 2 == 0 else reversed(pairs):
                _turn(each, server, picture, label)
    tables.append(_race_table(rounds))
    notes.append(_conditions(label, absent))
    return rounds


def _started(stack: ExitStack, contestant: Contestant, picture: Path, label: str, folder: Path) -> ServerProcess:
    """One that gives the right label, and is paused."""
    server = stack.enter_context(serving(contestant.command, folder))
    server.wait(lambda server: all(_label(contestant, server, picture) == label for _ in range(ASKED)))
    server.pause()
    return server


def _label(contestant: Contestant, server: ServerProcess, picture: Path) -> str | None:
    """What it says the picture is; None where it does not say."""
    reply = server.ask("POST", contestant.path, picture.read_bytes(), {"Content-Type": "image/png"})
    return contestant.label(reply.json()) if reply.status == 200 else None


def _turn(rounds: Rounds, server: ServerProcess, picture: Path, label: str) -> None:
    """One server under load; every answer was good, and the label is right before and after."""
    contestant = rounds.contestant
    post = Post(server.url + contestant.path, picture, {"Content-Type": "image/png"})
    with _running(server):
        assert _label(contestant, server, picture) == label
        answer_by_answer(post, CONNECTIONS, WARM_UP_S)
        answers = answer_by_answer(post, CONNECTIONS, TURN_S)
        assert _label(contestant, server, picture) == label
        rounds.mebibytes = server.memory().pss
    assert (answers.bad, answers.broken) == (0, 0), f"{contestant.name} {contestant.settings}: {server.said()}"
    rounds.answers.append(answers)


@contextmanager
def _running(server: ServerProcess) -> Iterator[None]:
    server.resume()
    yield
    server.pause()


def _over(rounds: list[Rounds], peer: Rounds) -> float:
    """Our requests a second over a peer's, the median of the rounds."""
    pairs = zip(rounds[0].answers, peer.answers, strict=True)
    return statistics.median(our.per_s / their.per_s for our, their in pairs)


def _race_table(rounds: list[Rounds]) -> Table:
    title = f"one PNG of 32x32 a request, {CONNECTIONS} connections; medians of {ROUNDS} rounds of {TURN_S} s in turns"
    table = Table("server", "settings", "requests/s", "p50 ms", "p99 ms", "ours over it", "MiB", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for each in rounds:
        p50, p99 = each.median("p50_ms"), each.median("p99_ms")
        figures = (f"{each.median('per_s'):,.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{_over(rounds, each):.2f}")
        table.add_row(each.contestant.name, each.contestant.settings, *figures, f"{each.mebibytes:,.0f}")
    return table


def _conditions(label: str, absent: str) -> str:
    """What must be known with the table."""
    cores = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
    lines = [f"servers and load generator ({generator()}) share CPUs {cores}; every answer was 200, and {label!r}"]
    for whose, python in (("ours and bare ASGI", sys.executable), ("the other peers", os.environ.get(PEERS))):
        if python:
            found = ", ".join(f"{name} {version}" for name, version in versions(python).items())
            lines.append(f"{whose}: {found}")
    return "\n".join([*lines, absent] if absent else lines)


@pytest.mark.timeout(900)
def test_requests_per_s_against_litserve(race: list[Rounds]) -> None:
    """Against the better of its settings, which are those that were best when they were tried."""
    peers = [each for each in race if each.contestant.name == "LitServe"]
    if not peers:
        pytest.skip(f"{PEERS} names no Python that has litserve")
    best = max(peers, key=lambda each: each.median("per_s"))
    ratio, p99, their_p99 = _over(race, best), race[0].median("p99_ms"), best.median("p99_ms")
    require(ratio >= MIN_OVER_LITSERVE, f"{ratio:.2f} times LitServe's requests/s is under {MIN_OVER_LITSERVE}")
    require(p99 <= their_p99, f"a p99 of {p99:.1f} ms is over LitServe's {their_p99:.1f} ms")


@pytest.mark.timeout(900)
def test_requests_per_s_against_one_bare_asgi_process(race: list[Rounds]) -> None:
    (bare,) = [each for each in race if each.contestant.name == "bare ASGI"]
    ratio = _over(race, bare)
    require(ratio >= MIN_OVER_BARE_ASGI, f"{ratio:.2f} times a bare process is under {MIN_OVER_BARE_ASGI}")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Ours, a worker a CPU."""
    contestant = ours(model, *QUIET, "--max-queue", str(TENSOR_QUEUE))
    with serving(contestant.command, tmp_path_factory.mktemp("server")) as started:
        started.wait(_are_ready)
        yield started


def _is_ready(server: ServerProcess) -> bool:
    return server.ask("GET", "/readyz").status == 200


def _are_ready(server: ServerProcess) -> bool:
    """All workers: each connection is taken by any of them."""
    return all(_is_ready(server) for _ in range(ASKED))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", [1, TENSOR_BATCH])
def test_tensors_against_the_bare_session(
    batch: int, server: ServerProcess, model: Path, tmp_path: Path, cores: list[int], notes: list[str]
) -> None:
    """Binary FP32 tensors by the Open Inference Protocol, against `session.run` alone on the same CPUs."""
    images = np.random.default_rng(0).random((batch, 3, 32, 32), np.float32)
    post = _tensor_post(server, model, images, tmp_path)
    expected = _logits(server, post)
    with load(model, device="cpu") as predictor:
        np.testing.assert_allclose(expected, predictor.run(images), rtol=1e-4, atol=1e-4)
    pairs = []
    with _bare_session(model, batch, len(cores)) as bare:
        for _ in range(ROUNDS):
            alone = bare(TURN_S)
            answer_by_answer(post, CONNECTIONS, WARM_UP_S)
            answers = answer_by_answer(post, CONNECTIONS, TURN_S)
            assert (answers.bad, answers.broken) == (0, 0), server.said()
            pairs.append((answers.per_s * batch, alone, answers.p99_ms))
    np.testing.assert_allclose(_logits(server, post), expected, rtol=1e-4, atol=1e-4)
    served, alone, p99 = (statistics.median(column) for column in zip(*pairs, strict=True))
    share = statistics.median(ours / bare for ours, bare, _ in pairs)
    gate = f" (at least {MIN_SHARE:.0%})" if batch == TENSOR_BATCH else ""
    notes.append(
        f"binary FP32 tensors of batch {batch}, {CONNECTIONS} connections: {served:,.0f} images/s through the "
        f"server, p99 {p99:.1f} ms; bare session.run in a process alone {alone:,.0f} images/s; share {share:.0%}{gate}"
        f", medians of {ROUNDS} in turns"
    )
    if batch == TENSOR_BATCH:
        require(share >= MIN_SHARE, f"{share:.0%} of the bare session is under {MIN_SHARE:.0%}")


def _tensor_post(server: ServerProcess, model: Path, images: np.ndarray, folder: Path) -> Post:
    """A request with the images after its JSON, that asks for its logits in the same way."""
    raw = images.tobytes()
    size = {"binary_data_size": len(raw)}
    tensor = {"name": "input", "datatype": "FP32", "shape": images.shape, "parameters": size}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body = folder / "tensor.bin"
    body.write_bytes(header + raw)
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
    return Post(f"{server.url}/v2/models/{model.stem}/infer", body, headers)


def _logits(server: ServerProcess, post: Post) -> np.ndarray:
    """Of one such request."""
    reply = server.ask("POST", post.url.removeprefix(server.url), post.body.read_bytes(), post.headers)
    assert reply.status == 200, reply.body
    length = int(reply.headers["Inference-Header-Content-Length"])
    (output,) = json.loads(reply.body[:length])["outputs"]
    return np.frombuffer(reply.body[length:], np.float32).reshape(output["shape"])


@contextmanager
def _bare_session(model: Path, batch: int, threads: int) -> Iterator[Callable[[float], float]]:
    """A process that waits for its turns: gives images/s for seconds."""
    program = Path(__file__).parent / "peers" / "bare_session.py"
    command = [sys.executable, str(program), str(model), str(batch), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
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
def test_start_to_ready(model: Path, tmp_path: Path, notes: list[str]) -> None:
    """From the start of the process until /readyz gives 200, with one worker; and what a worker weighs."""
    taken, weights = [], []
    for _ in range(STARTS):
        started = time.perf_counter()
        with serving(ours(model, "--workers", "1").command, tmp_path) as server:
            server.wait(_is_ready)
            taken.append(time.perf_counter() - started)
            supervisor, *workers = server.processes()
            weights.append((memory([supervisor]), memory(workers)))
    median = statistics.median(taken)
    (one_pss, one_rss), (worker_pss, worker_rss) = weights[-1]
    notes.append(
        f"cifarx serve with one worker, start to ready: {median:.2f} s (under {MAX_START_S}), median of {STARTS} "
        f"({min(taken):.2f} to {max(taken):.2f}); the worker {worker_pss:,.0f} MiB PSS ({worker_rss:,.0f} RSS), the "
        f"supervisor {one_pss:,.0f} ({one_rss:,.0f})"
    )
    require(median < MAX_START_S, f"{median:.2f} s from start to ready is over {MAX_START_S} s")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_too_much_load_is_refused_and_memory_holds(
    model: Path, picture: Path, tmp_path: Path, notes: list[str]
) -> None:
    """Requests leave at a fixed rate whatever became of those before; see `http_client.py`."""
    contestant = ours(model, *QUIET, "--deadline-ms", str(int(DEADLINE_S * 1e3)))
    with serving(contestant.command, tmp_path) as server:
        server.wait(_are_ready)
        post = Post(server.url + contestant.path, picture, {"Content-Type": "image/png"})
        open_load(post, 4 * CONNECTIONS, WARM_UP_S)
        capacity = open_load(post, 4 * CONNECTIONS, TURN_S)["statuses"]["200"]["count"] / TURN_S
        found, before, after = _sustained(server, post, OVER_CAPACITY * capacity)
        assert server.ask("GET", "/readyz").status == 200
    good, growth = found["statuses"]["200"], after / before - 1
    counts = ", ".join(f"{answers['count']:,} of {status}" for status, answers in found["statuses"].items())
    notes.append(
        f"{SUSTAINED_S} s at {OVER_CAPACITY} times {capacity:,.0f} requests/s, sent on time whatever was answered "
        f"({OPEN_CONNECTIONS} connections): {counts}, {found['unsent']:,} unsent for want of a connection, "
        f"{found['broken']} broken; answered with 200: {good['count'] / SUSTAINED_S:,.0f}/s, p50 "
        f"{good['p50_us'] / 1e3:.0f} ms, p99 {good['p99_us'] / 1e3:.0f} ms (under {DEADLINE_S * 1e3:.0f}); memory "
        f"{before:,.1f} to {after:,.1f} MiB PSS, {growth:+.1%} (under {MAX_GROWTH:.0%})"
    )
    assert set(found["statuses"]) <= {"200", "503", "504"}, counts
    assert found["broken"] == 0
    assert growth < MAX_GROWTH
    late = found["statuses"].get("504", {"count": 0})["count"]
    require(late == 0, f"{late} requests were refused for the deadline, and not before")
    require(good["p99_us"] / 1e6 < DEADLINE_S, f"a p99 of {good['p99_us'] / 1e3:.0f} ms is over the deadline")


def _sustained(server: ServerProcess, post: Post, rate: float) -> tuple[dict[str, Any], float, float]:
    """What the load generator found, and MiB of the server's processes, once they have settled and at the end."""
    samples = []
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(open_load, post, OPEN_CONNECTIONS, SUSTAINED_S, rate)
        started = time.perf_counter()
        while (passed := time.perf_counter() - started) < SUSTAINED_S and not loading.done():
            if passed >= SETTLED_S:
                samples.append(server.memory().pss)
            time.sleep(1)
        return loading.result(), statistics.median(samples[:SAMPLES]), statistics.median(samples[-SAMPLES:])
