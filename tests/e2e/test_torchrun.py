"""Two processes that torchrun starts, on loopback with Gloo: what is trained and said, and what failures do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from tests.support.drawn_images import draw_folder
from tests.support.same_runs import require_same_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt" or not torch.distributed.is_available(), reason="needs POSIX and Gloo"),
]

TORCHRUN = Path(sys.executable).with_name("torchrun")
CIFARX = Path(sys.executable).with_name("cifarx")
# float32 sums in another order; a step of the notes' recipe multiplies them by 0.01.
TOLERANCE = 2e-6
# A rank that dies must not leave the others waiting; torchrun itself waits 30 s for what does not end.
BOUND = 90

RECIPE = """
base = "fast"
epochs = 6
batch_size = 16
ema = 0.9
cutout = 8
jitter = 0.2
"""


class Bench(NamedTuple):
    data: Path
    recipe: Path

    def line(self, out: Path, *more: str) -> list[str]:
        line = ["train", "--model", "lzh", "--data", str(self.data), "--device", "cpu", "--out", str(out)]
        return [*line, *more]

    def augmented(self, out: Path, *more: str) -> list[str]:
        return self.line(out, "--recipe", str(self.recipe), *more)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """201 training images, the last of 13 batches has 9; 15 test images."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = folder / "everything.toml"
    recipe.write_text(RECIPE)
    return Bench(draw_folder(folder / "colours", train=67, test=5), recipe)


def environment() -> dict[str, str]:
    # Without the last, processes that restart may find the addresses of those before them (PyTorch 2.15).
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def torchrun(*options: str) -> list[str]:
    return [str(TORCHRUN), "--standalone", "--nproc-per-node", "2", *options, "-m", "cifarx"]


def run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment(), timeout=240)


@contextmanager
def started(line: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """A job that is surely gone afterwards, its workers too."""
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            yield process
        finally:
            for member in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
                member.kill()
            process.kill()


def worker(job: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    for child in psutil.Process(job.pid).children():
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no rank {rank}")


def wait_for(job: "subprocess.Popen[str]", path: Path) -> None:
    while not path.exists():
        assert job.poll() is None
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that nothing disturbed; not to be written to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ran = run(torchrun() + bench.augmented(out))
    assert ran.returncode == 0, ran.stderr
    return out


def test_two_processes_train_what_one_trains(bench: Bench, tmp_path: Path) -> None:
    """The notes' recipe: its batch is over all processes, its learning rate stays."""
    more = ["--epochs", "2", "--batch-size", "50", "--json"]
    alone = run([str(CIFARX), *bench.line(tmp_path / "one", *more)])
    both = run(torchrun() + bench.line(tmp_path / "two", *more))
    assert alone.returncode == both.returncode == 0, both.stderr
    one, two = json.loads(alone.stdout), json.loads(both.stdout)  # one document, though two processes ran
    assert one["test_accuracy"] == two["test_accuracy"]
    assert [Path(path).name for path in two["checkpoints"]] == ["lzh_0.pth", "lzh_1.pth"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["logs", "lzh_0.pth", "lzh_1.pth"]
    assert len(list((tmp_path / "two" / "logs").glob("events*"))) == len(
        list((tmp_path / "one" / "logs").glob("events*"))
    )
    for name in ("lzh_0.pth", "lzh_1.pth"):
        require_close(load_checkpoint(tmp_path / "two" / name), load_checkpoint(tmp_path / "one" / name))
    rows = [line for line in both.stderr.splitlines() if line.lstrip().startswith(("1/2", "2/2"))]
    assert len(rows) == 2
    assert "with 2 processes" in both.stderr


def require_close(one: Checkpoint, other: Checkpoint) -> None:
    for name, weight in one.model.items():
        assert torch.allclose(weight, other.model[name], rtol=0, atol=TOLERANCE), name
    record, reference = one.spec.training, other.spec.training
    assert record is not None
    assert reference is not None
    assert record.test_loss == pytest.approx(reference.test_loss, abs=10 * TOLERANCE)


def test_a_network_with_batch_norm(bench: Bench, tmp_path: Path) -> None:
    more = ["--stem", "small", "--batch-size", "67", "--epochs", "1"]
    line = bench.line(tmp_path / "run", *more)
    line[line.index("lzh")] = "resnet18"
    ran = run(torchrun() + line)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\n") == 1
    checkpoint = load_checkpoint(tmp_path / "run" / "resnet18_0.pth")
    assert checkpoint.model["bn1.num_batches_tracked"] == 3
    assert checkpoint.spec.training is not None
    # What is saved is what was eval_model: one process finds the same, on every test image once.
    again = run([str(CIFARX), *line, "--resume", "auto", "--json"])
    assert json.loads(again.stdout)["test_accuracy"] == checkpoint.spec.training.test_accuracy


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job(bench: Bench, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    with started(torchrun() + bench.augmented(out)) as job:
        wait_for(job, out / "lzh_0.pth")
        workers = psutil.Process(job.pid).children()
        worker(job, rank).kill()
        stdout, _ = job.communicate(timeout=BOUND)
    assert job.returncode not in (0, None)
    assert stdout == ""
    assert not any(process.is_running() for process in workers)
    assert load_checkpoint(out / "lzh_0.pth").training["step"] == 13


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_restarts_goes_on_to_the_same_bits(bench: Bench, whole: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    with started(torchrun("--max-restarts", "1") + bench.augmented(out, "--resume", "auto")) as job:
        wait_for(job, out / "lzh_1.pth")
        worker(job, rank).kill()
        stdout, stderr = job.communicate(timeout=BOUND)
    assert job.returncode == 0, stderr
    assert stdout.count("\n") == 1
    assert "of them done" in stderr
    require_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_told_to_stop_saves_its_state_and_goes_on(bench: Bench, whole: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    with started(torchrun() + bench.augmented(out)) as job:
        wait_for(job, out / "lzh_0.pth")
        time.sleep(0.1)
        job.send_signal(number)
        stdout, stderr = job.communicate(timeout=BOUND)
    assert job.returncode not in (0, None)
    assert stdout == ""
    told = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert told
    assert all(line.startswith("error: interrupted at step ") for line in told), told
    step = load_checkpoint(Path(told[0].partition("saved in ")[2].partition(": ")[0])).training["step"]
    assert f"at step {step} of" in told[0]
    ran = run(torchrun() + bench.augmented(out, "--resume", "auto"))
    assert ran.returncode == 0, ran.stderr
    assert f"{step} of them done" in ran.stderr
    require_same_run(out, whole)


def test_a_checkpoint_that_cannot_be_written_ends_the_job(bench: Bench, whole: Path, tmp_path: Path) -> None:
    """No file above 1 MB, as a full disk would have it: only the first rank notices, all of them end."""
    out = tmp_path / "run"
    line = torchrun() + bench.augmented(out)
    ran = run(["bash", "-c", 'ulimit -f 1000 && exec "$@"', "bash", *line])
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert any(line.startswith(f"error: cannot write {out / 'lzh_0.pth'} (") for line in ran.stderr.splitlines())
    assert not list(out.glob("*.pth"))
    ran = run(torchrun() + bench.augmented(out, "--resume", "auto"))
    assert ran.returncode == 0, ran.stderr
    require_same_run(out, whole)


def test_a_wrong_name_ends_the_job_before_anything_is_made(bench: Bench, tmp_path: Path) -> None:
    ran = run(torchrun() + bench.line(tmp_path / "run", "--recipe", "slow"))
    assert ran.returncode != 0
    assert "error: unknown recipe 'slow'" in ran.stderr
    assert not (tmp_path / "run").exists()
