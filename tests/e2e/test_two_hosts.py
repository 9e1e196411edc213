"""Two hosts as two network namespaces, joined by one cable: torchrun on each, as on a real cluster."""

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
from tests.support.drawn_images import draw_folder
from tests.support.same_runs import same

pytestmark = pytest.mark.slow

TORCHRUN = Path(sys.executable).with_name("torchrun")
# float32 sums in another order; a step of the notes' recipe multiplies them by 0.01.
TOLERANCE = 2e-6
PORT = 29_512
SECONDS = 120


class Host(NamedTuple):
    namespace: str
    interface: str
    address: str


def ip(line: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *line.split()], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two namespaces with an address each; gone afterwards, with all that is left in them."""
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
            stack.callback(end_all, host)
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


def end_all(host: Host) -> None:
    for number in ip(f"netns pids {host.namespace}").stdout.split():
        subprocess.run(["kill", "-KILL", number], capture_output=True, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """201 training images, an odd number in four steps; 15 test images."""
    return draw_folder(tmp_path_factory.mktemp("data") / "colours", train=67, test=5)


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


def on_both(hosts: list[Host], line: list[str]) -> list[tuple[int, str, str]]:
    with ExitStack() as stack:
        jobs = [stack.enter_context(start(host, rank, line)) for rank, host in enumerate(hosts)]
        stack.callback(lambda: [job.kill() for job in jobs])
        told = [job.communicate(timeout=SECONDS) for job in jobs]
        return [(job.returncode, *texts) for job, texts in zip(jobs, told, strict=True)]


def train(data: Path, out: Path, *more: str) -> list[str]:
    line = ["train", "--model", "lzh", "--data", str(data), "--device", "cpu", "--batch-size", "50"]
    return [*line, "--out", str(out), *more]


def test_two_hosts_train_what_one_process_trains_and_go_on(hosts: list[Host], data: Path, tmp_path: Path) -> None:
    from cifarx_train.train import train as train_here

    train_here("lzh", data=str(data), device="cpu", batch_size=50, epochs=2, out=tmp_path / "one")
    (first, out, err), (second, silent, _) = on_both(hosts, train(data, tmp_path / "two", "--epochs", "2"))
    assert first == second == 0, err
    assert out.count("\n") == 1
    assert out.startswith(f"{tmp_path / 'two' / 'lzh_1.pth'}: ")
    assert silent == ""
    assert "with 2 processes" in err
    for name in ("lzh_0.pth", "lzh_1.pth"):
        one, two = (load_checkpoint(tmp_path / folder / name) for folder in ("one", "two"))
        for weight in one.model:
            assert torch.allclose(two.model[weight], one.model[weight], rtol=0, atol=TOLERANCE), weight
    # A shared folder, with the first epoch in it: both hosts go on from there to the same bits.
    (tmp_path / "again").mkdir()
    shutil.copy2(tmp_path / "two" / "lzh_0.pth", tmp_path / "again")
    ended = on_both(hosts, train(data, tmp_path / "again", "--epochs", "2", "--resume", "auto"))
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2]
    again, whole = (load_checkpoint(tmp_path / folder / "lzh_1.pth") for folder in ("again", "two"))
    assert same(again.model, whole.model)
    assert same({**again.training, "seconds": 0}, {**whole.training, "seconds": 0})


def test_hosts_that_do_not_share_the_folder_are_told(hosts: list[Host], data: Path, tmp_path: Path) -> None:
    from cifarx_train.train import train as train_here

    train_here("lzh", data=str(data), device="cpu", batch_size=50, epochs=1, out=tmp_path / "first")
    lines = [train(data, tmp_path / name, "--epochs", "2", "--resume", "auto") for name in ("first", "second")]
    with ExitStack() as stack:
        jobs = [stack.enter_context(start(host, rank, lines[rank])) for rank, host in enumerate(hosts)]
        stack.callback(lambda: [job.kill() for job in jobs])
        told = [job.communicate(timeout=SECONDS)[1] for job in jobs]
    assert all(job.returncode for job in jobs)
    assert any("found checkpoints of different steps (0, 4)" in text and "the same --out" in text for text in told), (
        told
    )
