"""Runs the training loop, and evaluates, saves, stops and resumes around it."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec

from cifarx_serve.errors import Interrupted, ModelFileError
from cifarx_serve.spec import ModelSpec, TrainingRecord
from cifarx_serve.system.versions import library_versions
from cifarx_train.callbacks.base import Callback, EpochReport, FinalReport, RunInfo
from cifarx_train.checkpoints.checkpoint import Checkpoint
from cifarx_train.checkpoints.directory import CheckpointDirectory
from cifarx_train.checkpoints.resume import ResumePoint
from cifarx_train.device_memory import peak_device_memory
from cifarx_train.evaluation import Evaluation
from cifarx_train.final_evaluation import CheckpointToTest, FinalEvaluation
from cifarx_train.loop import EpochResult, TrainingLoop, require_finite_loss
from cifarx_train.run_data import RunData, class_counts
from cifarx_train.signals import ReceivedSignal, catch_signals
from cifarx_train.training_plan import TrainingPlan


class TrainResult(NamedTuple):
    """The result of a run.

    Attributes:
        checkpoints: the checkpoints of this run that still exist, or the one of an already finished run.
        final: the checkpoint that the run ends with, and its results: the best one on the val split, or the last one
            where there is none.
        test_accuracy: the test accuracy of that checkpoint, from 0 to 1.
        images_per_s: the mean training throughput over the epochs, or None if no epoch was left to train.
        epochs: the number of completed epochs, including those before a resume.
        device: the device that was used.
        data: the name of the dataset.
        class_names: the classes in label order.
        best: the checkpoint with the best accuracy, and that accuracy, on the val split or on the test split where
            there is none; None before the first completed epoch.
        peak_memory_bytes: the peak memory of the GPU, or of the process on a CPU.
        stop_reason: why training stopped before the last epoch, or None if it did not.
    """

    checkpoints: list[Path]
    final: FinalReport
    test_accuracy: float
    images_per_s: float | None
    epochs: int
    device: str
    data: str
    class_names: tuple[str, ...]
    best: tuple[Path, float] | None
    peak_memory_bytes: int
    stop_reason: str | None = None


class Trainer:
    """Trains a model in one process of a run.

    Args:
        plan: the configuration of the run.
        loop: the training loop.
        images: the images to evaluate the model on.
        directory: where checkpoints are saved.
        callback: receives the events of the run.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        loop: TrainingLoop,
        images: RunData,
        directory: CheckpointDirectory,
        callback: Callback,
    ) -> None:
        self._plan, self._loop, self._images = plan, loop, images
        self._evaluator = plan.evaluator(images.test if images.val is None else images.val)
        self._directory, self._callback = directory, callback
        self._best_epoch, self._best_accuracy = -1, -1.0
        self._has_best = False  # whether the checkpoint of the best epoch is in the directory
        self._checkpoints: list[Path] = []
        self._throughputs: list[float] = []
        self._evaluation: Evaluation | None = None
        self._last_val_accuracy: float | None = None
        self._stop_reason: str | None = None
        self._deadline = math.inf

    def fit(self, resume_point: ResumePoint | None) -> TrainResult:
        """Train until the recipe ends, from the beginning or from a checkpoint, and test the result.

        Args:
            resume_point: the checkpoint to resume from, or None for a new run.

        Raises:
            Interrupted: SIGINT or SIGTERM was received; the training state is saved.
            CheckFailed: the loss is not finite.
            OutputError: a checkpoint cannot be written. Earlier checkpoints are left unchanged.
        """
        if resume_point:
            self._resume(resume_point)
        with ExitStack() as stack:
            stack.callback(self._callback.on_train_end)
            self._callback.on_train_start(self._run_info(resume_point))
            received = stack.enter_context(catch_signals())
            epochs = self._loop.train_epochs(self._callback, self._stop_condition(received))
            for result in iter(()) if self._stop_reason else epochs:
                self._finish_epoch(result, received)
                if self._stop_reason:
                    break
            final = self._final_report()
            self._callback.on_test_end(final)
        return self._result(final)

    def _resume(self, point: ResumePoint) -> None:
        state = point.checkpoint.training
        try:
            self._loop.load_state_dict(state, point.checkpoint.weights)
            self._best_epoch, self._best_accuracy = state["best_epoch"], state["best_accuracy"]
            self._has_best = point.path.resolve().parent == self._directory.directory.resolve()
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelFileError(
                f"{point.path} cannot be resumed from ({reason})", "start a new run without --resume"
            ) from error
        if self._out_of_patience(self._loop.epoch - 1):
            self._stop_reason = self._patience_reason()
        self._loop.last_checkpoint = str(point.path)
        self._checkpoints = [point.path]
        self._last_val_accuracy = point.record.val_accuracy

    def _run_info(self, resume_point: ResumePoint | None) -> RunInfo:
        plan, images = self._plan, self._images
        return RunInfo(
            model=plan.architecture.name,
            module=self._loop.module,
            input=plan.input,
            recipe=plan.recipe,
            seed=plan.seed,
            device=str(plan.device),
            world_size=plan.distributed.world_size,
            data=plan.data.name,
            class_names=plan.class_names,
            num_train_images=len(images.train),
            test_set=images.splits.test,
            total_steps=self._loop.total_steps,
            first_step=self._loop.step,
            resumed_from=resume_point.path if resume_point else None,
            val_set=images.splits.val,
            class_counts=class_counts(images.train, len(plan.class_names)),
            num_calibration_images=plan.data.train_images - len(images.train),
        )

    def _stop_condition(self, received: ReceivedSignal) -> Callable[[], bool]:
        """Return the function that decides after every step whether to stop. It agrees on all ranks."""
        max_minutes = self._plan.recipe.max_minutes
        if max_minutes is not None:
            self._deadline = time.perf_counter() + 60 * max_minutes - self._loop.elapsed_s

        def should_stop() -> bool:
            return self._plan.distributed.any(received.number is not None or time.perf_counter() >= self._deadline)

        return should_stop

    def _finish_epoch(self, result: EpochResult, received: ReceivedSignal) -> None:
        """Evaluate, save and report an epoch, and decide whether training stops early."""
        distributed = self._plan.distributed
        if not result.complete and distributed.any(received.number is not None):
            path = self._save(result, None)
            raise self._interrupted_error(result, path, received)
        distributed.broadcast_buffers(self._loop.eval_model)
        evaluation = self._evaluator.evaluate(self._loop.eval_model)
        # The last step may have produced invalid weights although its own loss was finite.
        require_finite_loss(evaluation.loss, result.step, self._loop.last_checkpoint)
        started = time.perf_counter()
        path = self._save(result, evaluation)
        self._report_epoch(result, evaluation, path, time.perf_counter() - started)
        if distributed.any(received.number is not None):
            raise self._interrupted_error(result, path, received)
        unfinished = self._loop.epoch < self._plan.recipe.epochs
        if unfinished and distributed.any(time.perf_counter() >= self._deadline):
            self._stop_reason = f"time limit reached ({self._plan.recipe.max_minutes:g} min)"
        elif unfinished and self._out_of_patience(result.epoch):
            self._stop_reason = self._patience_reason()

    def _save(self, result: EpochResult, evaluation: Evaluation | None) -> Path:
        """Write the checkpoint of an epoch, or of a run stopped within one. Only rank 0 writes."""
        is_best = result.complete and evaluation is not None and evaluation.accuracy > self._best_accuracy
        if is_best and evaluation is not None:
            self._best_epoch, self._best_accuracy, self._has_best = result.epoch, evaluation.accuracy, True
        checkpoint = self._checkpoint(result, evaluation)
        path = self._directory.epoch_path(result.epoch) if result.complete else self._directory.interrupted_path
        if self._plan.distributed.is_main_process:
            if result.complete:
                self._directory.save(result.epoch, checkpoint, is_best=is_best)
            else:
                self._directory.save_interrupted(checkpoint)
        self._loop.last_checkpoint = str(path)
        return path

    def _checkpoint(self, result: EpochResult, evaluation: Evaluation | None) -> Checkpoint:
        plan = self._plan
        measured = (evaluation.accuracy, evaluation.loss) if evaluation else (None, None)
        test, val = (measured, (None, None)) if self._images.val is None else ((None, None), measured)
        record = TrainingRecord(
            data=plan.data,
            recipe=msgspec.to_builtins(plan.recipe),
            epochs=result.epoch + result.complete,
            seed=plan.seed,
            test_accuracy=test[0],
            test_loss=test[1],
            val_accuracy=val[0],
            val_loss=val[1],
            device=str(plan.device),
            versions=library_versions(),
            weights=plan.weights,
            teacher=plan.teacher,
        )
        spec = ModelSpec(
            model=plan.architecture.name,
            stem=plan.architecture.stem,
            source=plan.architecture.source,
            class_names=plan.class_names,
            input=plan.input,
            training=record,
        )
        best = {"best_epoch": self._best_epoch, "best_accuracy": self._best_accuracy}
        return Checkpoint(spec, self._loop.eval_model.state_dict(), {**self._loop.state_dict(), **best})

    def _report_epoch(self, result: EpochResult, evaluation: Evaluation, path: Path, checkpoint_s: float) -> None:
        self._evaluation = evaluation
        self._last_val_accuracy = None if self._images.val is None else evaluation.accuracy
        self._checkpoints.append(path)
        self._throughputs.append(result.images_per_s)
        self._callback.on_epoch_end(
            EpochReport(
                epoch=result.epoch,
                epochs=self._plan.recipe.epochs,
                step=result.step,
                train_loss=result.loss,
                evaluation=evaluation,
                images_per_s=result.images_per_s,
                checkpoint_s=checkpoint_s,
                checkpoint=path,
            )
        )

    def _out_of_patience(self, epoch: int) -> bool:
        patience = self._plan.recipe.patience
        return patience is not None and epoch - self._best_epoch >= patience

    def _patience_reason(self) -> str:
        best = self._best_epoch + 1  # counted from 1, as in the progress output
        split = "test" if self._images.val is None else "val"
        return f"{split} accuracy has not improved since epoch {best} (patience {self._plan.recipe.patience})"

    def _interrupted_error(self, result: EpochResult, path: Path, received: ReceivedSignal) -> Interrupted:
        return Interrupted(
            f"interrupted at step {result.step:,} of {self._loop.total_steps:,}, checkpoint saved to {path}",
            "add --resume auto to the same command to continue",
            received.number or signal.SIGTERM,
        )

    def _final_report(self) -> FinalReport:
        """Test the checkpoint that the run ends with."""
        final = FinalEvaluation(self._plan, self._loop, self._images, self._directory)
        best = self._best_checkpoint()
        if self._images.val is not None and best and self._has_best:
            return final.run(CheckpointToTest(best, self._best_epoch, self._best_accuracy, None))
        last_epoch = self._loop.epoch - (self._loop.epoch_step == 0)
        evaluation = self._evaluation if self._images.val is None else None
        return final.run(
            CheckpointToTest(self._existing_checkpoints()[-1], last_epoch, self._last_val_accuracy, evaluation)
        )

    def _existing_checkpoints(self) -> list[Path]:
        return [path for path in self._checkpoints if path.exists()] or [self._directory.best_path]

    def _best_checkpoint(self) -> Path | None:
        if self._best_epoch < 0:
            return None
        path = self._directory.epoch_path(self._best_epoch)
        return path if path.exists() else self._directory.best_path

    def _result(self, final: FinalReport) -> TrainResult:
        best = self._best_checkpoint()
        return TrainResult(
            checkpoints=self._existing_checkpoints(),
            final=final,
            test_accuracy=final.evaluation.accuracy,
            images_per_s=sum(self._throughputs) / len(self._throughputs) if self._throughputs else None,
            epochs=self._loop.epoch,
            device=str(self._plan.device),
            data=self._plan.data.name,
            class_names=self._plan.class_names,
            best=(best, self._best_accuracy) if best else None,
            peak_memory_bytes=peak_device_memory(self._plan.device),
            stop_reason=self._stop_reason,
        )
