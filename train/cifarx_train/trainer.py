"""What happens around the loop: judging, saving, stopping, going on."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from cifarx_serve.errors import Interrupted, ModelFileError
from cifarx_serve.spec import DataRecord, InputSpec, ModelSpec, TrainingRecord
from cifarx_serve.system.versions import library_versions
from cifarx_train.callbacks.base import Callback, EpochReport, RunStart
from cifarx_train.checkpoints.checkpoint import Checkpoint
from cifarx_train.checkpoints.directory import CheckpointDirectory
from cifarx_train.checkpoints.resume import ResumePoint
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluation, Evaluator
from cifarx_train.loop import EpochEnd, Loop, require_finite
from cifarx_train.memory import peak_memory
from cifarx_train.models.network import Network
from cifarx_train.recipes import Recipe
from cifarx_train.signals import Interruption, catch_signals


class TrainResult(NamedTuple):
    """A finished run.

    Attributes:
        checkpoints: the epochs' files that this process wrote and kept, or the one it found finished.
        test_accuracy: of the last of them.
        images_per_s: the mean over the epochs; None where nothing was left to train.
        epochs: whole epochs trained, with those of the run that was continued.
        best: the checkpoint of the best test accuracy, and that; None before the first whole epoch.
        memory_bytes: the most that the run took, of the GPU or of the process.
        stopped: why it ended before its last epoch, or None.
    """

    checkpoints: list[Path]
    test_accuracy: float
    images_per_s: float | None
    epochs: int
    device: str
    data: str
    best: tuple[Path, float] | None
    memory_bytes: int
    stopped: str | None = None


class Plan(NamedTuple):
    """What stays the same through a run."""

    network: Network
    input: InputSpec
    recipe: Recipe
    class_names: tuple[str, ...]
    data: DataRecord
    seed: int
    device: torch.device
    ranks: Distributed


class Session:
    """One process's part of a run."""

    def __init__(
        self, plan: Plan, loop: Loop, judge: Evaluator, folder: CheckpointDirectory, callback: Callback
    ) -> None:
        self._plan, self._loop, self._judge, self._folder, self._observer = plan, loop, judge, folder, callback
        self._best_epoch, self._best_accuracy = -1, -1.0
        self._written: list[Path] = []
        self._speeds: list[float] = []
        self._accuracy = 0.0
        self._stopped: str | None = None
        self._deadline = math.inf

    def run(self, test: LabeledImages, point: ResumePoint | None) -> TrainResult:
        """Train to the end of the recipe, from the start or from where another process stopped.

        Raises:
            Interrupted: SIGINT or SIGTERM; the state is saved.
            CheckFailed: the loss is no longer finite.
            OutputError: a checkpoint cannot be written; the ones before are as they were.
        """
        if point:
            self._continue(point)
        with ExitStack() as stack:
            stack.callback(self._observer.on_end)
            self._observer.on_start(self._start(test))
            interruption = stack.enter_context(catch_signals())
            epochs = iter(()) if self._stopped else self._loop.epochs(self._observer, self._stop(interruption))
            for end in epochs:
                self._end_epoch(end, interruption)
                if self._stopped:
                    break
        return self._result()

    def _continue(self, point: ResumePoint) -> None:
        state = point.checkpoint.training
        try:
            self._loop.restore(point.checkpoint.model, state)
            self._best_epoch, self._best_accuracy = state["best_epoch"], state["best_accuracy"]
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelFileError(f"{point.path} cannot be continued ({reason})", "start a new run") from error
        if self._impatient(self._loop.epoch - 1):
            self._stopped = "the run was already out of patience"
        self._loop.good = str(point.path)
        self._written = [point.path]
        self._accuracy = point.record.test_accuracy or 0.0

    def _start(self, test: LabeledImages) -> RunStart:
        plan = self._plan
        return RunStart(
            model=plan.network.name,
            module=self._loop.module,
            input=plan.input,
            recipe=plan.recipe,
            seed=plan.seed,
            device=str(plan.device),
            ranks=plan.ranks.size,
            data=plan.data.name,
            class_names=plan.class_names,
            train_images=plan.data.train_images,
            test=test,
            steps=self._loop.steps,
            first_step=self._loop.step,
        )

    def _stop(self, interruption: Interruption) -> Callable[[], bool]:
        """Whether the run is to end after this step; all ranks hear the same answer."""
        minutes = self._plan.recipe.max_minutes
        if minutes is not None:
            self._deadline = time.perf_counter() + 60 * minutes - self._loop.seconds

        def stop() -> bool:
            return self._plan.ranks.any(interruption.signal_number is not None or time.perf_counter() >= self._deadline)

        return stop

    def _end_epoch(self, end: EpochEnd, interruption: Interruption) -> None:
        ranks = self._plan.ranks
        if not end.whole and ranks.any(interruption.signal_number is not None):
            path = self._save(end, None)
            raise self._interrupted(end, path, interruption)
        ranks.align(self._loop.eval_model)
        evaluation = self._judge.evaluate(self._loop.eval_model)
        # The last step may have ruined weights whose loss was finite.
        require_finite(evaluation.loss, end.step, self._loop.good)
        started = time.perf_counter()
        path = self._save(end, evaluation)
        self._told(end, evaluation, path, time.perf_counter() - started)
        if ranks.any(interruption.signal_number is not None):
            raise self._interrupted(end, path, interruption)
        unfinished = self._loop.epoch < self._plan.recipe.epochs
        if unfinished and ranks.any(time.perf_counter() >= self._deadline):
            self._stopped = f"the time is over (max_minutes {self._plan.recipe.max_minutes:g})"
        elif unfinished and self._impatient(end.epoch):
            self._stopped = f"no better accuracy than that of epoch {self._best_epoch + 1} (patience)"

    def _save(self, end: EpochEnd, evaluation: Evaluation | None) -> Path:
        """Write the checkpoint of an epoch, or the state within one; the first rank alone writes."""
        best = end.whole and evaluation is not None and evaluation.accuracy > self._best_accuracy
        if best and evaluation is not None:
            self._best_epoch, self._best_accuracy = end.epoch, evaluation.accuracy
        checkpoint = self._checkpoint(end, evaluation)
        path = self._folder.path(end.epoch) if end.whole else self._folder.interrupted
        if self._plan.ranks.is_main_process:
            if end.whole:
                self._folder.save(end.epoch, checkpoint, is_best=best)
            else:
                self._folder.save_interrupted(checkpoint)
        self._loop.good = str(path)
        return path

    def _checkpoint(self, end: EpochEnd, evaluation: Evaluation | None) -> Checkpoint:
        plan = self._plan
        record = TrainingRecord(
            data=plan.data,
            recipe=msgspec.to_builtins(plan.recipe),
            epochs=end.epoch + end.whole,
            seed=plan.seed,
            test_accuracy=evaluation.accuracy if evaluation else None,
            test_loss=evaluation.loss if evaluation else None,
            device=str(plan.device),
            versions=library_versions(),
        )
        spec = ModelSpec(
            model=plan.network.name,
            stem=plan.network.stem,
            class_names=plan.class_names,
            input=plan.input,
            training=record,
        )
        best = {"best_epoch": self._best_epoch, "best_accuracy": self._best_accuracy}
        return Checkpoint(spec, self._loop.eval_model.state_dict(), {**self._loop.state(), **best})

    def _told(self, end: EpochEnd, evaluation: Evaluation, path: Path, save_s: float) -> None:
        self._accuracy = evaluation.accuracy
        self._written.append(path)
        self._speeds.append(end.images_per_s)
        epochs = self._plan.recipe.epochs
        report = EpochReport(end.epoch, epochs, end.step, end.loss, evaluation, end.images_per_s, save_s, path)
        self._observer.on_epoch(report)

    def _impatient(self, epoch: int) -> bool:
        patience = self._plan.recipe.patience
        return patience is not None and epoch - self._best_epoch >= patience

    def _interrupted(self, end: EpochEnd, path: Path, interruption: Interruption) -> Interrupted:
        return Interrupted(
            f"interrupted at step {end.step:,} of {self._loop.steps:,}, saved in {path}",
            "the same command with --resume auto goes on",
            interruption.signal_number or signal.SIGTERM,
        )

    def _result(self) -> TrainResult:
        kept = [path for path in self._written if path.exists()] or [self._folder.best]
        whole = self._loop.epoch
        best = self._folder.path(self._best_epoch)
        return TrainResult(
            checkpoints=kept,
            test_accuracy=self._accuracy,
            images_per_s=sum(self._speeds) / len(self._speeds) if self._speeds else None,
            epochs=whole,
            device=str(self._plan.device),
            data=self._plan.data.name,
            best=(best if best.exists() else self._folder.best, self._best_accuracy) if self._best_epoch >= 0 else None,
            memory_bytes=peak_memory(self._plan.device),
            stopped=self._stopped,
        )
