"""Several processes that train together: forked here, with the environment that torchrun gives. On loopback."""

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
from tests.support.command_line import Ran
from tests.support.drawn_images import draw_folder
from tests.support.same_runs import require_same

# float32 sums in another order; a step of the notes' recipe multiplies them by 0.01.
TOLERANCE = 2e-6

needs_processes = pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available(), reason="a POSIX system and PyTorch's processes"
)

# PyTorch takes seconds to load: one process loads it and trains nothing; its children are the ranks.
_PARENT = """
import gc, json, os, socket, sys
import PIL.PngImagePlugin, torch, torch._dynamo, torchvision
import cifarx.commands.train, cifarx.output.training, cifarx_train.train
from torch import distributed
from cifarx.main import main
from cifarx_train.distributed import init_distributed

def probe():
    with init_distributed() as ranks:
        module = torch.nn.BatchNorm1d(2)
        module.running_mean.fill_(ranks.rank)
        ranks.align(module)
        order = []
        with ranks.main_process_first():
            order.append(len(os.listdir(".")))
            open(f"rank{ranks.rank}", "w").close()
        found = {
            "ranks": list(ranks),
            "is_main_process": ranks.is_main_process,
            "total": ranks.total(torch.tensor([1.0, ranks.rank])).tolist(),
            "any": [ranks.any(False), ranks.any(ranks.rank == 1), ranks.any(True)],
            "gather": [part.tolist() for part in ranks.gather(torch.tensor([ranks.rank, 7]))],
            "mean": module.running_mean.tolist(),
            "files_before": order[0],
        }
    print(json.dumps({**found, "left": not distributed.is_initialized()}))

def part(leave=distributed.destroy_process_group):
    # A replica that outlives its group aborts the process at its end, one time in ten.
    replica = torch.nn.parallel.DistributedDataParallel
    assert not [thing for thing in gc.get_objects() if isinstance(thing, replica)]
    leave()

distributed.destroy_process_group = part

def child(ask, rank, port):
    os.chdir(ask["folder"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    size = len(ask["arguments"])
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in torchrun.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"})
    sys.argv = ["cifarx", *ask["arguments"][rank]]
    probe() if ask["arguments"][rank] == ["probe"] else main()

print("ready", flush=True)
while line := sys.stdin.readline():
    ask = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(len(ask["arguments"])):
        children.append(os.fork())
        if not children[-1]:
            status = 70
            try:
                child(ask, rank, port)
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
    """Starts several processes that are to train together."""

    parent: "subprocess.Popen[str]"

    def run(self, folder: Path, *arguments: list[str]) -> list[Ran]:
        """Each with its own arguments, in the folder; what each left."""
        folder.mkdir(exist_ok=True)
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        print(json.dumps({"folder": str(folder), "arguments": arguments}), file=self.parent.stdin, flush=True)
        states = json.loads(self.parent.stdout.readline())
        return [
            Ran(status, (folder / f"out{rank}").read_text(), (folder / f"err{rank}").read_text())
            for rank, status in enumerate(states)
        ]

    def train(self, folder: Path, size: int, data: Path, *more: str, model: str = "lzh") -> list[Ran]:
        """Two epochs in batches of 32 by default; the checkpoints lie in `run` below the folder."""
        line = ["train", "--model", model, "--data", str(data), "--epochs", "2", "--batch-size", "32"]
        line += ["--device", "cpu", "--out", "run", *more]
        everyone = self.run(folder, *[line] * size)
        assert [ran.status for ran in everyone] == [0] * size, "\n".join(ran.err for ran in everyone)
        return everyone


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
    """129 training images, where the last batch of 32 would be a single image; 15 test images."""
    return draw_folder(tmp_path_factory.mktemp("odd") / "colours", train=43, test=5)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """135 training images, four batches of 32 and one of seven; 21 test images."""
    return draw_folder(tmp_path_factory.mktemp("uneven") / "colours", train=45, test=7)


def require_close(one: Checkpoint, other: Checkpoint) -> None:
    """Equal but for the order of sums: weights, loss and accuracy."""
    for name, weight in one.model.items():
        assert torch.allclose(weight, other.model[name], rtol=0, atol=TOLERANCE), name
    record, reference = one.spec.training, other.spec.training
    assert record is not None
    assert reference is not None
    assert record.test_loss == pytest.approx(reference.test_loss, abs=10 * TOLERANCE)
    assert record.test_accuracy == reference.test_accuracy
    assert one.training["step"] == other.training["step"]


# --- one process


def test_alone_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with init_distributed() as ranks:
        assert ranks == Distributed(0, 1, 0, 1)
        assert ranks.is_main_process
        assert ranks.any(True)
        assert not ranks.any(False)
        assert ranks.total(torch.tensor(3.0)) == 3
        assert [part.item() for part in ranks.gather(torch.tensor(4))] == [4]
        module = torch.nn.Linear(2, 2)
        assert ranks.replicate(module) is module
        ranks.align(module)
        with ranks.main_process_first():
            pass
        assert not torch.distributed.is_initialized()


def test_torchrun_with_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    with init_distributed() as ranks:
        assert ranks == Distributed()
        assert not torch.distributed.is_initialized()


def test_an_environment_of_torchrun_in_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"has RANK, WORLD_SIZE alone.*torchrun"), init_distributed():
        pass


@given(st.integers(1, 300), st.integers(1, 9))
def test_the_shares_of_a_batch_are_the_batch(count: int, size: int) -> None:
    batch = torch.arange(count)
    shares = [Distributed(rank, size).share(batch) for rank in range(size)]
    together = Distributed(0, size).shared(count)
    assert sum(map(len, shares)) == together
    if count < 2 * size:  # BatchNorm cannot train on a single image
        assert all(torch.equal(share, batch) for share in shares)
    else:
        assert together == count
        assert torch.equal(torch.cat(shares).sort().values, batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 60), st.integers(2, 5))
def test_the_weighted_mean_over_the_ranks_is_the_mean_over_the_batch(count: int, size: int) -> None:
    """As the loop weighs each rank's loss before DDP averages."""
    losses = torch.rand(count, dtype=torch.float64)
    shares = [Distributed(rank, size).share(losses) for rank in range(size)]
    together = Distributed(0, size).shared(count)
    mean = sum(share.mean() * len(share) * size / together for share in shares) / size
    assert mean == pytest.approx(losses.mean().item())


# --- several processes


@needs_processes
def test_what_ranks_do_together(processes: Processes, tmp_path: Path) -> None:
    everyone = processes.run(tmp_path / "probe", ["probe"], ["probe"], ["probe"])
    for rank, ran in enumerate(everyone):
        assert ran.status == 0, ran.err
        found = ran.json
        assert found["ranks"] == [rank, 3, rank, 3]
        assert found["is_main_process"] is (rank == 0)
        assert found["total"] == [3.0, 3.0]
        assert found["any"] == [False, True, True]
        assert found["gather"] == [[0, 7], [1, 7], [2, 7]]
        assert found["mean"] == [0.0, 0.0]
        assert found["left"]
    # The first rank is alone in its block: the others find what it left beside the six streams.
    assert everyone[0].json["files_before"] < min(ran.json["files_before"] for ran in everyone[1:])


@needs_processes
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("data", ["odd", "uneven"])
def test_several_ranks_train_what_one_trains(
    processes: Processes, request: pytest.FixtureRequest, tmp_path: Path, data: str, size: int
) -> None:
    folder: Path = request.getfixturevalue(data)
    processes.train(tmp_path / "one", 1, folder)
    everyone = processes.train(tmp_path / "many", size, folder)
    for name in ("lzh_0.pth", "lzh_1.pth"):
        require_close(
            load_checkpoint(tmp_path / "many" / "run" / name), load_checkpoint(tmp_path / "one" / "run" / name)
        )
    assert everyone[0].out.count("\n") == 1
    assert everyone[0].out.startswith("run/lzh_1.pth: ")
    assert f"with {size} processes" in everyone[0].err
    for ran in everyone[1:]:
        assert ran.out == ""
        assert not any(word in ran.err for word in ("loading", "note:", "epoch", "next:", "error:")), ran.err


@pytest.mark.slow
@needs_processes
def test_momentum_schedule_and_clipping_mean_the_same_with_several_ranks(
    processes: Processes, uneven: Path, tmp_path: Path
) -> None:
    more = ["--set", "momentum=0.9", "--set", "schedule=cosine", "--set", "warm_up=0.3", "--set", "max_grad_norm=0.5"]
    more += ["--set", "ema=0.9", "--set", "label_smoothing=0.1", "--set", "normalize=true"]
    processes.train(tmp_path / "one", 1, uneven, *more)
    processes.train(tmp_path / "two", 2, uneven, *more)
    one, two = (load_checkpoint(tmp_path / name / "run" / "lzh_1.pth") for name in ("one", "two"))
    require_close(two, one)


@pytest.mark.slow
@needs_processes
def test_more_ranks_than_test_images(processes: Processes, tmp_path: Path) -> None:
    """A rank without a test image, and batches with fewer images than ranks."""
    data = draw_folder(tmp_path / "colours", train=3, test=1)
    more = ["--batch-size", "4"]
    processes.train(tmp_path / "one", 1, data, *more)
    processes.train(tmp_path / "five", 5, data, *more)
    one, five = (load_checkpoint(tmp_path / name / "run" / "lzh_1.pth") for name in ("one", "five"))
    require_close(five, one)


@pytest.mark.slow
@needs_processes
@pytest.mark.parametrize(("size", "require"), [(2, require_same), (3, require_close)], ids=["2", "3"])
def test_several_ranks_go_on_as_if_nothing_had_happened(
    processes: Processes, uneven: Path, tmp_path: Path, size: int, require: Callable[[Checkpoint, Checkpoint], None]
) -> None:
    """With augmentation, each rank draws its own numbers and goes on drawing them.

    Two sum in one order only. More do not: DDP sorts its buckets anew after the first step of a process.
    """
    more = ["--recipe", "fast", "--set", "ema=0.9", "--set", "cutout=8", "--set", "jitter=0.2"]
    processes.train(tmp_path / "whole", size, uneven, *more)
    out = tmp_path / "part" / "run"
    out.mkdir(parents=True)
    whole = tmp_path / "whole" / "run"
    (out / "lzh_0.pth").write_bytes((whole / "lzh_0.pth").read_bytes())
    everyone = processes.train(tmp_path / "part", size, uneven, *more, "--resume", "auto")
    assert "5 of them done" in everyone[0].err
    require(load_checkpoint(out / "lzh_1.pth"), load_checkpoint(whole / "lzh_1.pth"))
    assert len(load_checkpoint(out / "lzh_1.pth").training["random"]["cpu"]) == size


@pytest.mark.slow
@needs_processes
def test_the_ranks_draw_different_augmentation(processes: Processes, uneven: Path, tmp_path: Path) -> None:
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
    require_same(two, again)
    assert any("running_mean" in name for name in two.model)


@needs_processes
def test_ranks_that_find_different_checkpoints_are_told(processes: Processes, uneven: Path, tmp_path: Path) -> None:
    processes.train(tmp_path, 1, uneven, "--epochs", "1")
    line = ["train", "--model", "lzh", "--data", str(uneven), "--batch-size", "32", "--epochs", "2", "--device", "cpu"]
    line += ["--resume", "auto", "--out"]
    everyone = processes.run(tmp_path, [*line, "run"], [*line, "elsewhere"])
    for ran in everyone:
        assert ran.status == 2
        assert ran.out == ""
        assert "the processes found checkpoints of different steps (0, 5)" in ran.error
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
@needs_processes
def test_a_run_of_one_goes_on_with_two_and_back(processes: Processes, uneven: Path, tmp_path: Path) -> None:
    """Without anything random: the number of processes changes the order of sums alone."""
    processes.train(tmp_path / "whole", 1, uneven, "--epochs", "3")
    for epoch, size in enumerate((1, 2, 1), 1):
        processes.train(tmp_path / "mixed", size, uneven, "--epochs", str(epoch), *["--resume", "auto"] * (epoch > 1))
    whole, mixed = (load_checkpoint(tmp_path / name / "run" / "lzh_2.pth") for name in ("whole", "mixed"))
    require_close(mixed, whole)
