"""A training run: data, network, loop, evaluation, checkpoints, logs."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from cifarx_serve.atomic import require_writable
from cifarx_serve.backends.torch_device import torch_device
from cifarx_serve.devices import parse_device
from cifarx_serve.spec import DataRecord, InputSpec, ModelSpec, TrainingRecord
from cifarx_serve.versions import library_versions
from cifarx_train.checkpoint import Checkpoint, State, checkpoint_path, save_checkpoint
from cifarx_train.data.dataset import DataSet, LabelledImages, fingerprint
from cifarx_train.data.on_device import DeviceImages
from cifarx_train.data.selection import select_data
from cifarx_train.evaluation import Evaluation, evaluate
from cifarx_train.loop import Loop, require_finite
from cifarx_train.models.registry import network
from cifarx_train.observers import EpochReport, Observer, Observers, RunStart, TensorBoard
from cifarx_train.recipes import Recipe, recipe


class TrainResult(NamedTuple):
    """A finished run: `test_accuracy` of the last checkpoint, `images_per_s` the mean over the epochs."""

    checkpoints: list[Path]
    test_accuracy: float
    images_per_s: float
    epochs: int
    device: str
    data: str


def train(
    model: str,
    *,
    data: str = "auto",
    recipe_name: str = "notes",
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    device: str = "auto",
    seed: int = 0,
    out: Path = Path(),
    logdir: Path | None = None,
    observers: Sequence[Observer] = (),
) -> TrainResult:
    """Train a model and write one checkpoint an epoch.

    Args:
        model: a network's name.
        data: auto, cifar10, builtin, or the path of a folder or `.tar.gz` of images.
        recipe_name: a recipe's name; `epochs`, `batch_size` and `learning_rate` replace its own values.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: of the initial weights and of the shuffling.
        out: the folder for the checkpoints.
        logdir: the folder for TensorBoard; `logs` in `out` by default.
        observers: told of every step and epoch.

    Raises:
        UsageError, DataError, DeviceError, OutputError: before anything is trained.
        CheckFailed: the loss is no longer finite.
    """
    chosen = network(model)
    plan = recipe(recipe_name, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
    place = torch_device(parse_device(device))
    logs = logdir or out / "logs"
    with _places(out, logs):
        data_set = select_data(data)
        splits = _Splits.read(data_set, chosen.input)
    torch.manual_seed(seed)  # of the initial weights; it seeds every device's generator
    module = chosen.build(len(data_set.class_names)).to(place)
    watching = Observers([TensorBoard(logs), *observers])
    run = _Run(model, chosen.input, data_set, splits, plan, seed, place, out, watching)
    try:
        return run.train(module)
    finally:
        watching.on_end()


@contextmanager
def _places(*folders: Path) -> Iterator[None]:
    """Make folders that can be written; when the block fails, take away again those that were not there."""
    new = {place for folder in folders for place in (folder, *folder.parents) if not os.path.lexists(place)}
    try:
        for folder in folders:
            require_writable(folder)
        yield
    except BaseException:
        for place in sorted(new, key=lambda place: len(place.parts), reverse=True):
            with suppress(OSError):  # not made yet, or no longer empty
                place.rmdir()
        raise


class _Splits(NamedTuple):
    """Both splits in memory, with what the spec says of them."""

    train: LabelledImages
    test: LabelledImages
    record: DataRecord

    @staticmethod
    def read(data: DataSet, spec: InputSpec) -> "_Splits":
        train, test = data.load("train", spec), data.load("test", spec)
        record = DataRecord(
            name=data.name,
            kind=data.kind,
            train_images=len(train),
            test_images=len(test),
            train_fingerprint=fingerprint(train, data.class_names),
            test_fingerprint=fingerprint(test, data.class_names),
        )
        return _Splits(train, test, record)


class _Run(NamedTuple):
    """What stays the same through a run."""

    model: str
    input: InputSpec
    data: DataSet
    splits: _Splits
    recipe: Recipe
    seed: int
    device: torch.device
    out: Path
    observer: Observer

    def train(self, module: torch.nn.Module) -> TrainResult:
        test = DeviceImages(self.splits.test, self.input, self.device)
        loop = Loop(module, DeviceImages(self.splits.train, self.input, self.device), self.recipe, self.seed)
        self.observer.on_start(self._start(module, loop.steps))
        reports: list[EpochReport] = []
        for end in loop.epochs(self.observer):
            judged = evaluate(module, test)
            require_finite(judged.loss, end.step)  # the last step may have ruined weights whose loss was finite
            path = checkpoint_path(self.out, self.model, end.epoch)
            save_checkpoint(path, self._checkpoint(loop, end.epoch, end.step, judged))
            report = EpochReport(end.epoch, self.recipe.epochs, end.step, *judged, end.images_per_s, path)
            self.observer.on_epoch(report)
            reports.append(report)
        return TrainResult(
            checkpoints=[report.checkpoint for report in reports],
            test_accuracy=reports[-1].test_accuracy,
            images_per_s=sum(report.images_per_s for report in reports) / len(reports),
            epochs=len(reports),
            device=str(self.device),
            data=self.data.name,
        )

    def _start(self, module: torch.nn.Module, steps: int) -> RunStart:
        return RunStart(
            model=self.model,
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            device=str(self.device),
            data=self.data.name,
            train_images=len(self.splits.train),
            test_images=len(self.splits.test),
            steps=steps,
        )

    def _checkpoint(self, loop: Loop, epoch: int, step: int, judged: Evaluation) -> Checkpoint:
        record = TrainingRecord(
            data=self.splits.record,
            recipe=msgspec.to_builtins(self.recipe),
            epochs=epoch + 1,
            seed=self.seed,
            test_accuracy=judged.accuracy,
            test_loss=judged.loss,
            device=str(self.device),
            versions=library_versions(),
        )
        spec = ModelSpec(model=self.model, class_names=self.data.class_names, input=self.input, training=record)
        training = {
            "epoch": epoch,
            "step": step,
            "optimizer": loop.optimizer.state_dict(),
            "shuffle": loop.shuffle.get_state(),
            "random": _random_states(self.device),
        }
        return Checkpoint(spec, loop.model.state_dict(), training)


def _random_states(device: torch.device) -> State:
    states: State = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
