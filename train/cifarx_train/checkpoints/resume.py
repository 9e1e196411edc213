"""Where a run goes on, and whether it is the same run."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cifarx_serve.errors import FallbackWarning, ModelFileError, UsageError
from cifarx_serve.spec import TrainingRecord
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from cifarx_train.checkpoints.directory import CheckpointDirectory
from cifarx_train.distributed import Distributed
from cifarx_train.recipes import Recipe, changed, recipe

# What may differ from the run that is continued: when it ends, and what changes no result on purpose.
_MAY_DIFFER = frozenset({"epochs", "patience", "max_minutes", "compile"})


class ResumePoint(NamedTuple):
    """The checkpoint that a run continues, and how it was trained so far."""

    path: Path
    checkpoint: Checkpoint
    record: TrainingRecord


def resume_point(choice: str, folder: CheckpointDirectory) -> ResumePoint | None:
    """The checkpoint to continue: a file by name, or `auto`, the newest good one of the folder, or None without one.

    Raises:
        ModelFileError: the file is absent or damaged, or holds no state of a training run.
    """
    if choice == "auto":
        found = folder.newest()
        if found is None:
            warnings.warn(f"nothing to resume in {folder.folder}: a new run", FallbackWarning, stacklevel=2)
            return None
        path, checkpoint = found
    else:
        path, checkpoint = Path(choice), load_checkpoint(Path(choice))
    if checkpoint.spec.training is None or "shuffle" not in checkpoint.training or "done" not in checkpoint.training:
        raise ModelFileError(f"{path} holds weights, and no state of a run to continue", "start a new run")
    return ResumePoint(path, checkpoint, checkpoint.spec.training)


def continued_recipe(point: ResumePoint, name: str | None, settings: Mapping[str, Any], model: str) -> Recipe:
    """The recipe of the run that goes on, ended where `settings` say.

    Raises:
        UsageError: something else was asked for than the run was started with.
    """
    before = changed(point.record.recipe, {}, f"the recipe in {point.path}")
    now = recipe(name, model, settings) if name else changed(point.record.recipe, settings, "the recipe")
    differing = now.differences(before)
    if odd := {field: pair for field, pair in differing.items() if field not in _MAY_DIFFER}:
        told = ", ".join(f"{field} {was!r} and not {wanted!r}" for field, (wanted, was) in odd.items())
        raise UsageError(f"the run of {point.path} has {told}", "leave that out, or start a new run without --resume")
    if "epochs" in differing and (before.schedule != "constant" or before.warm_up):
        warnings.warn(
            f"{now.epochs} epochs in place of {before.epochs} stretch the learning-rate schedule from here on",
            FallbackWarning,
            stacklevel=2,
        )
    return now


def require_agreement(point: ResumePoint | None, ranks: Distributed) -> None:
    """Raises UsageError where the ranks would continue from different steps."""
    step = int(point.checkpoint.training["step"]) if point else 0
    steps = {int(value) for value in ranks.gather(torch.tensor(step))}
    if len(steps) > 1:
        raise UsageError(
            f"the processes found checkpoints of different steps ({', '.join(map(str, sorted(steps)))})",
            "give all machines the same --out, on a file system that they share",
        )


def require_same(point: ResumePoint, what: str, before: object, now: object) -> None:
    """Raises UsageError where the run that goes on was started with another model, data set or seed."""
    if before != now:
        raise UsageError(
            f"{point.path} was trained with {what} {before}, not {now}", "give the same, or start a new run in --out"
        )
