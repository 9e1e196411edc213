"""Training speed on a GPU by precision, memory format, kernel selection and CUDA graph, and the time to an accuracy."""

import gc
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from rich.table import Table

from cifarx_serve.backends.torch.device import torch_device
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import DeviceError
from cifarx_train.callbacks.base import Callback, EpochReport, RunInfo
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.selection import DATA_ENV_VAR, select_dataset
from cifarx_train.loop import TrainingLoop
from cifarx_train.models.registry import get_architecture
from cifarx_train.recipes import load_recipe
from cifarx_train.train import train

DATA = "auto" if DATA_ENV_VAR in os.environ else "builtin"
SECONDS = 0.7
WARMUP_STEPS = 10
RUNS = 5


class Setup(NamedTuple):
    """What is measured.

    Attributes:
        tuned: whether cuDNN measures its kernels and selects the fastest.
        graphed: whether a CUDA graph captures the step.
    """

    model: str
    recipe: str
    precision: str
    channels_last: bool
    tuned: bool = False
    graphed: bool = True
    batch_size: int | None = None


SETUPS = (
    Setup("lzh", "notes", "fp32", False),
    Setup("lzh", "notes", "fp32", False, graphed=False),
    Setup("lzh", "notes", "fp32", False, tuned=True),
    Setup("lzh", "notes", "bf16", True),
    Setup("fastnet", "fast", "bf16", True),
    Setup("fastnet", "fast", "bf16", True, graphed=False),
    Setup("fastnet", "fast", "bf16", True, tuned=True),
    Setup("fastnet", "fast", "bf16", False),
    Setup("fastnet", "fast", "fp32", False),
    Setup("fastnet", "fast", "fp32", True),
    Setup("resnet34", "notes", "fp32", False),
    Setup("resnet34", "notes", "fp32", False, graphed=False),
    Setup("resnet34", "notes", "fp32", False, tuned=True),
    Setup("resnet34", "fast", "bf16", True),
    Setup("resnet34", "fast", "bf16", True, tuned=True),
    Setup("resnet34", "fast", "fp32", False),
    Setup("resnet34", "fast", "fp32", True),
    Setup("resnet34", "fast", "bf16", True, batch_size=1024),
)


@pytest.fixture(scope="module")
def device() -> torch.device:
    """Return the first GPU."""
    try:
        return torch_device(parse_device("cuda"))
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def data() -> LabeledImages:
    """Return the training images of `$CIFARX_DATA`, or of the built-in data."""
    return select_dataset(DATA).load("train", get_architecture("lzh").input)


@pytest.fixture(scope="module")
def table(tables: list[Table]) -> Iterator[Table]:
    """The table of the images per second, printed at the end."""
    headings = ("network", "recipe", "batch", "precision", "channels last", "cuDNN measures", "graph")
    made = Table(*headings, "images/s", "µs a step", "MiB", title="training on one GPU, images in its memory")
    for column in made.columns[7:]:
        column.justify = "right"
    yield made
    tables.append(made)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: "-".join(map(str, setup)))
def test_images_per_s(
    setup: Setup, device: torch.device, data: LabeledImages, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", setup.tuned)
    gc.collect()  # the graphs of earlier loops
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    loop, batch_size = _create_loop(setup, device, data)
    _run(loop, WARMUP_STEPS)
    steps = max(WARMUP_STEPS, round(SECONDS / _run(loop, WARMUP_STEPS)))
    step_s = statistics.median(_run(loop, steps) for _ in range(3))
    choices = ("yes" if chosen else "no" for chosen in (setup.channels_last, setup.tuned, setup.graphed))
    speed = (f"{batch_size / step_s:,.0f}", f"{step_s * 1e6:,.0f}", f"{torch.cuda.max_memory_reserved() >> 20:,}")
    table.add_row(setup.model, setup.recipe, str(batch_size), setup.precision, *choices, *speed)


def _create_loop(setup: Setup, device: torch.device, data: LabeledImages) -> tuple[TrainingLoop, int]:
    values = {"precision": setup.precision, "channels_last": setup.channels_last, "batch_size": setup.batch_size}
    recipe = load_recipe(setup.recipe, setup.model, {"epochs": 10_000, **values})
    architecture = get_architecture(setup.model)
    torch.manual_seed(0)
    module = architecture.build(10).to(device)
    images = DeviceLoader(data, device)
    if setup.graphed:
        return TrainingLoop(module, images, architecture.input, recipe, device=device), recipe.batch_size
    with patch("cifarx_train.loop.can_capture", return_value=False):
        return TrainingLoop(module, images, architecture.input, recipe, device=device), recipe.batch_size


def _run(loop: TrainingLoop, steps: int) -> float:
    """Train for a number of steps, and return the seconds per step, including the work of the device."""
    last = loop.step + steps
    started = time.perf_counter()
    for _ in loop.train_epochs(Callback(), lambda: loop.step >= last):
        pass
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


class _Watch(Callback):
    """Adds up the training time, without evaluation and checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_start(self, run: RunInfo) -> None:
        self._images = run.num_train_images

    def on_epoch_end(self, report: EpochReport) -> None:
        self.seconds += self._images / report.images_per_s
        self.accuracy = report.evaluation.accuracy


@pytest.mark.parametrize("overrides", [{}, {"precision": "fp32"}], ids=["default", "fp32"])
def test_seconds_of_fastnet(overrides: dict[str, Any], device: torch.device, tmp_path: Path, notes: list[str]) -> None:
    runs: list[_Watch] = []
    for seed in range(RUNS + 1):  # the first run warms up
        watch = _Watch()
        train(
            "fastnet",
            data=DATA,
            recipe_name="fast",
            device=str(device),
            seed=seed,
            out=tmp_path / str(seed),
            callbacks=[watch],
            **overrides,
        )
        runs.append(watch)
    seconds, accuracies = zip(*((run.seconds, 100 * run.accuracy) for run in runs[1:]), strict=True)
    changes = "".join(f", {field} {value}" for field, value in overrides.items())
    notes.append(
        f"fastnet on {select_dataset(DATA).name}, fast{changes}: "
        f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} % after "
        f"{statistics.mean(seconds):.2f} ± {statistics.stdev(seconds):.2f} s of training, {RUNS} seeds"
    )
