"""A training run: data, network, loop, evaluation, checkpoints, logs."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from cifarx_serve.backends.torch.device import torch_device
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import UsageError
from cifarx_serve.files.atomic import require_writable
from cifarx_serve.spec import DataRecord, InputSpec
from cifarx_serve.system.cpus import available_cpus
from cifarx_train.callbacks.base import Callback, CallbackList
from cifarx_train.callbacks.tensorboard.callback import TensorBoard
from cifarx_train.checkpoints.directory import CheckpointDirectory
from cifarx_train.checkpoints.resume import ResumePoint, continued_recipe, require_agreement, require_same, resume_point
from cifarx_train.data.dataset import Broken, Dataset, LabeledImages, fingerprint
from cifarx_train.data.loaders.device import ToInput
from cifarx_train.data.loaders.placement import place_images
from cifarx_train.data.selection import select_data, select_data_like
from cifarx_train.data.statistics import normalized
from cifarx_train.distributed import Distributed, init_distributed
from cifarx_train.evaluation import Evaluator
from cifarx_train.loop import Loop
from cifarx_train.models.network import Network, Stem
from cifarx_train.models.registry import network
from cifarx_train.recipes import Recipe, recipe
from cifarx_train.trainer import Plan, Session, TrainResult

# A network that takes its first weights from the data sees so many images of it.
_INITIAL_IMAGES = 5000


def train(
    model: str,
    *,
    data: str = "auto",
    broken: Broken = "refuse",
    recipe_name: str | None = None,
    stem: Stem = "own",
    image_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
    out: Path = Path(),
    logdir: Path | None = None,
    resume: str | None = None,
    keep: int | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> TrainResult:
    """Train a model and write one checkpoint an epoch. Under torchrun, with the other processes it started.

    Args:
        model: a network's name.
        data: auto, cifar10, builtin, or the path of a folder or `.tar.gz` of images.
        broken: refuse a data set with broken images, or skip them.
        recipe_name: a recipe's name or a TOML file's path; `notes` by default.
        stem: "small" gives a torchvision ResNet first layers for small images.
        image_size: in pixels, in place of the network's own.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: of the initial weights, the shuffling and the augmentation.
        out: the folder for the checkpoints.
        logdir: the folder for TensorBoard; `logs` in `out` by default.
        resume: a checkpoint's path, or `auto` for the newest good one in `out`, if there is one.
        keep: how many epochs' checkpoints stay, with the best beside them; all by default.
        callbacks: told of every step and epoch.
        settings: fields of the recipe, in place of its own values.

    Raises:
        UsageError, DataError, DeviceError, OutputError, ModelFileError: before anything is trained.
        CheckFailed: the loss is no longer finite.
        Interrupted: SIGINT or SIGTERM ended it; the state is saved.
    """
    if keep is not None and keep < 1:
        raise UsageError(f"--keep {keep} keeps nothing", "keep at least 1")
    logs = logdir or out / "logs"

    def run(ranks: Distributed) -> TrainResult:
        chosen = network(model, stem=stem)
        wanted = _wanted_input(chosen, image_size)
        folder = CheckpointDirectory(out, model, keep)
        point = resume_point(resume, folder) if resume else None
        require_agreement(point, ranks)
        if point:
            chosen_recipe = continued_recipe(point, recipe_name, settings, model)
        else:
            chosen_recipe = recipe(recipe_name or "notes", model, settings)
        place = _device(device, ranks)
        with _places(out, logs):
            data_set = select_data_like(point.record.data, data, broken) if point else select_data(data, broken)
            with ranks.main_process_first():
                splits = _Splits.read(data_set, wanted)
            input_spec = _input(wanted, chosen_recipe, splits.train, point)
            if point:
                _require_same_run(point, chosen, wanted, splits.record, seed)
        module = _initial(chosen, input_spec, splits.train, len(data_set.class_names), seed, place)
        plan = Plan(chosen, input_spec, chosen_recipe, data_set.class_names, splits.record, seed, place, ranks)
        test = Evaluator(place_images(splits.test, place), input_spec, len(data_set.class_names), place, ranks)
        loop = Loop(
            module, place_images(splits.train, place), input_spec, chosen_recipe, device=place, seed=seed, ranks=ranks
        )
        watching = CallbackList([TensorBoard(logs), *callbacks] if ranks.is_main_process else [])
        session = Session(plan, loop, test, folder, watching)
        return session.run(splits.test, point)

    with init_distributed() as ranks:
        return run(ranks)  # what it made is gone by the time the ranks part: see there


def _wanted_input(chosen: Network, image_size: int | None) -> InputSpec:
    """The network's own input at the size asked for, found out to work before anything is read."""
    if image_size is None:
        return chosen.input
    if image_size < 1:
        raise UsageError(f"--image-size {image_size} is no size", "give pixels, as --image-size 224")
    wanted = msgspec.structs.replace(chosen.input, height=image_size, width=image_size)
    with torch.device("meta"):  # shapes alone, no memory
        chosen.build(2, wanted)
    return wanted


def _device(name: str, ranks: Distributed) -> torch.device:
    """The device of this rank: the GPU of its number on this machine, or its share of the CPUs."""
    wanted = parse_device(name)
    if ranks.size > 1 and wanted.kind in ("auto", "cuda") and torch.cuda.is_available():
        wanted = parse_device(f"cuda:{ranks.local}")
    place = torch_device(wanted)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if ranks.local_size > 1:
        torch.set_num_threads(max(1, available_cpus() // ranks.local_size))
    return place


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
    """Both splits, with what the spec says of them."""

    train: LabeledImages
    test: LabeledImages
    record: DataRecord

    @staticmethod
    def read(data: Dataset, spec: InputSpec) -> "_Splits":
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


def _input(wanted: InputSpec, recipe_: Recipe, train_images: LabeledImages, point: ResumePoint | None) -> InputSpec:
    if point:
        return point.checkpoint.spec.input
    return normalized(wanted, train_images.images) if recipe_.normalize else wanted


def _require_same_run(point: ResumePoint, chosen: Network, now: InputSpec, data: DataRecord, seed: int) -> None:
    spec = point.checkpoint.spec
    require_same(point, "the model", spec.model, chosen.name)
    require_same(point, "the stem", spec.stem, chosen.stem)
    require_same(point, "images of", f"{spec.input.height}x{spec.input.width}", f"{now.height}x{now.width}")
    require_same(point, "the seed", point.record.seed, seed)
    before = point.record.data
    require_same(point, "training data", before.train_fingerprint[:12], data.train_fingerprint[:12])
    require_same(point, "test data", before.test_fingerprint[:12], data.test_fingerprint[:12])


def _initial(
    chosen: Network, spec: InputSpec, images: LabeledImages, classes: int, seed: int, device: torch.device
) -> nn.Module:
    """The network before its first step, on the device; the seed decides its weights."""
    torch.manual_seed(seed)
    module = chosen.build(classes, spec).to(device)
    if chosen.initialize:
        first = torch.from_numpy(images.images[:_INITIAL_IMAGES].copy()).to(device)
        chosen.initialize(module, ToInput(spec, device)(first))
    return module
