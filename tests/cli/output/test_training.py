import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from cifarx.output.training import training_progress
from cifarx_serve.spec import InputSpec
from cifarx_train.callbacks.base import EpochReport, RunInfo, StepReport
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Evaluation
from cifarx_train.recipes import load_recipe

TEST = LabeledImages(np.zeros((1234, 2, 2, 3), np.uint8), np.zeros(1234, np.int64))
START = RunInfo(
    model="net",
    module=nn.Linear(1000, 2),
    input=InputSpec(height=2, width=2),
    recipe=load_recipe("fast"),
    seed=0,
    device="cpu",
    world_size=1,
    data="colors",
    class_names=("cat", "dog"),
    num_train_images=5678,
    test_set=TEST,
    total_steps=4000,
)


def test_describes_a_run_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    training_progress().on_train_start(START)
    out, err = capsys.readouterr()
    line, heading = err.splitlines()
    assert out == ""
    assert line == (
        "net, 2,002 parameters, recipe fast, fp32 on cpu: colors, 5,678 training and 1,234 test images, 4,000 steps"
    )
    assert heading.split() == ["epoch", "step", "train", "loss", "test", "loss", "accuracy", "images/s", "checkpoint"]


def test_describes_several_processes_and_a_resumed_run(capsys: pytest.CaptureFixture[str]) -> None:
    training_progress().on_train_start(
        START._replace(world_size=4, first_step=1500, resumed_from=Path("run/net_2.pth"))
    )
    line = capsys.readouterr().err.splitlines()[0]
    assert "on cpu with 4 processes: " in line
    assert line.endswith("4,000 steps, resuming from run/net_2.pth at step 1,500")


def test_prints_one_row_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    progress = training_progress()
    progress.on_train_start(START)
    progress.on_step_end(1)
    progress.on_log(StepReport(100, 0.5, 0.1, 2.0, 300.0))
    evaluation = Evaluation(0.75, 0.8125, np.zeros((2, 2), np.int64), [])
    progress.on_epoch_end(EpochReport(2, 10, 1200, 1.5, evaluation, 98_765.4, 0.1, Path("run/net_2.pth")))
    progress.on_train_end()
    _, heading, row = capsys.readouterr().err.splitlines()
    assert row.split() == ["3/10", "1,200", "1.5000", "0.7500", "81.25%", "98,765", "run/net_2.pth"]
    for title, value in (("step", "1,200"), ("train loss", "1.5000"), ("accuracy", "81.25%"), ("images/s", "98,765")):
        assert heading.index(title) + len(title) == row.index(value) + len(value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two classes with 130 training images each: enough steps at batch size 2 to log the loss once."""
    for split, count in (("train", 130), ("test", 5)):
        for name in ("black", "white"):
            class_folder = tmp_path / "data" / split / name
            class_folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), name).save(class_folder / f"{number}.png")
    return tmp_path / "data"


def train(folder: Path, **streams: object) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).with_name("cifarx")
    command = [program, "train", "--model", "lzh", "--data", folder, "--epochs", "1", "--batch-size", "2"]
    return subprocess.Popen([*map(str, command)], **streams)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
def test_a_pipe_gets_no_progress_bar(folder: Path) -> None:
    process = train(folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    lines = err.decode().splitlines()
    assert any("260 training and 10 test images, 130 steps" in line for line in lines)
    epoch = next(line for line in lines if line.strip().startswith("1/1"))
    assert epoch.endswith("lzh_0.pth")
    assert "nan" not in epoch  # the loss was logged at step 100
    assert b"\x1b" not in err + out


def test_a_terminal_gets_a_progress_bar(folder: Path) -> None:
    master, slave = pty.openpty()
    process = train(folder, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # raised by Linux when the other end is closed
        pass
    os.close(master)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert b"/130" in shown
    assert b"\x1b[" in shown
    assert b"lzh_0.pth" in out
