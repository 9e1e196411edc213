import io
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

import cifarx_train.train
from cifarx_serve.errors import FallbackWarning
from cifarx_serve.spec import InputSpec
from cifarx_train.calibration import Calibration
from cifarx_train.callbacks.base import Callback, EpochReport, FinalReport, RunInfo, StepReport
from cifarx_train.callbacks.tensorboard.callback import TensorBoard
from cifarx_train.callbacks.tensorboard.event_writer import visible_events
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Evaluation, Mistake
from cifarx_train.models.registry import get_architecture
from cifarx_train.recipes import load_recipe
from cifarx_train.train import train

NAMES = ("blue", "green", "red")
IMAGES = LabeledImages(np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8), np.arange(9) % 3)
EPOCH_STEPS = 250


def run_info(*, epochs: int = 4, first_step: int = 0, module: nn.Module | None = None, names: Any = NAMES) -> RunInfo:
    recipe = load_recipe("notes", "lzh", {"epochs": epochs, "nesterov": False})
    spec = InputSpec(height=8, width=8)
    steps = epochs * EPOCH_STEPS
    model = module or nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    return RunInfo("lzh", model, spec, recipe, 7, "cpu", 1, "drawings", names, 9, IMAGES, steps, first_step)


def step_report(step: int, loss: float) -> StepReport:
    return StepReport(step, loss, learning_rate=0.5 / step, grad_norm=step / 4, images_per_s=step * 8.0)


def epoch_report(epoch: int, loss: float = 1.5, accuracy: float = 0.5, mistakes: int = 2) -> EpochReport:
    wrong = [Mistake(position, 2 - position, 0.75) for position in range(mistakes)]
    evaluation = Evaluation(loss, accuracy, np.full((3, 3), epoch + 1), wrong)
    return EpochReport(epoch, 4, EPOCH_STEPS * (epoch + 1), 0.25, evaluation, 100.0, 0.5, Path(f"lzh_{epoch}.pth"))


def send_events(board: TensorBoard, epochs: range, loss: float, *, from_step: int = 0) -> None:
    """Send the events of a run for these epochs, with the same loss in all of them."""
    for epoch in epochs:
        for step in range(EPOCH_STEPS * epoch + 1, EPOCH_STEPS * (epoch + 1) + 1):
            if step % 100 == 0 and step > from_step:
                board.on_log(step_report(step, loss))
        board.on_epoch_end(epoch_report(epoch, loss))


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), {"images": 0, "scalars": 0}, purge_orphaned_data=True).Reload()


def read_scalar(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_events(folder).Scalars(tag)]


def read_images(folder: Path, tag: str) -> list[tuple[int, Image.Image]]:
    return [
        (event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in read_events(folder).Images(tag)
    ]


def test_all_scalars(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "logs")
    board.on_train_start(run_info())
    board.on_log(step_report(100, 2.25))
    board.on_log(step_report(200, 1.75))
    board.on_epoch_end(epoch_report(0, 1.5, 0.5))
    board.on_epoch_end(epoch_report(1, 1.25, 0.625))
    board.on_train_end()
    seen = read_events(tmp_path / "logs")
    curves = {tag: [(event.step, event.value) for event in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]}
    memory = curves.pop("memory_mib")
    assert curves == {
        "train_loss": [(100, 2.25), (200, 1.75)],
        "learning_rate": [(100, pytest.approx(0.005)), (200, pytest.approx(0.0025))],
        "gradient_norm": [(100, 25.0), (200, 50.0)],
        "images_per_s": [(100, 800.0), (200, 1600.0)],
        "test_loss": [(0, 1.5), (1, 1.25)],
        "accuracy": [(0, 0.5), (1, 0.625)],
        "checkpoint_s": [(0, 0.5), (1, 0.5)],
    }
    assert [epoch for epoch, _ in memory] == [0, 1]
    assert all(10 < mib < 2**20 for _, mib in memory)


def test_every_event_is_readable_during_the_run(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info())
    board.on_log(step_report(100, 2.25))
    assert read_scalar(tmp_path, "train_loss") == [(100, 2.25)]
    board.on_epoch_end(epoch_report(0))
    assert read_scalar(tmp_path, "accuracy") == [(0, 0.5)]
    board.on_train_end()


def test_a_run_writes_a_single_file(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info())
    board.on_epoch_end(epoch_report(0))
    board.on_train_end()
    [only] = tmp_path.iterdir()
    assert "tfevents" in only.name


def test_every_epoch_has_images(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info())
    board.on_epoch_end(epoch_report(0, mistakes=2))
    board.on_epoch_end(epoch_report(1, mistakes=0))
    board.on_train_end()
    mistakes, confusion = read_images(tmp_path, "mistakes"), read_images(tmp_path, "confusion")
    assert [epoch for epoch, _ in mistakes] == [epoch for epoch, _ in confusion] == [0, 1]
    assert mistakes[0][1].width > mistakes[1][1].width
    assert confusion[0][1].tobytes() != confusion[1][1].tobytes()


def read_text(folder: Path, tag: str) -> list[tuple[int, str]]:
    return [
        (event.step, value.tensor.string_val[0].decode())
        for event in visible_events(folder)
        for value in event.summary.value
        if value.tag == f"{tag}/text_summary"
    ]


def test_every_epoch_has_a_table_of_the_classes_with_the_worst_first(tmp_path: Path) -> None:
    matrix = np.array([[9, 1, 0], [0, 10, 0], [5, 0, 5]])
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info(names=("a|b", "<i>green</i>", "red")))
    first = epoch_report(0)
    board.on_epoch_end(first._replace(evaluation=first.evaluation._replace(confusion_matrix=matrix)))
    board.on_train_end()
    [(epoch, table)] = read_text(tmp_path, "classes")
    assert epoch == 0
    assert table.splitlines()[2:] == [
        "| red | 100.00% | 50.00% | 66.67% | 10 |",
        "| a\\|b | 64.29% | 90.00% | 75.00% | 10 |",
        "| <i>green</i> | 90.91% | 100.00% | 95.24% | 10 |",
        "| **macro average** | 85.06% | 80.00% | 78.97% | 30 |",
    ]


def send_val_run(folder: Path, first_epoch: int) -> None:
    """Log a run with a val split from an epoch on, which ends after its fourth epoch and chooses its second."""
    board = TensorBoard(folder)
    run = run_info(first_step=first_epoch * EPOCH_STEPS)
    board.on_train_start(run._replace(val_set=IMAGES))
    send_events(board, range(first_epoch, 4), 4.0)
    final = epoch_report(1, loss=5.0, accuracy=0.25).evaluation
    board.on_test_end(FinalReport(Path("lzh_1.pth"), 1, final, 0.5, Calibration(1.5, 100, "val", 0.25, 0.125)))
    board.on_train_end()


@pytest.mark.parametrize("resumed_after", [None, 2, 4])
def test_the_tags_of_a_run_with_a_val_split_name_the_split(resumed_after: int | None, tmp_path: Path) -> None:
    send_val_run(tmp_path, 0)
    if resumed_after is not None:
        send_val_run(tmp_path, resumed_after)
    epochs = range(4)
    assert read_scalar(tmp_path, "val_loss") == [(epoch, 4.0) for epoch in epochs]
    assert read_scalar(tmp_path, "val_accuracy") == [(epoch, 0.5) for epoch in epochs]
    assert read_scalar(tmp_path, "test_loss") == [(1, 5.0)]
    assert read_scalar(tmp_path, "test_accuracy") == [(1, 0.25)]
    assert read_scalar(tmp_path, "temperature") == [(1, 1.5)]
    assert read_scalar(tmp_path, "calibration_error_before") == [(1, 0.25)]
    assert read_scalar(tmp_path, "calibration_error") == [(1, 0.125)]
    for name in ("confusion", "mistakes"):
        assert [epoch for epoch, _ in read_images(tmp_path, f"val_{name}")] == list(epochs)
        assert [epoch for epoch, _ in read_images(tmp_path, f"test_{name}")] == [1]
    assert [epoch for epoch, _ in read_text(tmp_path, "val_classes")] == list(epochs)
    assert [epoch for epoch, _ in read_text(tmp_path, "test_classes")] == [1]
    tags = read_events(tmp_path).Tags()
    assert "accuracy" not in tags["scalars"]
    metrics = plugin_data(tmp_path, "_hparams_/experiment").experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"val_accuracy", "val_loss", "test_accuracy", "test_loss"}


def test_too_many_classes_have_no_confusion_matrix(tmp_path: Path) -> None:
    names = tuple(map(str, range(1001)))
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info(names=names))
    first = epoch_report(0)
    board.on_epoch_end(
        first._replace(evaluation=first.evaluation._replace(confusion_matrix=np.eye(1001, dtype=np.int64)))
    )
    board.on_train_end()
    assert read_events(tmp_path).Tags()["images"] == ["mistakes"]


# --- several runs in one directory


def test_a_later_run_hides_an_earlier_one_from_the_same_second(tmp_path: Path) -> None:
    for loss, epochs in ((4.0, 4), (2.0, 2), (3.0, 1)):
        board = TensorBoard(tmp_path)
        board.on_train_start(run_info())
        send_events(board, range(epochs), loss)
        board.on_train_end()
    assert read_scalar(tmp_path, "train_loss") == [(100, 3.0), (200, 3.0)]
    assert read_scalar(tmp_path, "test_loss") == [(0, 3.0)]
    assert [epoch for epoch, _ in read_images(tmp_path, "mistakes")] == [0]


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_resumed_from_an_earlier_epoch_has_no_duplicate_points(tmp_path: Path, times: int) -> None:
    killed = TensorBoard(tmp_path)
    killed.on_train_start(run_info())
    send_events(killed, range(4), 4.0)
    killed.on_log(step_report(1100, 4.0))  # killed in its fifth epoch
    for _ in range(times):
        board = TensorBoard(tmp_path)
        board.on_train_start(run_info(first_step=2 * EPOCH_STEPS))
        send_events(board, range(2, 3), 2.0)
        board.on_train_end()
    before = [(step, 4.0) for step in (100, 200, 300, 400, 500)]
    assert read_scalar(tmp_path, "train_loss") == [*before, (600, 2.0), (700, 2.0)]
    assert [step for step, _ in read_scalar(tmp_path, "learning_rate")] == [100, 200, 300, 400, 500, 600, 700]
    assert read_scalar(tmp_path, "test_loss") == [(0, 4.0), (1, 4.0), (2, 2.0)]
    assert [epoch for epoch, _ in read_scalar(tmp_path, "memory_mib")] == [0, 1, 2]
    for tag in ("mistakes", "confusion"):
        assert [epoch for epoch, _ in read_images(tmp_path, tag)] == [0, 1, 2]
    killed.on_train_end()  # closes the file, as the operating system does for a killed process


def test_a_run_resumed_within_an_epoch_keeps_its_earlier_points(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info())
    send_events(board, range(1), 4.0)
    board.on_log(step_report(300, 4.0))
    board.on_epoch_end(epoch_report(1, 4.0))  # evaluated within the epoch, at the time limit
    board.on_train_end()
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info(first_step=300))
    send_events(board, range(1, 2), 2.0, from_step=300)
    board.on_train_end()
    assert read_scalar(tmp_path, "train_loss") == [(100, 4.0), (200, 4.0), (300, 4.0), (400, 2.0), (500, 2.0)]
    assert read_scalar(tmp_path, "test_loss") == [(0, 4.0), (1, 2.0)]


def test_events_are_not_repeated_if_nothing_is_hidden(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info())
    send_events(board, range(2), 4.0)
    board.on_train_end()
    [first] = tmp_path.iterdir()
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info(first_step=2 * EPOCH_STEPS))
    board.on_train_end()
    [second] = set(tmp_path.iterdir()) - {first}
    assert second.stat().st_size < first.stat().st_size / 4
    assert [epoch for epoch, _ in read_scalar(tmp_path, "accuracy")] == [0, 1]


def test_a_truncated_file_is_still_read(tmp_path: Path) -> None:
    killed = TensorBoard(tmp_path)
    killed.on_train_start(run_info())
    send_events(killed, range(3), 4.0)
    [file] = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - 5)
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info(first_step=EPOCH_STEPS))
    board.on_train_end()
    assert read_scalar(tmp_path, "train_loss") == [(100, 4.0), (200, 4.0)]
    assert read_scalar(tmp_path, "test_loss") == [(0, 4.0)]
    killed.on_train_end()


def test_a_real_run_resumed_from_its_first_epoch(color_folder: Path, tmp_path: Path) -> None:
    def run(**options: Any) -> None:
        train("lzh", data=str(color_folder), epochs=3, batch_size=1, device="cpu", out=tmp_path, **options)

    run(learning_rate=0.001)
    run(resume=str(tmp_path / "lzh_0.pth"))
    logs = tmp_path / "logs"
    assert [epoch for epoch, _ in read_scalar(logs, "accuracy")] == [0, 1, 2]
    assert [step for step, _ in read_scalar(logs, "train_loss")] == [100]


# --- the recipe


def plugin_data(folder: Path, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(read_events(folder).SummaryMetadata(tag).plugin_data.content)


def test_the_recipe_is_logged_as_hyperparameters(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info())
    board.on_epoch_end(epoch_report(0))
    board.on_train_end()
    given = plugin_data(tmp_path, "_hparams_/session_start_info").session_start_info.hparams
    values = {name: value.string_value or value.number_value for name, value in given.items()}
    fields = {name: value for name, value in msgspec.to_builtins(run_info().recipe).items() if value is not None}
    fields["freeze"] = "[]"  # TensorBoard takes no lists
    name = fields.pop("name")
    assert values == {"model": "lzh", "seed": 7, "recipe": name, **fields}
    metrics = plugin_data(tmp_path, "_hparams_/experiment").experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"accuracy", "test_loss"}
    assert plugin_data(tmp_path, "_hparams_/session_end_info").HasField("session_end_info")


def test_a_run_without_an_epoch_has_no_hyperparameters(tmp_path: Path) -> None:
    TensorBoard(tmp_path / "never").on_train_end()
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info())
    board.on_log(step_report(100, 2.0))
    board.on_train_end()
    assert read_scalar(tmp_path, "train_loss") == [(100, 2.0)]
    assert not [tag for tag in read_events(tmp_path).summary_metadata if tag.startswith("_hparams_")]


# --- the graph

traced = pytest.mark.skipif(sys.version_info >= (3, 14), reason="not supported by PyTorch's tracer")


class StatefulModel(nn.Module):
    """Uses the random generator and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3))
        self.body[1].eval()
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        out: torch.Tensor = self.body(images + torch.rand(()))
        return out


class Untraceable(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("cannot be traced")


class NonTensorOutput(nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, object]:
        return {"logits": images, "note": "not a tensor"}


@traced
def test_the_graph_of_the_model(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    run = run_info()
    chosen = get_architecture("lzh")
    board.on_train_start(run._replace(module=chosen.build(10), input=chosen.input))
    board.on_train_end()
    kinds = [node.op for node in read_events(tmp_path).Graph().node]
    assert kinds.count("aten::_convolution") == sum(isinstance(part, nn.Conv2d) for part in chosen.build(10).modules())


class ChannelsLast(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(-1, 4, 6, 1).mean((1, 2)) @ torch.ones(1, 3)


@traced
def test_the_graph_is_traced_with_the_shape_of_the_input(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    spec = InputSpec(height=4, width=6, channels=1, color="L", layout="NHWC")
    board.on_train_start(run_info(module=ChannelsLast())._replace(input=spec))
    board.on_train_end()
    outputs = [node.attr["_output_shapes"].list.shape for node in read_events(tmp_path).Graph().node]
    assert [1, 4, 6, 1] in [[axis.size for axis in shape.dim] for shapes in outputs for shape in shapes]


@traced
def test_the_model_and_the_random_generator_are_unchanged(tmp_path: Path) -> None:
    module = StatefulModel()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    random = torch.get_rng_state()
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info(module=module))
    board.on_train_end()
    assert len(read_events(tmp_path).Graph().node) > 5
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert all(weight.requires_grad and weight.grad is None for weight in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("module", [Untraceable(), NonTensorOutput()])
def test_a_model_that_cannot_be_traced_has_no_graph(
    tmp_path: Path, module: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info(module=module))
    board.on_epoch_end(epoch_report(0))
    board.on_train_end()
    assert not read_events(tmp_path).Tags()["graph"]
    assert read_scalar(tmp_path, "accuracy") == [(0, 0.5)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_run_gives_the_same_weights_without_tensorboard(
    color_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(out: Path) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {"recipe_name": "fast", "epochs": 2, "batch_size": 16, "device": "cpu"}
        done = train("fastnet", data=str(color_folder), out=out, **options)
        return dict(load_checkpoint(done.checkpoints[-1]).weights)

    with_board = weights(tmp_path / "with")
    assert read_events(tmp_path / "with" / "logs").Tags()["images"]
    monkeypatch.setattr(cifarx_train.train, "TensorBoard", lambda _folder: Callback())
    without = weights(tmp_path / "without")
    assert not list((tmp_path / "without" / "logs").glob("*"))
    assert with_board.keys() == without.keys()
    assert all(torch.equal(with_board[name], without[name]) for name in with_board)


# --- full disks and unwritable directories


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Limit the size of every file to `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_logging_but_not_the_run(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info())
    board.on_log(step_report(100, 2.0))
    [file] = tmp_path.iterdir()
    with full_disk(file.stat().st_size + 20):
        with pytest.warns(FallbackWarning, match=r"cannot write .*: training continues without TensorBoard"):
            board.on_log(step_report(200, 2.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # only one warning is issued
            board.on_log(step_report(300, 2.0))
            board.on_epoch_end(epoch_report(0))
            board.on_train_end()
    assert read_scalar(tmp_path, "train_loss") == [(100, 2.0)]


def test_a_disk_that_is_already_full(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    with full_disk(10), pytest.warns(FallbackWarning, match="cannot write"):
        board.on_train_start(run_info())
    board.on_epoch_end(epoch_report(0))
    board.on_train_end()


def test_a_full_disk_while_writing_images(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_train_start(run_info())
    [file] = tmp_path.iterdir()
    with full_disk(file.stat().st_size + 4000), pytest.warns(FallbackWarning, match="cannot write"):
        board.on_epoch_end(epoch_report(0))
    board.on_train_end()
    assert read_scalar(tmp_path, "accuracy") == [(0, 0.5)]


def test_a_directory_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    board = TensorBoard(tmp_path / "logs")
    with pytest.warns(FallbackWarning, match="cannot write"):
        board.on_train_start(run_info())
    board.on_log(step_report(100, 2.0))
    board.on_epoch_end(epoch_report(0))
    board.on_train_end()
    assert (tmp_path / "logs").read_text() == "a file"
