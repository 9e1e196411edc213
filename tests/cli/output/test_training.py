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
from cifarx_train.callbacks.base import EpochReport, RunStart, StepReport
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Evaluation
from cifarx_train.recipes import recipe

TEST = LabeledImages(np.zeros((1234, 2, 2, 3), np.uint8), np.zeros(1234, np.int64))
START = RunStart(
    model="net",
    module=nn.Linear(1000, 2),
    input=InputSpec(height=2, width=2),
    recipe=recipe("fast"),
    seed=0,
    device="cpu",
    ranks=1,
    data="colours",
    class_names=("cat", "dog"),
    train_images=5678,
    test=TEST,
    steps=4000,
)


def test_a_run_is_described_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    training_progress().on_start(START)
    out, err = capsys.readouterr()
    line, heading = err.splitlines()
    assert out == ""
    assert line == (
        "net, 2,002 parameters, recipe fast, on cpu: colours, 5,678 training and 1,234 test images, 4,000 steps"
    )
    assert heading.split() == ["epoch", "step", "train", "loss", "test", "loss", "accuracy", "images/s", "checkpoint"]


def test_other_processes_and_steps_done_before_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    training_progress().on_start(START._replace(ranks=4, first_step=1500))
    line = capsys.readouterr().err.splitlines()[0]
    assert "on cpu with 4 processes: " in line
    assert line.endswith("4,000 steps, 1,500 of them done")


def test_an_epoch_is_a_row_below_its_headings(capsys: pytest.CaptureFixture[str]) -> None:
    progress = training_progress()
    progress.on_start(START)
    progress.on_step(1)
    progress.on_log(StepReport(100, 0.5, 0.1, 2.0, 300.0))
    evaluation = Evaluation(0.75, 0.8125, np.zeros((2, 2), np.int64), [])
    progress.on_epoch(EpochReport(2, 10, 1200, 1.5, evaluation, 98_765.4, 0.1, Path("run/net_2.pth")))
    progress.on_end()
    _, heading, row = capsys.readouterr().err.splitlines()
    assert row.split() == ["3/10", "1,200", "1.5000", "0.7500", "81.25%", "98,765", "run/net_2.pth"]
    for title, value in (("step", "1,200"), ("train loss", "1.5000"), ("accuracy", "81.25%"), ("images/s", "98,765")):
        assert heading.index(title) + len(title) == row.index(value) + len(value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, 130 training images each: enough steps for one reading of the loss at batch 2."""
    for split, count in (("train", 130), ("test", 5)):
        for name in ("black", "white"):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), name).save(place / f"{number}.png")
    return tmp_path / "data"


def train(folder: Path, **streams: object) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).with_name("cifarx")
    command = [program, "train", "--model", "lzh", "--data", folder, "--epochs", "1", "--batch-size", "2"]
    return subprocess.Popen([*map(str, command)], **streams)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
def test_a_pipe_gets_plain_lines(folder: Path) -> None:
    process = train(folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    lines = err.decode().splitlines()
    assert any("260 training and 10 test images, 130 steps" in line for line in lines)
    epoch = next(line for line in lines if line.strip().startswith("1/1"))
    assert epoch.endswith("lzh_0.pth")
    assert "nan" not in epoch  # the loss was read at step 100
    assert b"\x1b" not in err + out


def test_a_terminal_gets_a_bar(folder: Path) -> None:
    master, slave = pty.openpty()
    process = train(folder, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other end has closed
        pass
    os.close(master)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert b"/130" in shown
    assert b"\x1b[" in shown
    assert b"lzh_0.pth" in out
