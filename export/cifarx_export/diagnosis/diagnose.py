"""Find the preprocessing and the order of classes with which a network is most accurate on labeled images."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from cifarx_export.adoption.adopt import open_foreign_file
from cifarx_export.adoption.described_copy import is_foreign
from cifarx_export.diagnosis.candidates import scaling_name
from cifarx_export.diagnosis.class_order import UNKNOWN, OrderName, complete_names, known_orders
from cifarx_export.diagnosis.pictures import Pictures
from cifarx_export.diagnosis.search import MIN_IMAGES, Finalist, Rung, Search
from cifarx_export.parity.chance import measure_chance
from cifarx_export.parity.scalings import Scaling
from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.registry import backend_for, model_file, open_backend
from cifarx_serve.devices import Device
from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.binomial import interval
from cifarx_train.checkpoints.source_weights import load_model
from cifarx_train.data.dataset import OnError
from cifarx_train.data.selection import DataSource, select_dataset_for_model
from cifarx_train.models.options import NO_OPTIONS, ModelOptions
from cifarx_train.pytorch_backend import PyTorchBackend

DEFAULT_IMAGES: Final = 1000

_SIZES: Final = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One way to preprocess images, and how accurate the network is with it.

    Attributes:
        input: the preprocessing.
        scaling: a name for the scaling of the values.
        class_order: the order of the classes with which it is most accurate.
        images, correct: number of images, and of correct predictions.
        accuracy, low, high: the accuracy, and its confidence interval of 95%.
        tied: whether the first trial is not significantly better, see `find_ties`.
        stated: whether this is what was stated or assumed before.
    """

    input: InputSpec
    scaling: str
    class_order: OrderName
    images: int
    correct: int
    accuracy: float
    low: float
    high: float
    tied: bool
    stated: bool


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What a diagnosis found.

    Attributes:
        file: the file name of the network.
        kind: whether the file contains weights, or a whole network in another format.
        data: the name of the dataset.
        classes: number of classes of the network.
        chance: accuracy of the predictions of the first trial in random order.
        at_chance: whether even the first trial could be chance.
        rungs: the trials of the search.
        trials: the most accurate ones, best first, and the stated one. The stated one is first if it is tied.
        spec: the spec with the first trial, for `--spec`.
    """

    file: str
    kind: Literal["checkpoint", "artifact"]
    data: str
    classes: int
    chance: float
    at_chance: bool
    rungs: tuple[Rung, ...]
    trials: tuple[Trial, ...]
    spec: ModelSpec


def diagnose(
    file: str | Path,
    *,
    model: str | ModelOptions | None = None,
    data: str | DataSource,
    images: int = DEFAULT_IMAGES,
    on_error: OnError = "raise",
    progress: Progress = silent,
) -> Diagnosis:
    """Try the usual ways to preprocess images, and orders of the classes, and rank them by accuracy.

    The candidates are compared on the same images by successive halving: many on a few images, the best on all. Those
    that remain are ranked by their accuracy on all images, and tested on those images that had no part in the choice:
    see `find_ties`. What was stated before is first unless another candidate is significantly better.

    Args:
        file: a checkpoint, or an ONNX or TorchScript file with or without a spec.
        model: the network, as `--model` names it, or `ModelOptions` with all that the user states.
        data: labeled images: cifar10, builtin, or the path of images; or a `DataSource`
            that says how they are split and labeled.
        images: the largest number of images.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them.
        progress: called with a line about each step.

    Raises:
        UsageError, ModelFileError, SpecError: the file cannot be opened.
        DataError: the images cannot be read, or have more classes than the network.
    """
    path = Path(file)
    options = model if isinstance(model, ModelOptions) else ModelOptions(model)
    if images < MIN_IMAGES:
        raise UsageError(f"{images} images are too few to tell preprocessings apart", f"give {MIN_IMAGES} or more")
    progress(f"reading {path}")
    with _open(path, options) as backend:
        spec = backend.spec
        dataset = select_dataset_for_model(spec.training.data if spec.training else None, data, on_error)
        orders = known_orders(dataset.class_names, spec.class_names, "class_names" not in spec.assumed)
        if orders is None:
            raise DataError(
                f"{dataset.name} has {len(dataset.class_names)} classes, but the network {len(spec.class_names)}",
                "use images of its classes",
            )
        pictures = Pictures(dataset, images, on_error)
        if len(pictures) < MIN_IMAGES:
            raise DataError(
                f"{dataset.name} has {len(pictures)} test images, too few to tell preprocessings apart",
                f"use {MIN_IMAGES} or more",
            )
        kind: Literal["checkpoint", "artifact"] = "checkpoint" if isinstance(backend, PyTorchBackend) else "artifact"
        search = Search(backend, pictures, orders, progress)
        finalists = search.run(_sizes(backend, pictures, options))
    if "preprocessing" not in spec.assumed:
        finalists = _stated_first(finalists, search.ties(finalists))
    return _diagnosis(path, kind, dataset.name, dataset.class_names, search, finalists)


@contextmanager
def _open(path: Path, options: ModelOptions) -> Iterator[Backend]:
    """Open a network of any kind on the CPU.

    Raises:
        UsageError: the file has its preprocessing inside, or options are given for a file with a spec.
    """
    file = model_file(path)
    if is_foreign(file):
        with tempfile.TemporaryDirectory() as folder:
            foreign = open_foreign_file(file, Path(folder))
            with foreign.open_original(foreign.describe(options.overrides)) as backend:
                yield backend
        return
    if file.is_dir() or backend_for(file) is PyTorchBackend:
        with PyTorchBackend.from_checkpoint(load_model(file, options), Device("cpu")) as backend:
            yield backend
        return
    if options != NO_OPTIONS:
        raise UsageError(f"{path} contains its own spec", "leave out --model, --spec and the other fields of the spec")
    with open_backend(file, device="cpu") as backend:
        if backend.spec.embedded_preprocessing:
            raise UsageError(f"{path} does its preprocessing itself", "give the file that it was made from")
        yield backend


def _sizes(backend: Backend, pictures: Pictures, options: ModelOptions) -> list[tuple[int, int]]:
    """Return the sizes to try: the stated one, or for a network that takes others and whose size is assumed, more."""
    size = backend.spec.input
    sizes = [(size.height, size.width)]
    stated = "height" in options.overrides.fields.get("input", {}) or "preprocessing" not in backend.spec.assumed
    if stated or not isinstance(backend, PyTorchBackend):
        return sizes
    typical = min(_SIZES, key=lambda side: abs(side - pictures.typical_side))
    for side in (typical, 224):
        wanted = msgspec.structs.replace(size, height=side, width=side, resize_to=None)
        if (side, side) not in sizes and _runs(backend, wanted):
            sizes.append((side, side))
    return sizes


def _runs(backend: Backend, size: InputSpec) -> bool:
    try:
        backend.run(np.zeros((2, *size.shape), np.float32))
    except Exception:  # modules raise anything for an input of another size
        return False
    return True


def _stated_first(finalists: Sequence[Finalist], tied: Sequence[bool]) -> list[Finalist]:
    """Return the finalists with the stated one first, unless the first one is better."""
    pairs = zip(finalists, tied, strict=True)
    return [finalist for finalist, _ in sorted(pairs, key=lambda pair: not (pair[1] and pair[0].candidate.stated))]


def _diagnosis(
    path: Path,
    kind: Literal["checkpoint", "artifact"],
    data: str,
    classes: Sequence[str],
    search: Search,
    finalists: Sequence[Finalist],
) -> Diagnosis:
    spec, (winner, order) = search.spec, finalists[0]
    labels = np.where(order.outputs == UNKNOWN, len(spec.class_names), order.outputs)[search.labels]
    found = measure_chance(winner.predictions, labels, len(spec.class_names) + 1)
    names = spec.class_names
    if order.name != "as stated":
        names = tuple(complete_names(order, classes, len(spec.class_names)))
    best = msgspec.structs.replace(spec, input=winner.input, class_names=names, assumed=())
    return Diagnosis(
        file=path.name,
        kind=kind,
        data=data,
        classes=len(spec.class_names),
        chance=found.chance,
        at_chance=found.at_chance,
        rungs=tuple(search.rungs),
        trials=tuple(
            _trial(finalist, tied, search.scalings)
            for finalist, tied in zip(finalists, search.ties(finalists), strict=True)
        ),
        spec=best,
    )


def _trial(finalist: Finalist, tied: bool, scalings: Sequence[Scaling]) -> Trial:
    (candidate, order), images = finalist, len(finalist.order.correct)
    correct = int(order.correct.sum())
    low, high = interval(correct, images)
    return Trial(
        input=candidate.input,
        scaling=scaling_name(candidate.input, scalings),
        class_order=order.name,
        images=images,
        correct=correct,
        accuracy=correct / images,
        low=low,
        high=high,
        tied=tied,
        stated=candidate.stated,
    )
