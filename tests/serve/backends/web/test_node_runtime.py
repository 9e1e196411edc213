"""The Node.js process, with a script in place of ONNX Runtime Web that does what the model says."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from cifarx_serve.backends.web.node_package import NodePackage
from cifarx_serve.backends.web.node_runtime import NodeError, NodeRuntime
from cifarx_serve.errors import UsageError
from tests.support.child_processes import running_children
from tests.support.web import requires_node

pytestmark = requires_node

_SCRIPT = """
export const env = { versions: { web: "1.2.3" }, wasm: {} };
export class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
for (const name of ["stdin", "stdout", "stderr"]) process[name].fd; // which makes the pipes return without waiting
const forever = () => { for (;;) Math.sqrt(2); };
export const InferenceSession = {
  async create(model) {
    const name = new TextDecoder().decode(model);
    console.log("a library prints");
    if (name === "bad") throw new Error("ERROR_MESSAGE: no model\\nat line 2");
    if (name === "slow to open") forever();
    if (name === "dies") process.abort();
    const run = async ({ input }) => {
      if (name === "hangs") forever();
      if (name === "number") throw 4711;
      if (name === "dies later") process.kill(process.pid, "SIGSEGV");
      if (name === "text") return { logits: { type: "string", dims: [1], data: new Uint8Array(3) } };
      const whole = input.data.buffer.byteLength === input.data.byteLength && env.wasm.wasmBinary.byteLength === 4;
      const data = Float32Array.from(input.data, (value) => (whole ? 2 * value : NaN));
      return { logits: { type: "float32", dims: input.dims, data } };
    };
    const inputMetadata = [{ name: "input", isTensor: true, type: "float32", shape: ["batch", 3] }];
    return { inputMetadata, outputMetadata: [{ name: "logits", isTensor: true }], run };
  },
};
"""

Start = Callable[..., NodeRuntime]


@pytest.fixture
def package(tmp_path: Path) -> NodePackage:
    package = NodePackage(tmp_path / "a folder", "1.2.3")
    package.script.parent.mkdir(parents=True)
    package.script.write_text(_SCRIPT)
    package.wasm.write_bytes(b"\0asm")
    return package


@pytest.fixture
def start(package: NodePackage) -> Iterator[Start]:
    """Start a process with a model of this name."""
    running: list[NodeRuntime] = []

    def run(name: str, timeout_s: float = 60) -> NodeRuntime:
        running.append(NodeRuntime(package, name.encode(), timeout_s))
        return running[-1]

    yield run
    for runtime in running:
        runtime.close()


def children() -> list[psutil.Process]:
    return running_children("runner.mjs")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(
    "shape",
    [(3, 4), pytest.param((2, 70_001), marks=pytest.mark.slow), pytest.param((5, 300_000), marks=pytest.mark.slow)],
)
def test_batches_of_any_size_arrive_whole(start: Start, dtype: type, shape: tuple[int, int]) -> None:
    batch: np.ndarray = np.random.default_rng(0).integers(0, 128, shape).astype(dtype)
    runtime = start("good")
    for _ in range(2):
        np.testing.assert_array_equal(runtime.run(batch, "logits"), 2 * batch.astype(np.float32))
    turned = np.asfortranarray(batch)
    np.testing.assert_array_equal(runtime.run(turned, "logits"), 2 * batch.astype(np.float32))


def test_the_model_is_described(start: Start) -> None:
    found = start("good").description
    assert (found.version, found.node[0]) == ("1.2.3", "v")
    assert [(tensor.name, tensor.type, tensor.shape) for tensor in (*found.inputs, *found.outputs)] == [
        ("input", "float32", ("batch", 3)),
        ("logits", "", ()),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad", "ERROR_MESSAGE: no model"),
        ("dies", "Node.js ended with status -6"),
        pytest.param("slow to open", "no result after 0.5 s", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_cannot_be_opened_is_an_error_and_leaves_no_process(start: Start, name: str, message: str) -> None:
    with pytest.raises(NodeError, match=message):
        start(name, timeout_s=0.5)
    assert children() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "4711"),
        ("text", r"it returns string \(1,\) in 3 bytes"),
        pytest.param("dies later", "Node.js ended with status -11", marks=pytest.mark.slow),
        pytest.param("hangs", "no result after 0.5 s", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_fails_is_an_error(start: Start, name: str, message: str) -> None:
    runtime = start(name, timeout_s=0.5)
    with pytest.raises(NodeError, match=message):
        runtime.run(np.ones((1, 3), np.float32), "logits")
    if name in ("dies later", "hangs"):
        with pytest.raises(NodeError):
            runtime.run(np.ones((1, 3), np.float32), "logits")


def test_an_error_is_not_the_last_answer(start: Start) -> None:
    runtime = start("good")
    with pytest.raises(NodeError):
        runtime.run(np.ones((1, 3), np.float32), "no such output")
    assert runtime.run(np.ones((1, 3), np.float32), "logits").sum() == 6


def test_a_request_that_does_not_fit_into_memory_is_an_error(start: Start) -> None:
    runtime = start("good")
    runtime._process.send(b'{"run": "logits", "bytes": -1}')  # as an allocation that fails
    assert b"Invalid typed array length" in runtime._process.readline()
    assert runtime.run(np.ones((1, 3), np.float32), "logits").sum() == 6


def test_an_interrupted_request_closes_the_runtime(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply to the next request would otherwise be that to the interrupted one."""
    runtime = start("good")

    def interrupted() -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runtime._process, "readline", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.run(np.ones((1, 3), np.float32), "logits")
    with pytest.raises(NodeError, match=r"Node\.js was closed|ended with status -9"):
        runtime.run(np.zeros((1, 3), np.float32), "logits")
    assert children() == []


def test_a_closed_runtime_has_no_process_and_says_so(start: Start) -> None:
    runtime = start("good")
    [child] = children()
    runtime.close()
    runtime.close()
    assert not child.is_running()
    with pytest.raises(NodeError):
        runtime.run(np.ones((1, 3), np.float32), "logits")


@pytest.mark.slow
def test_a_forgotten_runtime_ends_its_process(package: NodePackage) -> None:
    runtime = NodeRuntime(package, b"good")
    [child] = children()
    del runtime
    child.wait(10)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["good", "hangs"])
def test_the_process_ends_with_a_killed_parent(name: str, package: NodePackage) -> None:
    code = (
        "import sys, threading, time, numpy as np; from pathlib import Path\n"
        "from cifarx_serve.backends.web.node_package import NodePackage\n"
        "from cifarx_serve.backends.web.node_runtime import NodeRuntime\n"
        f"runtime = NodeRuntime(NodePackage(Path({str(package.folder)!r}), '1'), {name.encode()!r})\n"
        "run = lambda: runtime.run(np.ones((1, 3), np.float32), 'logits')\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "time.sleep(0.2); print('running', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"running\n"
        [child] = psutil.Process(parent.pid).children()
        parent.kill()
        child.wait(10)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals of POSIX")
def test_a_signal_for_the_parent_does_not_end_the_process(start: Start) -> None:
    runtime = start("good")
    [child] = children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child.pid, number)
    time.sleep(0.2)
    assert runtime.run(np.ones((1, 3), np.float32), "logits").sum() == 6


def test_missing_node_is_one_line(package: NodePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"^Node\.js is not installed: install it, so that `node` is on the PATH$"):
        NodeRuntime(package, b"good")
