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
from cifarx_train.callbacks.base import Callback, EpochReport, RunStart, StepReport
from cifarx_train.callbacks.tensorboard.callback import TensorBoard
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Evaluation, Mistake
from cifarx_train.models.registry import network
from cifarx_train.recipes import recipe
from cifarx_train.train import train

NAMES = ("blue", "green", "red")
IMAGES = LabeledImages(np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8), np.arange(9) % 3)
EPOCH_STEPS = 250


def start(*, epochs: int = 4, first_step: int = 0, module: nn.Module | None = None, names: Any = NAMES) -> RunStart:
    plan = recipe("notes", "lzh", {"epochs": epochs, "nesterov": False})
    spec = InputSpec(height=8, width=8)
    steps = epochs * EPOCH_STEPS
    network_ = module or nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    return RunStart("lzh", network_, spec, plan, 7, "cpu", 1, "drawings", names, 9, IMAGES, steps, first_step)


def log(step: int, loss: float) -> StepReport:
    return StepReport(step, loss, learning_rate=0.5 / step, gradient_norm=step / 4, images_per_s=step * 8.0)


def report(epoch: int, loss: float = 1.5, accuracy: float = 0.5, mistakes: int = 2) -> EpochReport:
    wrong = [Mistake(position, 2 - position, 0.75) for position in range(mistakes)]
    eval_model = Evaluation(loss, accuracy, np.full((3, 3), epoch + 1), wrong)
    return EpochReport(epoch, 4, EPOCH_STEPS * (epoch + 1), 0.25, eval_model, 100.0, 0.5, Path(f"lzh_{epoch}.pth"))


def tell(board: TensorBoard, epochs: range, loss: float, *, from_step: int = 0) -> None:
    """What a run tells of those epochs, every loss of it `loss`."""
    for epoch in epochs:
        for step in range(EPOCH_STEPS * epoch + 1, EPOCH_STEPS * (epoch + 1) + 1):
            if step % 100 == 0 and step > from_step:
                board.on_log(log(step, loss))
        board.on_epoch(report(epoch, loss))


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), {"images": 0, "scalars": 0}, purge_orphaned_data=True).Reload()


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def pictures(folder: Path, tag: str) -> list[tuple[int, Image.Image]]:
    return [(event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in read(folder).Images(tag)]


def test_the_scalars_of_the_notes_and_more(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "logs")
    board.on_start(start())
    board.on_log(log(100, 2.25))
    board.on_log(log(200, 1.75))
    board.on_epoch(report(0, 1.5, 0.5))
    board.on_epoch(report(1, 1.25, 0.625))
    board.on_end()
    seen = read(tmp_path / "logs")
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


def test_every_point_can_be_seen_while_the_run_goes_on(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(start())
    board.on_log(log(100, 2.25))
    assert curve(tmp_path, "train_loss") == [(100, 2.25)]
    board.on_epoch(report(0))
    assert curve(tmp_path, "accuracy") == [(0, 0.5)]
    board.on_end()


def test_one_file_and_no_folder_beside_it(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(start())
    board.on_epoch(report(0))
    board.on_end()
    [only] = tmp_path.iterdir()
    assert "tfevents" in only.name


def test_each_epoch_has_its_pictures(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(start())
    board.on_epoch(report(0, mistakes=2))
    board.on_epoch(report(1, mistakes=0))
    board.on_end()
    mistakes, confusion = pictures(tmp_path, "mistakes"), pictures(tmp_path, "confusion")
    assert [epoch for epoch, _ in mistakes] == [epoch for epoch, _ in confusion] == [0, 1]
    assert mistakes[0][1].width > mistakes[1][1].width
    assert confusion[0][1].tobytes() != confusion[1][1].tobytes()


def test_too_many_classes_have_no_picture_of_their_confusion(tmp_path: Path) -> None:
    names = tuple(map(str, range(1001)))
    board = TensorBoard(tmp_path)
    board.on_start(start(names=names))
    first = report(0)
    board.on_epoch(first._replace(evaluation=first.evaluation._replace(confusion=np.eye(1001, dtype=np.int64))))
    board.on_end()
    assert read(tmp_path).Tags()["images"] == ["mistakes"]


# --- what TensorBoard shows of several runs in one folder


def test_a_later_run_hides_an_earlier_one_of_the_same_second(tmp_path: Path) -> None:
    for loss, epochs in ((4.0, 4), (2.0, 2), (3.0, 1)):
        board = TensorBoard(tmp_path)
        board.on_start(start())
        tell(board, range(epochs), loss)
        board.on_end()
    assert curve(tmp_path, "train_loss") == [(100, 3.0), (200, 3.0)]
    assert curve(tmp_path, "test_loss") == [(0, 3.0)]
    assert [epoch for epoch, _ in pictures(tmp_path, "mistakes")] == [0]


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_continued_from_an_earlier_epoch_has_no_point_twice(tmp_path: Path, times: int) -> None:
    killed = TensorBoard(tmp_path)
    killed.on_start(start())
    tell(killed, range(4), 4.0)
    killed.on_log(log(1100, 4.0))  # no end: it was killed in its fifth epoch
    for _ in range(times):
        board = TensorBoard(tmp_path)
        board.on_start(start(first_step=2 * EPOCH_STEPS))
        tell(board, range(2, 3), 2.0)
        board.on_end()
    before = [(step, 4.0) for step in (100, 200, 300, 400, 500)]
    assert curve(tmp_path, "train_loss") == [*before, (600, 2.0), (700, 2.0)]
    assert [step for step, _ in curve(tmp_path, "learning_rate")] == [100, 200, 300, 400, 500, 600, 700]
    assert curve(tmp_path, "test_loss") == [(0, 4.0), (1, 4.0), (2, 2.0)]
    assert [epoch for epoch, _ in curve(tmp_path, "memory_mib")] == [0, 1, 2]
    for tag in ("mistakes", "confusion"):
        assert [epoch for epoch, _ in pictures(tmp_path, tag)] == [0, 1, 2]
    killed.on_end()  # as the system closes the files of the killed


def test_a_run_continued_within_an_epoch_keeps_what_it_told(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(start())
    tell(board, range(1), 4.0)
    board.on_log(log(300, 4.0))
    board.on_epoch(report(1, 4.0))  # out of time in the midst of it, and eval_model
    board.on_end()
    board = TensorBoard(tmp_path)
    board.on_start(start(first_step=300))
    tell(board, range(1, 2), 2.0, from_step=300)
    board.on_end()
    assert curve(tmp_path, "train_loss") == [(100, 4.0), (200, 4.0), (300, 4.0), (400, 2.0), (500, 2.0)]
    assert curve(tmp_path, "test_loss") == [(0, 4.0), (1, 2.0)]


def test_nothing_is_told_again_where_nothing_is_to_be_hidden(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(start())
    tell(board, range(2), 4.0)
    board.on_end()
    [first] = tmp_path.iterdir()
    board = TensorBoard(tmp_path)
    board.on_start(start(first_step=2 * EPOCH_STEPS))
    board.on_end()
    [second] = set(tmp_path.iterdir()) - {first}
    assert second.stat().st_size < first.stat().st_size / 4
    assert [epoch for epoch, _ in curve(tmp_path, "accuracy")] == [0, 1]


def test_a_file_cut_off_in_the_middle_still_counts(tmp_path: Path) -> None:
    killed = TensorBoard(tmp_path)
    killed.on_start(start())
    tell(killed, range(3), 4.0)
    [file] = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - 5)
    board = TensorBoard(tmp_path)
    board.on_start(start(first_step=EPOCH_STEPS))
    board.on_end()
    assert curve(tmp_path, "train_loss") == [(100, 4.0), (200, 4.0)]
    assert curve(tmp_path, "test_loss") == [(0, 4.0)]
    killed.on_end()


def test_a_real_run_continued_from_its_first_epoch(drawn_once: Path, tmp_path: Path) -> None:
    def run(**options: Any) -> None:
        train("lzh", data=str(drawn_once), epochs=3, batch_size=1, device="cpu", out=tmp_path, **options)

    run(learning_rate=0.001)
    run(resume=str(tmp_path / "lzh_0.pth"))
    logs = tmp_path / "logs"
    assert [epoch for epoch, _ in curve(logs, "accuracy")] == [0, 1, 2]
    assert [step for step, _ in curve(logs, "train_loss")] == [100]


# --- the recipe


def plugin_data(folder: Path, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(read(folder).SummaryMetadata(tag).plugin_data.content)


def test_the_recipe_stands_beside_what_it_led_to(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(start())
    board.on_epoch(report(0))
    board.on_end()
    given = plugin_data(tmp_path, "_hparams_/session_start_info").session_start_info.hparams
    values = {name: value.string_value or value.number_value for name, value in given.items()}
    fields = {name: value for name, value in msgspec.to_builtins(start().recipe).items() if value is not None}
    name = fields.pop("name")
    assert values == {"model": "lzh", "seed": 7, "recipe": name, **fields}
    metrics = plugin_data(tmp_path, "_hparams_/experiment").experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"accuracy", "test_loss"}
    assert plugin_data(tmp_path, "_hparams_/session_end_info").HasField("session_end_info")


def test_a_run_that_failed_at_once_has_no_results(tmp_path: Path) -> None:
    TensorBoard(tmp_path / "never").on_end()
    board = TensorBoard(tmp_path)
    board.on_start(start())
    board.on_log(log(100, 2.0))
    board.on_end()
    assert curve(tmp_path, "train_loss") == [(100, 2.0)]
    assert not [tag for tag in read(tmp_path).summary_metadata if tag.startswith("_hparams_")]


# --- the graph

traced = pytest.mark.skipif(sys.version_info >= (3, 14), reason="PyTorch's tracer does not work there")


class Odd(nn.Module):
    """Draws from the random generator and counts its calls, in training and else."""

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
        raise NotImplementedError("not of this kind")


class Refused(nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, object]:
        return {"logits": images, "note": "no tensor"}


@traced
def test_the_graph_of_the_network(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    run = start()
    chosen = network("lzh")
    board.on_start(run._replace(module=chosen.build(10), input=chosen.input))
    board.on_end()
    kinds = [node.op for node in read(tmp_path).Graph().node]
    assert kinds.count("aten::_convolution") == sum(isinstance(part, nn.Conv2d) for part in chosen.build(10).modules())


@traced
def test_the_network_and_the_random_generator_stay_as_they_were(tmp_path: Path) -> None:
    module = Odd()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    random = torch.get_rng_state()
    board = TensorBoard(tmp_path)
    board.on_start(start(module=module))
    board.on_end()
    assert len(read(tmp_path).Graph().node) > 5
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert all(weight.requires_grad and weight.grad is None for weight in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("module", [Untraceable(), Refused()])
def test_a_network_that_cannot_be_traced_has_no_graph(
    tmp_path: Path, module: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(start(module=module))
    board.on_epoch(report(0))
    board.on_end()
    assert not read(tmp_path).Tags()["graph"]
    assert curve(tmp_path, "accuracy") == [(0, 0.5)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_run_is_the_same_to_the_bit_without_tensorboard(
    drawn_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(out: Path) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {"recipe_name": "fast", "epochs": 2, "batch_size": 16, "device": "cpu"}
        done = train("fastnet", data=str(drawn_once), out=out, **options)
        return dict(cifarx_train.checkpoints.checkpoint.load_checkpoint(done.checkpoints[-1]).model)

    with_it = weights(tmp_path / "with")
    assert read(tmp_path / "with" / "logs").Tags()["images"]
    monkeypatch.setattr(cifarx_train.train, "TensorBoard", lambda _folder: Callback())
    without = weights(tmp_path / "without")
    assert not list((tmp_path / "without" / "logs").glob("*"))
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], without[name]) for name in with_it)


# --- a disk that is full, a folder that is gone


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_logs_and_not_the_run(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(start())
    board.on_log(log(100, 2.0))
    [file] = tmp_path.iterdir()
    with full_disk(file.stat().st_size + 20):
        with pytest.warns(FallbackWarning, match=r"cannot write .*: the run goes on without TensorBoard"):
            board.on_log(log(200, 2.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # told once
            board.on_log(log(300, 2.0))
            board.on_epoch(report(0))
            board.on_end()
    assert curve(tmp_path, "train_loss") == [(100, 2.0)]


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    with full_disk(10), pytest.warns(FallbackWarning, match="cannot write"):
        board.on_start(start())
    board.on_epoch(report(0))
    board.on_end()


def test_a_full_disk_at_an_epochs_picture(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_start(start())
    [file] = tmp_path.iterdir()
    with full_disk(file.stat().st_size + 4000), pytest.warns(FallbackWarning, match="cannot write"):
        board.on_epoch(report(0))
    board.on_end()
    assert curve(tmp_path, "accuracy") == [(0, 0.5)]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    board = TensorBoard(tmp_path / "logs")
    with pytest.warns(FallbackWarning, match="cannot write"):
        board.on_start(start())
    board.on_log(log(100, 2.0))
    board.on_epoch(report(0))
    board.on_end()
    assert (tmp_path / "logs").read_text() == "a file"
