"""The callback interface. The training loop reports events to callbacks and does not know how they are shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from cifarx_serve.spec import InputSpec
from cifarx_train.calibration import Calibration
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.evaluation import Evaluation
from cifarx_train.recipes import Recipe

LOG_EVERY_N_STEPS = 100
"""Steps between two calls of `Callback.on_log`. Reading the loss synchronizes with the device."""


class RunInfo(NamedTuple):
    """What a run trains, and on what.

    Attributes:
        model: the name of the model.
        module: the model itself; callbacks must not change it.
        input: the input of the model.
        recipe: the recipe of the run.
        seed: the seed of the run.
        device: the device of this process, such as "cpu" or "cuda:0".
        world_size: the number of processes that train together.
        data: the name of the dataset.
        class_names: the classes in label order.
        num_train_images: the number of images that are trained on.
        test_set: the test images and their labels.
        total_steps: the number of steps of the whole run, including those before a resume.
        first_step: the number of steps completed before a resume; 0 for a new run.
        resumed_from: the checkpoint that the run resumes from, or None for a new run.
        val_set: the images by which epochs are compared; None if they are compared by the test images.
        class_counts: the number of images of each class that are trained on.
        num_calibration_images: the number of training images held out for the temperature, which are not trained on.
    """

    model: str
    module: nn.Module
    input: InputSpec
    recipe: Recipe
    seed: int
    device: str
    world_size: int
    data: str
    class_names: tuple[str, ...]
    num_train_images: int
    test_set: LabeledImages
    total_steps: int
    first_step: int = 0
    resumed_from: Path | None = None
    val_set: LabeledImages | None = None
    class_counts: tuple[int, ...] = ()
    num_calibration_images: int = 0

    @property
    def evaluated_split(self) -> Literal["val", "test"]:
        """The split that the model is evaluated on after every epoch."""
        return "test" if self.val_set is None else "val"

    @property
    def evaluated_set(self) -> LabeledImages:
        """The images of that split and their labels."""
        return self.test_set if self.val_set is None else self.val_set


class StepReport(NamedTuple):
    """The metrics of one training step.

    Attributes:
        step: the number of the step, from 1.
        loss: the training loss of the batch.
        learning_rate: the learning rate of the step.
        grad_norm: the norm of the gradient before clipping.
        images_per_s: the training throughput since the previous report.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    images_per_s: float


class EpochReport(NamedTuple):
    """The metrics of one epoch, reported after the model is evaluated and saved.

    Attributes:
        epoch: the number of the epoch, from 0.
        epochs: the number of epochs of the run.
        step: the number of steps completed so far.
        train_loss: the training loss of the last batch.
        evaluation: the result on the val split, or on the test split where there is none.
        images_per_s: the training throughput, excluding evaluation and checkpointing.
        checkpoint_s: the seconds taken to write the checkpoint.
        checkpoint: the path of the checkpoint.
    """

    epoch: int
    epochs: int
    step: int
    train_loss: float
    evaluation: Evaluation
    images_per_s: float
    checkpoint_s: float
    checkpoint: Path


class FinalReport(NamedTuple):
    """The metrics of the checkpoint that a run ends with.

    Attributes:
        checkpoint: the path of the checkpoint: the best one on the val split, or the last one where there is none.
        epoch: the number of its epoch, from 0.
        evaluation: the result on the test split.
        val_accuracy: the accuracy on the val split, from 0 to 1, if there is one.
        calibration: the temperature in the checkpoint, if the run was calibrated.
    """

    checkpoint: Path
    epoch: int
    evaluation: Evaluation
    val_accuracy: float | None = None
    calibration: Calibration | None = None


class Callback:
    """Base class of callbacks. Every method does nothing; override the ones you need."""

    def on_train_start(self, run: RunInfo) -> None:
        """Called before the first step."""

    def on_step_end(self, step: int) -> None:
        """Called after every step, numbered from 1. Must not access the device, which would slow down training."""

    def on_log(self, report: StepReport) -> None:
        """Called every `LOG_EVERY_N_STEPS` steps."""

    def on_epoch_end(self, report: EpochReport) -> None:
        """Called after an epoch, when its checkpoint is on disk."""

    def on_test_end(self, report: FinalReport) -> None:
        """Called once, when training has ended without an error and its result is tested."""

    def on_train_end(self) -> None:
        """Called at the end of training, including after an error."""


class CallbackList(Callback):
    """Forwards every event to several callbacks, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    def on_train_start(self, run: RunInfo) -> None:
        for callback in self._callbacks:
            callback.on_train_start(run)

    def on_step_end(self, step: int) -> None:
        for callback in self._callbacks:
            callback.on_step_end(step)

    def on_log(self, report: StepReport) -> None:
        for callback in self._callbacks:
            callback.on_log(report)

    def on_epoch_end(self, report: EpochReport) -> None:
        for callback in self._callbacks:
            callback.on_epoch_end(report)

    def on_test_end(self, report: FinalReport) -> None:
        for callback in self._callbacks:
            callback.on_test_end(report)

    def on_train_end(self) -> None:
        for callback in self._callbacks:
            callback.on_train_end()
