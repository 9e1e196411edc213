"""Training speed compared with the loop of the notes, two processes compared with one, and the cost of a checkpoint."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.support.limits import require
from benchmarks.support.notes_loop import NotesLoop, OurLoop
from cifarx_serve.backends.torch.device import torch_device
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import DeviceError
from cifarx_train.callbacks.base import Callback, EpochReport, RunInfo
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.selection import DATA_ENV_VAR, select_dataset
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.registry import get_architecture
from cifarx_train.recipes import load_recipe
from cifarx_train.train import train

ROUNDS = 6
STEPS = {"lzh": 40, "resnet34": 4}  # a few seconds per turn on two cores
GPU_STEPS = 2_000
"""Steps of our loop per turn on a GPU: each turn copies the order of the images and reads the loss, which takes as long
as many steps."""
GPU_NOTES_STEPS = 200
LEAST = {("cpu", "lzh"): 1.15, ("cpu", "resnet34"): 1.15, ("cuda", "lzh"): 50.0, ("cuda", "resnet34"): 5.0}

RANK_ROUNDS = 3
MOST_LOST_BY_TWO_RANKS = 0.15
MOST_FOR_A_CHECKPOINT = 0.05


@pytest.fixture(scope="module")
def data() -> LabeledImages:
    """Return the training images of `$CIFARX_DATA`, or of the built-in data."""
    return select_dataset("auto" if DATA_ENV_VAR in os.environ else "builtin").load(
        "train", get_architecture("lzh").input
    )


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return a device of this machine."""
    try:
        return torch_device(parse_device(request.param))
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", list(STEPS))
def test_images_per_s_against_the_notes_loop(
    name: str, device: torch.device, data: LabeledImages, tmp_path: Path, notes: list[str]
) -> None:
    chosen = get_architecture(name)
    plan = load_recipe("notes", overrides={"epochs": 1000})
    notes_loop = NotesLoop(_first(chosen), data, device, tmp_path)
    ours = OurLoop(_first(chosen), data, chosen.input, plan, device)
    our_steps, notes_steps = (GPU_STEPS, GPU_NOTES_STEPS) if device.type == "cuda" else (STEPS[name], STEPS[name])
    speeds = [(_speed(notes_loop, notes_steps, device), _speed(ours, our_steps, device)) for _ in range(ROUNDS + 1)][1:]
    ratio = statistics.median(our / their for their, our in speeds)
    their, our = (statistics.median(column) for column in zip(*speeds, strict=True))
    least = LEAST[device.type, name]
    notes.append(
        f"training {name} on {device}, notes, batch 64: {our:,.0f} images/s, the loop of the notes {their:,.0f}, "
        f"ratio {ratio:.2f} (at least {least}), median of {ROUNDS} turns"
    )
    require(ratio >= least, f"{ratio:.2f} is under {least}")


def _first(chosen: Architecture) -> nn.Module:
    torch.manual_seed(0)
    return chosen.build(10)


def _speed(loop: NotesLoop | OurLoop, steps: int, device: torch.device) -> float:
    """Return the images per second over a number of steps, including the work of the device."""
    started = time.perf_counter()
    loop.train(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 64 * steps / (time.perf_counter() - started)


def test_two_processes_on_two_cores_against_one(tmp_path: Path, notes: list[str]) -> None:
    arguments = ["-m", "cifarx", "train", "--model", "lzh", "--data", "builtin", "--lr", "0.02", "--epochs", "2"]
    single = [sys.executable, *arguments]
    several = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", *arguments]
    speeds: dict[str, list[float]] = {"one": [], "two": []}
    for number in range(RANK_ROUNDS):
        for name, command in (("one", single), ("two", several)):
            ran = subprocess.run(
                [*command, "--device", "cpu", "--json", "--out", str(tmp_path / f"{name}{number}")],
                capture_output=True,
                text=True,
                check=True,
            )
            speeds[name].append(json.loads(ran.stdout)["images_per_s"])
    ratio = statistics.median(two / one for one, two in zip(speeds["one"], speeds["two"], strict=True))
    one, two = (statistics.median(speeds[name]) for name in ("one", "two"))
    least = 1 - MOST_LOST_BY_TWO_RANKS
    notes.append(
        f"training lzh on the CPU, batch 64: two processes {two:,.0f} images/s, one with all threads {one:,.0f}; "
        f"ratio {ratio:.2f} (at least {least:.2f}), median of {RANK_ROUNDS} pairs"
    )
    require(ratio >= least, f"{ratio:.2f} is under {least}")


class _Costs(Callback):
    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_train_start(self, run: RunInfo) -> None:
        self._images = run.num_train_images

    def on_epoch_end(self, report: EpochReport) -> None:
        self.shares.append(report.checkpoint_s * report.images_per_s / self._images)


def test_a_checkpoint_costs_little_of_an_epoch(tmp_path: Path, notes: list[str]) -> None:
    costs = _Costs()
    done = train("lzh", data="builtin", epochs=3, learning_rate=0.02, device="cpu", out=tmp_path, callbacks=[costs])
    share = statistics.median(costs.shares)
    notes.append(
        f"a checkpoint of lzh takes {share:.2%} of an epoch of 10,000 images (at most {MOST_FOR_A_CHECKPOINT:.0%}); "
        f"the run took {done.peak_memory_bytes / 2**20:,.0f} MiB at most"
    )
    require(share <= MOST_FOR_A_CHECKPOINT, f"{share:.2%} is over {MOST_FOR_A_CHECKPOINT:.0%}")
