"""Tests and calibrates the checkpoint that a run ends with, and records the results in it."""

import warnings
from pathlib import Path
from typing import NamedTuple

import msgspec

from cifarx_serve.errors import FallbackWarning
from cifarx_train.calibration import Calibration, NoTemperature, expected_calibration_error, fit_temperature
from cifarx_train.callbacks.base import FinalReport
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_training_checkpoint
from cifarx_train.checkpoints.directory import CheckpointDirectory
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluation
from cifarx_train.loop import TrainingLoop
from cifarx_train.run_data import RunData
from cifarx_train.training_plan import TrainingPlan


class CheckpointToTest(NamedTuple):
    """The checkpoint that a run ends with.

    Attributes:
        path: its file.
        epoch: the number of its epoch, from 0.
        val_accuracy: its accuracy on the val split, if there is one.
        evaluation: its result on the test split, if it is known already.
    """

    path: Path
    epoch: int
    val_accuracy: float | None
    evaluation: Evaluation | None


class FinalEvaluation:
    """Evaluates one checkpoint on the test split.

    Args:
        plan: the configuration of the run.
        loop: the training loop, which has ended. Its model gets the weights of the checkpoint.
        images: the images of the run.
        directory: where checkpoints are saved.
    """

    def __init__(self, plan: TrainingPlan, loop: TrainingLoop, images: RunData, directory: CheckpointDirectory) -> None:
        self._plan, self._loop, self._images, self._directory = plan, loop, images, directory

    def run(self, checkpoint: CheckpointToTest) -> FinalReport:
        """Test a checkpoint, calibrate it if the recipe says so, and write what is new into its file.

        Only rank 0 reads and writes the file.

        Raises:
            OutputError: the file cannot be written.
            ModelFileError, SpecError: the file was damaged since it was written.
        """
        path, epoch, val_accuracy, evaluation = checkpoint
        is_main_process = self._plan.distributed.is_main_process
        saved = load_training_checkpoint(path) if is_main_process and self._needs_file(path) else None
        self._load(path, saved)
        if evaluation is None:
            evaluation = self._plan.evaluator(self._images.test).evaluate(self._loop.eval_model)
        calibration = self._calibrate(path, saved.spec.temperature) if saved else None
        if saved:
            self._record(path, saved, evaluation, calibration)
        return FinalReport(path, epoch, evaluation, val_accuracy, calibration)

    def _needs_file(self, path: Path) -> bool:
        """Return whether the weights or the spec in the file are needed."""
        is_complete = self._images.val is None and self._images.calibration is None
        return not is_complete or str(path) != self._loop.last_checkpoint

    def _load(self, path: Path, saved: Checkpoint | None) -> None:
        """Load the weights into the model on all ranks, unless it has them."""
        distributed = self._plan.distributed
        if distributed.any(saved is not None and str(path) != self._loop.last_checkpoint):
            if saved is not None:
                self._loop.eval_model.load_state_dict(saved.weights)
            distributed.broadcast_state(self._loop.eval_model)

    def _calibrate(self, path: Path, temperature: float | None) -> Calibration | None:
        """Fit the temperature, unless the checkpoint has one, and measure what it changes. Needs no other rank."""
        if self._images.calibration is None:
            return None
        fitted, tested = (
            self._plan.evaluator(images, Distributed()).logits(self._loop.eval_model)
            for images in (self._images.calibration, self._images.test)
        )
        if temperature is None:
            try:
                temperature = fit_temperature(*fitted)
            except NoTemperature as reason:
                warnings.warn(f"{path} is not calibrated: {reason}", FallbackWarning, stacklevel=2)
                return None
        return Calibration(
            temperature,
            len(self._images.calibration),
            "train" if self._images.val is None else "val",
            expected_calibration_error(*tested),
            expected_calibration_error(*tested, temperature),
        )

    def _record(self, path: Path, saved: Checkpoint, evaluation: Evaluation, calibration: Calibration | None) -> None:
        """Write the test accuracy and the temperature into a checkpoint that does not have them yet."""
        spec, record = saved.spec, saved.spec.training
        if record is not None and record.test_accuracy is None:
            record = msgspec.structs.replace(record, test_accuracy=evaluation.accuracy, test_loss=evaluation.loss)
        temperature = calibration.temperature if calibration else spec.temperature
        complete = msgspec.structs.replace(spec, training=record, temperature=temperature)
        if complete != spec:
            self._directory.update(path, saved._replace(spec=complete))
