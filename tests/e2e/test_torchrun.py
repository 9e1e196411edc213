"""Training with two processes started by torchrun, over the loopback interface with Gloo, and their failures."""

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
from tests.support.checkpoint_assertions import assert_same_run
from tests.support.image_datasets import write_image_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt" or not torch.distributed.is_available(), reason="needs POSIX and Gloo"),
]

TORCHRUN = Path(sys.executable).with_name("torchrun")
CIFARX = Path(sys.executable).with_name("cifarx")
# The ranks sum float32 values in a different order; the `notes` recipe multiplies the result by 0.01.
TOLERANCE = 2e-6
# The other ranks must not wait forever for a killed one. torchrun itself waits up to 30 s.
TIMEOUT_S = 90

RECIPE = """
base = "fast"
epochs = 6
batch_size = 16
ema_decay = 0.9
cutout = 8
jitter = 0.2
"""


class Setup(NamedTuple):
    data: Path
    recipe: Path

    def line(self, out: Path, *more: str) -> list[str]:
        line = ["train", "--model", "lzh", "--data", str(self.data), "--device", "cpu", "--out", str(out)]
        return [*line, *more]

    def augmented(self, out: Path, *more: str) -> list[str]:
        return self.line(out, "--recipe", str(self.recipe), *more)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """201 training images, of which the last of 13 batches has 9, and 15 test images."""
    folder = tmp_path_factory.mktemp("setup")
    recipe = folder / "everything.toml"
    recipe.write_text(RECIPE)
    return Setup(write_image_folder(folder / "colors", train=67, test=5), recipe)


def environment() -> dict[str, str]:
    # Without the last variable, restarted processes may find the addresses of the previous ones (PyTorch 2.15).
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
    """Start a job, and kill it and its workers at the end."""
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
def whole(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run of two ranks. Tests must not write to it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ran = run(torchrun() + setup.augmented(out))
    assert ran.returncode == 0, ran.stderr
    return out


def test_two_processes_train_the_same_model_as_one(setup: Setup, tmp_path: Path) -> None:
    """The batch size of a recipe is for all processes together, so its learning rate does not change."""
    more = ["--epochs", "2", "--batch-size", "50", "--json"]
    alone = run([str(CIFARX), *setup.line(tmp_path / "one", *more)])
    both = run(torchrun() + setup.line(tmp_path / "two", *more))
    assert alone.returncode == both.returncode == 0, both.stderr
    one, two = json.loads(alone.stdout), json.loads(both.stdout)  # a single document from two processes
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
    for name, weight in one.weights.items():
        assert torch.allclose(weight, other.weights[name], rtol=0, atol=TOLERANCE), name
    record, reference = one.spec.training, other.spec.training
    assert record is not None
    assert reference is not None
    assert record.test_loss == pytest.approx(reference.test_loss, abs=10 * TOLERANCE)


def test_a_model_with_batch_norm(setup: Setup, tmp_path: Path) -> None:
    more = ["--stem", "small", "--batch-size", "67", "--epochs", "1"]
    line = setup.line(tmp_path / "run", *more)
    line[line.index("lzh")] = "resnet18"
    ran = run(torchrun() + line)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\n") == 1
    checkpoint = load_checkpoint(tmp_path / "run" / "resnet18_0.pth")
    assert checkpoint.weights["bn1.num_batches_tracked"] == 3
    assert checkpoint.spec.training is not None
    # A single process measures the same accuracy, so the saved model is the evaluated one.
    again = run([str(CIFARX), *line, "--resume", "auto", "--json"])
    assert json.loads(again.stdout)["test_accuracy"] == checkpoint.spec.training.test_accuracy


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_stops_the_job(setup: Setup, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    with started(torchrun() + setup.augmented(out)) as job:
        wait_for(job, out / "lzh_0.pth")
        workers = psutil.Process(job.pid).children()
        worker(job, rank).kill()
        stdout, _ = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode not in (0, None)
    assert stdout == ""
    assert not any(process.is_running() for process in workers)
    assert load_checkpoint(out / "lzh_0.pth").training["step"] == 13


@pytest.mark.parametrize("rank", [0, 1])
def test_a_restarted_job_resumes_bit_for_bit(setup: Setup, whole: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    with started(torchrun("--max-restarts", "1") + setup.augmented(out, "--resume", "auto")) as job:
        wait_for(job, out / "lzh_1.pth")
        worker(job, rank).kill()
        stdout, stderr = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, stderr
    assert stdout.count("\n") == 1
    assert "78 steps, resuming from " in stderr
    assert_same_run(out, whole)


def stop(line: list[str], first: Path, number: int) -> Path:
    """Stop a job with a signal after its first checkpoint, and return the checkpoint that it saves."""
    with started(line) as job:
        wait_for(job, first)
        time.sleep(0.1)
        job.send_signal(number)
        stdout, stderr = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode not in (0, None)
    assert stdout == ""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert errors
    assert all(line.startswith("error: interrupted at step ") for line in errors), errors
    saved = Path(errors[0].partition("checkpoint saved to ")[2].partition(": ")[0])
    assert f"at step {load_checkpoint(saved).training['step']} of" in errors[0]
    return saved


def test_ctrl_c_saves_the_state_of_a_job(setup: Setup, tmp_path: Path) -> None:
    out = tmp_path / "run"
    saved = stop(torchrun() + setup.augmented(out), out / "lzh_0.pth", signal.SIGINT)
    assert saved.parent == out


def test_a_stopped_job_saves_its_state_and_resumes(setup: Setup, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    saved = stop(torchrun() + setup.augmented(out), out / "lzh_0.pth", signal.SIGTERM)
    step = load_checkpoint(saved).training["step"]
    ran = run(torchrun() + setup.augmented(out, "--resume", "auto"))
    assert ran.returncode == 0, ran.stderr
    assert f"78 steps, resuming from {saved} at step {step}\n" in ran.stderr
    assert_same_run(out, whole)


def test_an_unwritable_checkpoint_stops_the_job(setup: Setup, whole: Path, tmp_path: Path) -> None:
    """Files are limited to 1 MB, like on a full disk. Only rank 0 gets the error, and all ranks stop."""
    out = tmp_path / "run"
    line = torchrun() + setup.augmented(out)
    ran = run(["bash", "-c", 'ulimit -f 1000 && exec "$@"', "bash", *line])
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert any(line.startswith(f"error: cannot write {out / 'lzh_0.pth'} (") for line in ran.stderr.splitlines())
    assert not list(out.glob("*.pth"))
    ran = run(torchrun() + setup.augmented(out, "--resume", "auto"))
    assert ran.returncode == 0, ran.stderr
    assert_same_run(out, whole)


def test_an_unknown_recipe_stops_the_job_before_files_are_created(setup: Setup, tmp_path: Path) -> None:
    ran = run(torchrun() + setup.line(tmp_path / "run", "--recipe", "slow"))
    assert ran.returncode != 0
    assert "error: unknown recipe 'slow'" in ran.stderr
    assert not (tmp_path / "run").exists()
