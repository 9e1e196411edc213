import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len
from torch import nn

from cifarx.output.training import class_table, training_progress
from cifarx_serve.spec import InputSpec
from cifarx_train.calibration import Calibration
from cifarx_train.callbacks.base import EpochReport, FinalReport, RunInfo, StepReport
from cifarx_train.classification_metrics import class_metrics
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
    titles = ["epoch", "step", "train loss", "test loss", "accuracy", "images/s", "worst class F1", "checkpoint"]
    assert heading.split() == " ".join(titles).split()


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
    evaluation = Evaluation(0.75, 0.8125, np.array([[1, 3], [0, 12]]), [])
    progress.on_epoch_end(EpochReport(2, 10, 1200, 1.5, evaluation, 98_765.4, 0.1, Path("run/net_2.pth")))
    progress.on_train_end()
    _, heading, row = capsys.readouterr().err.splitlines()
    assert row.split() == ["3/10", "1,200", "1.5000", "0.7500", "81.25%", "98,765", "cat", "40%", "run/net_2.pth"]
    assert heading.index("checkpoint") == row.index("run/")
    for title, value in (("step", "1,200"), ("train loss", "1.5000"), ("accuracy", "81.25%"), ("images/s", "98,765")):
        assert heading.index(title) + len(title) == row.index(value) + len(value)


def test_a_run_that_chooses_on_val_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    val = LabeledImages(np.zeros((99, 2, 2, 3), np.uint8), np.zeros(99, np.int64))
    training_progress().on_train_start(START._replace(val_set=val, num_calibration_images=7))
    line, heading = capsys.readouterr().err.splitlines()
    assert "5,678 training, 99 val, 7 calibration and 1,234 test images" in line
    assert "val loss" in heading
    assert "test loss" not in heading


def test_a_row_fits_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    progress = training_progress()
    progress.on_train_start(START._replace(class_names=("\N{CJK UNIFIED IDEOGRAPH-732B}" * 20, "hippopotamus")))
    evaluation = Evaluation(0.75, 0.8125, np.array([[0, 4], [0, 12]]), [])
    progress.on_epoch_end(EpochReport(9, 10, 12_345, 1.5, evaluation, 98_765.4, 0.1, Path("lzh_9.pth")))
    _, heading, row = capsys.readouterr().err.splitlines()
    assert cell_len(heading) <= 80
    assert cell_len(row) <= 80
    assert row.endswith("\N{CJK UNIFIED IDEOGRAPH-732B}" * 4 + ".. 0%   lzh_9.pth")


@pytest.mark.parametrize(
    ("counts", "recipe", "expected"),
    [
        (
            (900, 10),
            {},
            "note: 1 class is rare, dog (10 images): less than 20% of an equal share, which accuracy hardly",
        ),
        ((900, 100), {}, None),
        ((900, 10), {"class_weights": "auto"}, None),
        ((900, 10), {"sampler": "balanced"}, None),
    ],
)
def test_a_note_names_rare_classes(
    counts: tuple[int, int], recipe: dict[str, str], expected: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    training_progress().on_train_start(START._replace(class_counts=counts, recipe=load_recipe("fast", None, recipe)))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    if expected is None:
        assert notes == []
        return
    assert notes[0].startswith(expected)
    assert notes[0].endswith("try --class-weights auto or --sampler balanced")


def test_the_table_of_a_few_classes_has_all_of_them() -> None:
    lines = class_table(class_metrics(np.array([[8, 2, 0], [0, 10, 0], [0, 0, 0]]), ("cat", "dog", "gnu")))
    assert [line.split() for line in lines] == [
        ["class", "precision", "recall", "F1", "images"],
        ["cat", "100.0%", "80.0%", "88.9%", "10"],
        ["dog", "83.3%", "100.0%", "90.9%", "10"],
        ["gnu", "0.0%", "-", "-", "0"],
        ["macro", "average", "91.7%", "90.0%", "89.9%", "20"],
    ]
    assert len(set(map(len, lines))) == 1


def test_the_table_of_many_classes_has_the_worst_ones() -> None:
    names = [f"class {number} {'x' * 300}" for number in range(1000)]
    matrix = np.eye(1000, dtype=np.int64) * 9
    matrix[7, 7], matrix[7, 8] = 1, 8
    lines = class_table(class_metrics(matrix, names))
    assert len(lines) == 13
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("class 7 xxx")
    assert lines[-2] == "and 990 classes with a higher F1, which --json and TensorBoard list"


def test_the_end_of_a_run_is_a_table_and_the_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    progress = training_progress()
    progress.on_train_start(START)
    evaluation = Evaluation(0.75, 0.8125, np.array([[1, 3], [0, 12]]), [])
    progress.on_test_end(
        FinalReport(Path("net_9.pth"), 9, evaluation, calibration=Calibration(1.25, 567, "train", 0.125, 0.03125))
    )
    lines = capsys.readouterr().err.splitlines()[2:]
    assert lines[0] == "net_9.pth on the 16 test images:"
    assert [line.split()[0] for line in lines[1:]] == ["class", "cat", "dog", "macro", "calibrated"]
    assert lines[-1] == (
        "calibrated on 567 training images that were held out: temperature 1.25, expected calibration error on the "
        "test images 12.50% before, 3.12% after"
    )


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
