"""Sets up and runs a training run: data, model, training loop, evaluation, checkpoints and logs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from cifarx_serve.backends.torch.device import torch_device
from cifarx_serve.backends.torch.out_of_memory import report_out_of_memory
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import UsageError
from cifarx_serve.files.atomic import require_writable
from cifarx_serve.files.directory_lock import lock_directory
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import DataRecord, InputSpec
from cifarx_serve.system.cpus import available_cpus
from cifarx_train.callbacks.base import Callback, CallbackList
from cifarx_train.callbacks.tensorboard.callback import TensorBoard
from cifarx_train.checkpoints.directory import CheckpointDirectory
from cifarx_train.checkpoints.pretrained import Transfer
from cifarx_train.checkpoints.resume import (
    ResumePoint,
    find_resume_point,
    require_same,
    require_same_step,
    resume_recipe,
)
from cifarx_train.data.dataset import Dataset, LabeledImages, OnError
from cifarx_train.data.loaders.device import InputTransform
from cifarx_train.data.selection import DataSource, select_dataset, select_dataset_for_model
from cifarx_train.data.statistics import fit_normalization
from cifarx_train.distillation import complete_recipe as complete_distillation
from cifarx_train.distillation import open_teacher
from cifarx_train.distributed import Distributed, init_distributed
from cifarx_train.loop import TrainingLoop
from cifarx_train.models.architecture import Architecture, Stem
from cifarx_train.models.memory_format import make_input_contiguous, supports_channels_last
from cifarx_train.models.options import ModelOptions
from cifarx_train.models.outputs import with_one_output
from cifarx_train.models.sources import find_architecture
from cifarx_train.recipes import Recipe, load_recipe
from cifarx_train.run_data import RunData, Splits, loss_weights, require_fitting_recipe
from cifarx_train.starting_weights import find_starting_weights
from cifarx_train.trainer import Trainer, TrainResult
from cifarx_train.training_plan import TrainingPlan

# The number of training images from which a model with data-dependent initialization takes its first weights.
_INITIALIZATION_IMAGES = 5000


def train(
    model: str | ModelOptions,
    *,
    data: str | DataSource = "auto",
    on_error: OnError = "raise",
    recipe_name: str | None = None,
    stem: Stem = "own",
    image_size: int | tuple[int, int] | None = None,
    device: str = "auto",
    seed: int = 0,
    out: Path = Path(),
    logdir: Path | None = None,
    resume: str | None = None,
    keep: int | None = None,
    weights: str | None = None,
    teacher: Path | None = None,
    callbacks: Sequence[Callback] = (),
    progress: Progress = silent,
    **overrides: Any,
) -> TrainResult:
    """Train a model and write one checkpoint per epoch.

    Under torchrun, trains together with the other processes that it started.

    Args:
        model: the network, as `--model` names it, or `ModelOptions` with the arguments of its class or function and
            what is stated about its input.
        data: auto, cifar10, builtin, or the path of images; or a `DataSource` that says how they are split and labeled.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them with a warning.
        recipe_name: the name of a recipe or the path of a TOML file. Defaults to `notes`.
        stem: "small" replaces the first layers of a torchvision ResNet with ones for small images.
        image_size: the image size in pixels, or (height, width). Defaults to that of the model.
        device: auto, cpu, cuda, cuda:N or mps.
        seed: the seed of the initial weights, the shuffling and the augmentation.
        out: the directory for the checkpoints.
        logdir: the directory for TensorBoard. Defaults to `logs` in `out`.
        resume: the path of a checkpoint, or `auto` for the latest readable one in `out`, if any.
        keep: the number of epochs whose checkpoints are kept, in addition to the best one. Defaults to all.
        weights: the weights to start from: "default" for those that the source of the network publishes, "timm" for the
            same of a network of timm, or the path of a checkpoint of any program. The head is replaced for the classes
            of the data. Defaults to random weights.
        teacher: the checkpoint or artifact whose answers are learned too.
        callbacks: receive the events of the run.
        progress: receives what is used of `weights` and `teacher`, as lines of text, before the data is read.
        overrides: recipe fields that replace those of the recipe.

    Returns:
        The checkpoints and the test accuracy.

    Raises:
        UsageError, DataError, DeviceError, OutputError, ModelFileError: an argument is invalid, or another run writes
            into `out`. These errors are raised before training starts.
        CheckFailed: the loss is not finite.
        DeviceMemoryError: the device has too little memory for the model and the batch size.
        Interrupted: SIGINT or SIGTERM was received; the training state is saved.
    """
    if keep is not None and keep < 1:
        raise UsageError(f"--keep {keep} would keep no checkpoint", "keep at least 1")
    logs = logdir or out / "logs"
    options = ModelOptions(model) if isinstance(model, str) else model
    name = options.model
    if name is None:
        raise UsageError("--model is missing", "give a model, such as --model lzh")

    def run(distributed: Distributed) -> TrainResult:
        architecture = find_architecture(options, stem)
        directory = CheckpointDirectory(out, architecture.name, keep)
        point = find_resume_point(resume, directory) if resume else None
        require_same_step(point, distributed)
        start = find_starting_weights(weights, architecture, options.weights_key, point, distributed)
        architecture, report = start.architecture, progress if distributed.is_main_process else silent
        requested_input = _requested_input(architecture, options, image_size)
        target = _select_device(device, distributed)
        recipe = _select_recipe(point, recipe_name, overrides, name)
        recipe = complete_distillation(_complete_recipe(recipe, target), has_teacher=teacher is not None)
        with _output_directories(out, logs):
            dataset = (
                select_dataset_for_model(point.record.data, data, on_error) if point else select_dataset(data, on_error)
            )
            _require_trainable(options, dataset)
            transfer = start.plan(requested_input, dataset.class_names, options, report)
            head = start.find_head(recipe, requested_input, report)
            tutor = open_teacher(teacher, dataset.class_names, target, point, report)
            with distributed.main_process_first():
                splits = Splits.load(dataset, requested_input)
            require_fitting_recipe(recipe, splits, dataset.class_names)
            normalized = "mean" in options.overrides.fields.get("input", {}) or architecture.states_input
            fits_normalization = recipe.normalize and not normalized
            spec = _input_spec(requested_input, fits_normalization, splits.train, point)
            if point:
                _require_same_run(point, architecture, requested_input, splits.record, seed)
            num_classes = len(dataset.class_names)
            callback = CallbackList([TensorBoard(logs), *callbacks] if distributed.is_main_process else [])
            with report_out_of_memory(target, recipe.batch_size, "--batch-size"):
                module = _initialize_model(architecture, spec, splits.train, num_classes, seed, target, transfer)
                if not (architecture.is_registered or supports_channels_last(module, spec)):
                    make_input_contiguous(module)
                    recipe = msgspec.structs.replace(recipe, channels_last=False)
                names, record = dataset.class_names, splits.record
                learned_from = start.record, tutor.record if tutor else None
                plan = TrainingPlan(architecture, spec, recipe, names, record, seed, target, distributed, *learned_from)
                images = RunData.select(splits, recipe, seed, target)
                loop = TrainingLoop(
                    module,
                    images.train,
                    spec,
                    recipe,
                    device=target,
                    seed=seed,
                    distributed=distributed,
                    head=head,
                    teacher=tutor,
                    class_weights=loss_weights(recipe, names, images.train),
                )
                return Trainer(plan, loop, images, directory, callback).fit(point)

    with init_distributed() as distributed, lock_directory(out) if distributed.is_main_process else nullcontext():
        return run(distributed)  # a function, so that the DDP model is freed before the process group is destroyed


def _requested_input(
    architecture: Architecture, options: ModelOptions, image_size: int | tuple[int, int] | None
) -> InputSpec:
    """Return the model's input as it was requested. Fails early if the model does not support the size."""
    overrides = options.overrides
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height < 1 or width < 1:
            raise UsageError(f"--image-size {image_size} is not a valid size", "use pixels, such as --image-size 224")
        stated = {**overrides.fields.get("input", {}), "height": height, "width": width}
        overrides = overrides._replace(fields={**overrides.fields, "input": stated})
    requested = overrides.apply_to_input(architecture.input)
    if requested != architecture.input:
        architecture.require_input(requested)
    return requested


def _require_trainable(options: ModelOptions, dataset: Dataset) -> None:
    """Check that what is stated about the output is what training makes: logits for one label per image of the data."""
    stated = options.overrides.fields
    expected = {"class_names": list(dataset.class_names), "output": "logits", "activation": "softmax"}
    for name, value in expected.items():
        if name in stated and (list(stated[name]) if name == "class_names" else stated[name]) != value:
            raise UsageError(
                f"{options.overrides.origins.get(name)} states {name} {stated[name]}, but training makes {value}",
                "leave it out",
            )
    if others := stated.keys() & {"outputs", "thresholds", "temperature"}:
        raise UsageError(f"training does not use {', '.join(sorted(others))} of the spec", "leave it out")


def _select_recipe(point: ResumePoint | None, name: str | None, overrides: Mapping[str, Any], model: str) -> Recipe:
    if point:
        return resume_recipe(point, name, overrides, model)
    return load_recipe(name or "notes", model, overrides)


def _select_device(name: str, distributed: Distributed) -> torch.device:
    """Return the device of this rank: the GPU with its local rank, or the CPU with its share of the cores."""
    requested = parse_device(name)
    if distributed.world_size > 1 and requested.type in ("auto", "cuda") and torch.cuda.is_available():
        requested = parse_device(f"cuda:{distributed.local_rank}")
    device = torch_device(requested)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed.local_world_size > 1:
        torch.set_num_threads(max(1, available_cpus() // distributed.local_world_size))
    return device


def _complete_recipe(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with values for the fields that it leaves to the device."""
    on_gpu = device.type == "cuda"
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    recipe = recipe.complete(precision="bf16" if has_bf16 else "fp32")
    return recipe.complete(channels_last=on_gpu and recipe.precision != "fp32")


@contextmanager
def _output_directories(*directories: Path) -> Iterator[None]:
    """Create directories and check that they are writable. If the block fails, remove the ones created here."""
    new = {path for directory in directories for path in (directory, *directory.parents) if not os.path.lexists(path)}
    try:
        for directory in directories:
            require_writable(directory)
        yield
    except BaseException:
        for path in sorted(new, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not created yet, or not empty
                path.rmdir()
        raise


def _input_spec(
    requested: InputSpec, fits_normalization: bool, train_images: LabeledImages, point: ResumePoint | None
) -> InputSpec:
    if point:
        return point.checkpoint.spec.input
    return fit_normalization(requested, train_images.images) if fits_normalization else requested


def _require_same_run(
    point: ResumePoint, architecture: Architecture, requested: InputSpec, data: DataRecord, seed: int
) -> None:
    spec, recorded = point.checkpoint.spec, point.record.data
    size, requested_size = (f"{input_.height}x{input_.width}" for input_ in (spec.input, requested))
    require_same(point, "the model", spec.model, architecture.name)
    require_same(point, "the stem", spec.stem, architecture.stem)
    if source := spec.source:
        require_same(point, "the network", source.name, architecture.source.name)
        require_same(point, "the arguments", source.arguments, architecture.source.arguments)
        recorded_code, code = ((each.sha256 or "")[:12] for each in (source, architecture.source))
        require_same(point, f"the code of {source.name} at sha256", recorded_code, code)
    require_same(point, "image size", size, requested_size)
    require_same(point, "seed", point.record.seed, seed)
    require_same(point, "training data", recorded.train_fingerprint[:12], data.train_fingerprint[:12])
    require_same(point, "test data", recorded.test_fingerprint[:12], data.test_fingerprint[:12])
    recorded_val, val = (each.val_fingerprint and each.val_fingerprint[:12] for each in (recorded, data))
    require_same(point, "val data", recorded_val, val)


def _initialize_model(
    architecture: Architecture,
    spec: InputSpec,
    images: LabeledImages,
    num_classes: int,
    seed: int,
    device: torch.device,
    transfer: Transfer | None,
) -> nn.Module:
    """Build the model on the device with initial weights determined by the seed, or those that are transferred."""
    torch.manual_seed(seed)
    module = architecture.build(num_classes, spec)
    if not architecture.is_registered:
        module = with_one_output(module, num_classes, spec, architecture.source)
    if transfer:
        transfer.load_into(module)
    module = module.to(device)
    if architecture.initialize and not transfer:
        sample = torch.from_numpy(images.images[:_INITIALIZATION_IMAGES].copy()).to(device)
        architecture.initialize(module, InputTransform(spec, device)(sample))
    return module
