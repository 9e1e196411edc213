"""Training on two hosts with torchrun, simulated by two network namespaces that are connected by a veth pair."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cifarx_train.checkpoints.checkpoint import load_checkpoint
from tests.support.checkpoint_assertions import deep_equal
from tests.support.image_datasets import write_image_folder

pytestmark = pytest.mark.slow

TORCHRUN = Path(sys.executable).with_name("torchrun")
# The ranks sum float32 values in a different order; the `notes` recipe multiplies the result by 0.01.
TOLERANCE = 2e-6
PORT = 29_512
TIMEOUT_S = 120


class Host(NamedTuple):
    namespace: str
    interface: str
    address: str


def ip(line: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *line.split()], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two namespaces with one address each, which are removed with all their processes at the end."""
    if not shutil.which("ip"):
        pytest.skip("no ip command on this machine")
    tag = f"cx{os.getpid()}"
    both = [Host(f"{tag}{side}", f"{tag}v{side}", f"10.213.7.{side + 1}") for side in (0, 1)]
    with ExitStack() as stack:
        for host in both:
            made = ip(f"netns add {host.namespace}")
            if made.returncode:
                pytest.skip(f"no network namespace can be made here ({made.stderr.strip()})")
            stack.callback(ip, f"netns del {host.namespace}")
            stack.callback(kill_processes, host)
        first, second = both
        made = ip(f"link add {first.interface} type veth peer name {second.interface}")
        if made.returncode:
            pytest.skip(f"no pair of network interfaces can be made here ({made.stderr.strip()})")
        for host in both:
            for line in (
                f"link set {host.interface} netns {host.namespace}",
                f"-n {host.namespace} addr add {host.address}/24 dev {host.interface}",
                f"-n {host.namespace} link set {host.interface} up",
                f"-n {host.namespace} link set lo up",
            ):
                done = ip(line)
                assert done.returncode == 0, done.stderr
        yield both


def kill_processes(host: Host) -> None:
    for number in ip(f"netns pids {host.namespace}").stdout.split():
        subprocess.run(["kill", "-KILL", number], capture_output=True, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """201 training images, an odd number of which remains for the last step, and 15 test images."""
    return write_image_folder(tmp_path_factory.mktemp("data") / "colors", train=67, test=5)


def start(host: Host, rank: int, line: list[str]) -> "subprocess.Popen[str]":
    options = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
    options += ["--master-addr", "10.213.7.1", "--master-port", str(PORT), "-m", "cifarx"]
    return subprocess.Popen(
        ["ip", "netns", "exec", host.namespace, TORCHRUN, *options, *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host.interface},
    )


def run_on_both(hosts: list[Host], line: list[str]) -> list[tuple[int, str, str]]:
    with ExitStack() as stack:
        jobs = [stack.enter_context(start(host, rank, line)) for rank, host in enumerate(hosts)]
        for job in jobs:
            stack.callback(job.kill)
        outputs = [job.communicate(timeout=TIMEOUT_S) for job in jobs]
        return [(job.returncode, *texts) for job, texts in zip(jobs, outputs, strict=True)]


def train(data: Path, out: Path, *more: str) -> list[str]:
    line = ["train", "--model", "lzh", "--data", str(data), "--device", "cpu", "--batch-size", "50"]
    return [*line, "--out", str(out), *more]


def test_two_hosts_train_the_same_model_as_one_process_and_resume(
    hosts: list[Host], data: Path, tmp_path: Path
) -> None:
    from cifarx_train.train import train as train_here

    train_here("lzh", data=str(data), device="cpu", batch_size=50, epochs=2, out=tmp_path / "one")
    (first, out, err), (second, silent, _) = run_on_both(hosts, train(data, tmp_path / "two", "--epochs", "2"))
    assert first == second == 0, err
    assert out.count("\n") == 1
    assert out.startswith(f"{tmp_path / 'two' / 'lzh_1.pth'}: ")
    assert silent == ""
    assert "with 2 processes" in err
    for name in ("lzh_0.pth", "lzh_1.pth"):
        one, two = (load_checkpoint(tmp_path / folder / name) for folder in ("one", "two"))
        for weight in one.weights:
            assert torch.allclose(two.weights[weight], one.weights[weight], rtol=0, atol=TOLERANCE), weight
    # Both hosts resume from the first epoch in a shared directory, bit for bit.
    (tmp_path / "again").mkdir()
    shutil.copy2(tmp_path / "two" / "lzh_0.pth", tmp_path / "again")
    results = run_on_both(hosts, train(data, tmp_path / "again", "--epochs", "2", "--resume", "auto"))
    assert [status for status, _, _ in results] == [0, 0], results[0][2]
    again, whole = (load_checkpoint(tmp_path / folder / "lzh_1.pth") for folder in ("again", "two"))
    assert deep_equal(again.weights, whole.weights)
    assert deep_equal({**again.training, "seconds": 0}, {**whole.training, "seconds": 0})


def test_hosts_that_do_not_share_a_directory_fail(hosts: list[Host], data: Path, tmp_path: Path) -> None:
    from cifarx_train.train import train as train_here

    train_here("lzh", data=str(data), device="cpu", batch_size=50, epochs=1, out=tmp_path / "first")
    lines = [train(data, tmp_path / name, "--epochs", "2", "--resume", "auto") for name in ("first", "second")]
    with ExitStack() as stack:
        jobs = [stack.enter_context(start(host, rank, lines[rank])) for rank, host in enumerate(hosts)]
        for job in jobs:
            stack.callback(job.kill)
        errors = [job.communicate(timeout=TIMEOUT_S)[1] for job in jobs]
    assert all(job.returncode for job in jobs)
    message = "the processes found checkpoints of different steps (0, 4): use the same --out on all machines"
    assert any(message in text for text in errors), errors
