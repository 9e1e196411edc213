"""Training with several processes over the loopback interface, forked with torchrun's environment variables."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from cifarx_train.distributed import Distributed, init_distributed
from tests.support.checkpoint_assertions import assert_same_checkpoint
from tests.support.command_line import CommandResult
from tests.support.image_datasets import write_image_folder

# The ranks sum float32 values in a different order; the `notes` recipe multiplies the result by 0.01.
TOLERANCE = 2e-6

needs_processes = pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available(), reason="needs a POSIX system and torch.distributed"
)

# Importing PyTorch takes seconds. One parent process imports it, and the ranks are forked from it.
_PARENT = """
import gc, json, os, socket, sys
import PIL.PngImagePlugin, torch, torch._dynamo, torchvision
import cifarx.commands.train, cifarx.output.training, cifarx_train.train
from torch import distributed
from cifarx.main import main
from cifarx_train.distributed import init_distributed

def probe():
    with init_distributed() as process:
        module = torch.nn.BatchNorm1d(2)
        module.running_mean.fill_(process.rank)
        process.broadcast_buffers(module)
        torch.nn.init.constant_(module.weight, process.rank)
        convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # is not contiguous
        torch.nn.init.constant_(convolution.weight, process.rank)
        process.broadcast_state(torch.nn.Sequential(module, convolution))
        files_before = []
        with process.main_process_first():
            files_before.append(len(os.listdir(".")))
            open(f"rank{process.rank}", "w").close()
        result = {
            "process": list(process),
            "is_main_process": process.is_main_process,
            "all_reduce": process.all_reduce(torch.tensor([1.0, process.rank])).tolist(),
            "any": [process.any(False), process.any(process.rank == 1), process.any(True)],
            "all_gather": [part.tolist() for part in process.all_gather(torch.tensor([process.rank, 7]))],
            "mean": module.running_mean.tolist(),
            "weights": [module.weight.max().item(), convolution.weight.max().item()],
            "files_before": files_before[0],
        }
    print(json.dumps({**result, "group_destroyed": not distributed.is_initialized()}))

def checked_destroy(destroy=distributed.destroy_process_group):
    # A DDP model that outlives its process group aborts about one in ten processes at exit.
    ddp = torch.nn.parallel.DistributedDataParallel
    assert not [instance for instance in gc.get_objects() if isinstance(instance, ddp)]
    destroy()

distributed.destroy_process_group = checked_destroy

def child(request, rank, port):
    os.chdir(request["directory"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    size = len(request["arguments"])
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in torchrun.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"})
    sys.argv = ["cifarx", *request["arguments"][rank]]
    probe() if request["arguments"][rank] == ["probe"] else main()

print("ready", flush=True)
while line := sys.stdin.readline():
    request = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(len(request["arguments"])):
        children.append(os.fork())
        if not children[-1]:
            status = 70
            try:
                child(request, rank, port)
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Processes(NamedTuple):
    """Starts several processes that train together."""

    parent: "subprocess.Popen[str]"

    def run(self, directory: Path, *arguments: list[str]) -> list[CommandResult]:
        """Run one process per list of arguments in the directory, and return their results."""
        directory.mkdir(exist_ok=True)
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        print(json.dumps({"directory": str(directory), "arguments": arguments}), file=self.parent.stdin, flush=True)
        statuses = json.loads(self.parent.stdout.readline())
        return [
            CommandResult(status, (directory / f"out{rank}").read_text(), (directory / f"err{rank}").read_text())
            for rank, status in enumerate(statuses)
        ]

    def train(self, directory: Path, size: int, data: Path, *more: str, model: str = "lzh") -> list[CommandResult]:
        """Train for two epochs with batch size 32 by default, and save checkpoints in `directory / "run"`."""
        line = ["train", "--model", model, "--data", str(data), "--epochs", "2", "--batch-size", "32"]
        line += ["--device", "cpu", "--out", "run", *more]
        results = self.run(directory, *[line] * size)
        assert [ran.status for ran in results] == [0] * size, "\n".join(ran.err for ran in results)
        return results


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        yield Processes(parent)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """129 training images, of which a single one remains after batches of 32, and 15 test images."""
    return write_image_folder(tmp_path_factory.mktemp("odd") / "colors", train=43, test=5)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """135 training images, which are four batches of 32 and one of 7, and 21 test images."""
    return write_image_folder(tmp_path_factory.mktemp("uneven") / "colors", train=45, test=7)


def require_close(one: Checkpoint, other: Checkpoint) -> None:
    """Assert that weights, loss and accuracy are equal except for the order of summation."""
    for name, weight in one.weights.items():
        assert torch.allclose(weight, other.weights[name], rtol=0, atol=TOLERANCE), name
    record, reference = one.spec.training, other.spec.training
    assert record is not None
    assert reference is not None
    assert record.test_loss == pytest.approx(reference.test_loss, abs=10 * TOLERANCE)
    assert record.test_accuracy == reference.test_accuracy
    assert one.training["step"] == other.training["step"]


# --- a single process


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with init_distributed() as process:
        assert process == Distributed(0, 1, 0, 1)
        assert process.is_main_process
        assert process.any(True)
        assert not process.any(False)
        assert process.all_reduce(torch.tensor(3.0)) == 3
        assert [part.item() for part in process.all_gather(torch.tensor(4))] == [4]
        module = torch.nn.Linear(2, 2)
        assert process.data_parallel(module) is module
        process.broadcast_buffers(module)
        with process.main_process_first():
            pass
        assert not torch.distributed.is_initialized()


def test_torchrun_with_one_process_creates_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    with init_distributed() as process:
        assert process == Distributed()
        assert not torch.distributed.is_initialized()


def test_an_incomplete_torchrun_environment_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(
            UsageError, match=r"only RANK, WORLD_SIZE of torchrun's .* are set: start several processes with torchrun"
        ),
        init_distributed(),
    ):
        pass


@given(st.integers(1, 300), st.integers(1, 9))
def test_the_shards_of_a_batch_contain_every_image_once(count: int, size: int) -> None:
    batch = torch.arange(count)
    shards = [Distributed(rank, size).shard(batch) for rank in range(size)]
    total = Distributed(0, size).total_images(count)
    assert sum(map(len, shards)) == total
    if count < 2 * size:  # BatchNorm cannot train on a single image
        assert all(torch.equal(shard, batch) for shard in shards)
    else:
        assert total == count
        assert torch.equal(torch.cat(shards).sort().values, batch)
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(st.integers(1, 60), st.integers(2, 5))
def test_the_weighted_mean_over_the_ranks_is_the_mean_over_the_batch(count: int, size: int) -> None:
    """The training loop weights the loss of each rank before DDP averages the gradients."""
    losses = torch.rand(count, dtype=torch.float64)
    shards = [Distributed(rank, size).shard(losses) for rank in range(size)]
    total = Distributed(0, size).total_images(count)
    mean = sum(shard.mean() * len(shard) * size / total for shard in shards) / size
    assert mean == pytest.approx(losses.mean().item())


# --- several processes


@needs_processes
def test_collective_operations(processes: Processes, tmp_path: Path) -> None:
    results = processes.run(tmp_path / "probe", ["probe"], ["probe"], ["probe"])
    for rank, ran in enumerate(results):
        assert ran.status == 0, ran.err
        found = ran.json
        assert found["process"] == [rank, 3, rank, 3]
        assert found["is_main_process"] is (rank == 0)
        assert found["all_reduce"] == [3.0, 3.0]
        assert found["any"] == [False, True, True]
        assert found["all_gather"] == [[0, 7], [1, 7], [2, 7]]
        assert found["mean"] == [0.0, 0.0]
        assert found["weights"] == [0.0, 0.0]
        assert found["group_destroyed"]
    # Rank 0 runs the block first, and the other ranks see the file that it created.
    assert results[0].json["files_before"] < min(ran.json["files_before"] for ran in results[1:])


@needs_processes
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("data", ["odd", "uneven"])
def test_several_ranks_train_the_same_model_as_one(
    processes: Processes, request: pytest.FixtureRequest, tmp_path: Path, data: str, size: int
) -> None:
    images: Path = request.getfixturevalue(data)
    processes.train(tmp_path / "one", 1, images)
    results = processes.train(tmp_path / "many", size, images)
    for name in ("lzh_0.pth", "lzh_1.pth"):
        require_close(
            load_checkpoint(tmp_path / "many" / "run" / name), load_checkpoint(tmp_path / "one" / "run" / name)
        )
    assert results[0].out.count("\n") == 1
    assert results[0].out.startswith("run/lzh_1.pth: ")
    assert f"with {size} processes" in results[0].err
    for ran in results[1:]:
        assert ran.out == ""
        assert not any(word in ran.err for word in ("loading", "note:", "epoch", "next:", "error:")), ran.err


@pytest.mark.slow
@needs_processes
def test_momentum_schedule_and_clipping_are_the_same_with_several_ranks(
    processes: Processes, uneven: Path, tmp_path: Path
) -> None:
    more = [
        "--set",
        "momentum=0.9",
        "--set",
        "schedule=cosine",
        "--set",
        "warmup_fraction=0.3",
        "--set",
        "max_grad_norm=0.5",
    ]
    more += ["--set", "ema_decay=0.9", "--set", "label_smoothing=0.1", "--set", "normalize=true"]
    processes.train(tmp_path / "one", 1, uneven, *more)
    processes.train(tmp_path / "two", 2, uneven, *more)
    one, two = (load_checkpoint(tmp_path / name / "run" / "lzh_1.pth") for name in ("one", "two"))
    require_close(two, one)


@pytest.mark.slow
@needs_processes
def test_fine_tuning_is_the_same_with_several_ranks(
    processes: Processes, uneven: Path, trained_checkpoint: Path, tmp_path: Path
) -> None:
    more = ["--weights", str(trained_checkpoint), "--teacher", str(trained_checkpoint), "--freeze", "model.0.*"]
    more += ["--accumulate", "2", "--set", "backbone_lr=0.001"]
    processes.train(tmp_path / "one", 1, uneven, *more)
    results = processes.train(tmp_path / "two", 2, uneven, *more)
    one, two = (load_checkpoint(tmp_path / name / "run" / "lzh_1.pth") for name in ("one", "two"))
    require_close(two, one)
    assert [ran.err.count("weights lzh_0.pth") for ran in results] == [1, 0]


@pytest.mark.slow
@needs_processes
def test_weights_sampler_and_calibration_are_the_same_with_several_ranks(processes: Processes, tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "colors", train=45, val=35, test=7)
    (tmp_path / "weights.json").write_text('{"blue": 1, "green": 2, "red": 4}')
    more = ["--class-weights", str(tmp_path / "weights.json"), "--sampler", "balanced", "--calibrate", "--lr", "0.0003"]
    results = [processes.train(tmp_path / str(size), size, data, *more)[0] for size in (1, 2)]
    for name in ("lzh_0.pth", "lzh_1.pth"):
        one, two = (load_checkpoint(tmp_path / size / "run" / name) for size in ("1", "2"))
        for key, weight in one.weights.items():
            assert torch.allclose(weight, two.weights[key], rtol=0, atol=TOLERANCE), key
        record, reference = two.spec.training, one.spec.training
        assert record is not None
        assert reference is not None
        assert record.val_loss == pytest.approx(reference.val_loss, abs=10 * TOLERANCE)
        assert (record.val_accuracy, record.test_accuracy) == (reference.val_accuracy, reference.test_accuracy)
        assert (two.spec.temperature is None) == (one.spec.temperature is None)
    assert results[0].out.partition(" on ")[0] == results[1].out.partition(" on ")[0]


@pytest.mark.slow
@needs_processes
def test_more_ranks_than_test_images(processes: Processes, tmp_path: Path) -> None:
    """Some ranks have no test image, and some batches have fewer images than there are ranks."""
    data = write_image_folder(tmp_path / "colors", train=3, test=1)
    more = ["--batch-size", "4"]
    processes.train(tmp_path / "one", 1, data, *more)
    processes.train(tmp_path / "five", 5, data, *more)
    one, five = (load_checkpoint(tmp_path / name / "run" / "lzh_1.pth") for name in ("one", "five"))
    require_close(five, one)


@pytest.mark.slow
@needs_processes
@pytest.mark.parametrize(("size", "require"), [(2, assert_same_checkpoint), (3, require_close)], ids=["2", "3"])
def test_several_ranks_resume_to_the_same_weights(
    processes: Processes, uneven: Path, tmp_path: Path, size: int, require: Callable[[Checkpoint, Checkpoint], None]
) -> None:
    """Every rank draws its own random numbers for the augmentation, also after a resume.

    With two ranks the results are the same bit for bit. With more they are only close, because DDP rebuilds its buckets
    after the first step of a process, which changes the order of summation.
    """
    more = ["--recipe", "fast", "--set", "ema_decay=0.9", "--set", "cutout=8", "--set", "jitter=0.2"]
    processes.train(tmp_path / "whole", size, uneven, *more)
    out = tmp_path / "part" / "run"
    out.mkdir(parents=True)
    whole = tmp_path / "whole" / "run"
    (out / "lzh_0.pth").write_bytes((whole / "lzh_0.pth").read_bytes())
    results = processes.train(tmp_path / "part", size, uneven, *more, "--resume", "auto")
    assert "10 steps, resuming from run/lzh_0.pth at step 5\n" in results[0].err
    require(load_checkpoint(out / "lzh_1.pth"), load_checkpoint(whole / "lzh_1.pth"))
    assert len(load_checkpoint(out / "lzh_1.pth").training["random"]["cpu"]) == size


@pytest.mark.slow
@needs_processes
def test_every_rank_draws_its_own_augmentation(processes: Processes, uneven: Path, tmp_path: Path) -> None:
    processes.train(tmp_path / "two", 2, uneven, "--set", "crop=2", "--epochs", "1")
    first, second = load_checkpoint(tmp_path / "two" / "run" / "lzh_0.pth").training["random"]["cpu"]
    assert not torch.equal(first, second)


@pytest.mark.slow
@needs_processes
def test_batch_norm_trains_with_two_ranks(processes: Processes, uneven: Path, tmp_path: Path) -> None:
    more = ["--recipe", "fast", "--batch-size", "64", "--epochs", "1"]
    processes.train(tmp_path / "two", 2, uneven, *more, model="fastnet")
    processes.train(tmp_path / "again", 2, uneven, *more, model="fastnet")
    two, again = (load_checkpoint(tmp_path / name / "run" / "fastnet_0.pth") for name in ("two", "again"))
    assert_same_checkpoint(two, again)
    assert any("running_mean" in name for name in two.weights)


@needs_processes
def test_ranks_that_find_different_checkpoints_fail(processes: Processes, uneven: Path, tmp_path: Path) -> None:
    processes.train(tmp_path, 1, uneven, "--epochs", "1")
    line = ["train", "--model", "lzh", "--data", str(uneven), "--batch-size", "32", "--epochs", "2", "--device", "cpu"]
    line += ["--resume", "auto", "--out"]
    for ran in processes.run(tmp_path, [*line, "run"], [*line, "elsewhere"]):
        assert ran.status == 2
        assert ran.out == ""
        assert "the processes found checkpoints of different steps (0, 5)" in ran.error
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
@needs_processes
def test_a_run_resumes_with_another_number_of_processes(processes: Processes, uneven: Path, tmp_path: Path) -> None:
    """Without random augmentation, the number of processes only changes the order of summation."""
    processes.train(tmp_path / "whole", 1, uneven, "--epochs", "3")
    for epoch, size in enumerate((1, 2, 1), 1):
        processes.train(tmp_path / "mixed", size, uneven, "--epochs", str(epoch), *["--resume", "auto"] * (epoch > 1))
    whole, mixed = (load_checkpoint(tmp_path / name / "run" / "lzh_2.pth") for name in ("whole", "mixed"))
    require_close(mixed, whole)
