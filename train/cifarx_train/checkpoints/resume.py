"""Finding the checkpoint to resume from, and checking that the run is the same one."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cifarx_serve.errors import FallbackWarning, ModelFileError, UsageError
from cifarx_serve.spec import TrainingRecord
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_training_checkpoint
from cifarx_train.checkpoints.directory import CheckpointDirectory
from cifarx_train.distributed import Distributed
from cifarx_train.recipes import Recipe, build_recipe, load_recipe

# Fields that may differ from those of the resumed run: they decide when it ends, or do not affect its result.
_CHANGEABLE_FIELDS = frozenset({"epochs", "patience", "max_minutes", "compile"})


class ResumePoint(NamedTuple):
    """The checkpoint that a run resumes from, and how it was trained."""

    path: Path
    checkpoint: Checkpoint
    record: TrainingRecord


def find_resume_point(resume: str, directory: CheckpointDirectory) -> ResumePoint | None:
    """Load the checkpoint to resume from.

    Args:
        resume: the path of a checkpoint, or `auto` for the latest readable one in the directory.
        directory: the checkpoints of the run.

    Returns:
        None if `resume` is `auto` and the directory has no checkpoint. This also issues a `FallbackWarning`.

    Raises:
        ModelFileError: the file is missing or damaged, or contains no training state.
    """
    if resume == "auto":
        found = directory.latest()
        if found is None:
            warnings.warn(
                f"no checkpoint to resume from in {directory.directory}: starting a new run",
                FallbackWarning,
                stacklevel=2,
            )
            return None
        path, checkpoint = found
    else:
        path, checkpoint = Path(resume), load_training_checkpoint(Path(resume))
    if checkpoint.spec.training is None or "shuffle" not in checkpoint.training or "done" not in checkpoint.training:
        raise ModelFileError(f"{path} contains weights but no training state", "start a new run without --resume")
    return ResumePoint(path, checkpoint, checkpoint.spec.training)


def resume_recipe(point: ResumePoint, name: str | None, overrides: Mapping[str, Any], model: str) -> Recipe:
    """Return the recipe of the resumed run, with the changes from `overrides` that do not make it a different run.

    Raises:
        UsageError: the recipe `name` or the overrides differ from those the run was started with.
    """
    recorded = build_recipe(point.record.recipe, {}, f"the recipe in {point.path}")
    requested = (
        load_recipe(name, model, overrides) if name else build_recipe(point.record.recipe, overrides, "the recipe")
    )
    requested = requested.complete(
        precision=recorded.precision,
        channels_last=recorded.channels_last,
        distillation_weight=recorded.distillation_weight,
        distillation_temperature=recorded.distillation_temperature,
    )
    changes = requested.diff(recorded)
    if conflicts := {field: pair for field, pair in changes.items() if field not in _CHANGEABLE_FIELDS}:
        text = ", ".join(f"{field} {old!r}, not {new!r}" for field, (new, old) in conflicts.items())
        raise UsageError(
            f"{point.path} was trained with {text}", "use the same values, or start a new run without --resume"
        )
    if "epochs" in changes and (recorded.schedule != "constant" or recorded.warmup_fraction):
        warnings.warn(
            f"changing epochs from {recorded.epochs} to {requested.epochs} stretches the learning rate schedule from "
            "this point on",
            FallbackWarning,
            stacklevel=2,
        )
    return requested


def require_same_step(point: ResumePoint | None, distributed: Distributed) -> None:
    """Raise UsageError if the ranks would resume from different steps."""
    step = int(point.checkpoint.training["step"]) if point else 0
    steps = {int(value) for value in distributed.all_gather(torch.tensor(step))}
    if len(steps) > 1:
        raise UsageError(
            f"the processes found checkpoints of different steps ({', '.join(map(str, sorted(steps)))})",
            "use the same --out on all machines, on a shared file system",
        )


def require_same(point: ResumePoint, name: str, recorded: object, requested: object) -> None:
    """Raise UsageError if the run was started with another model, dataset or seed."""
    if recorded != requested:
        raise UsageError(
            f"{point.path} was trained with {name} {recorded}, not {requested}",
            "use the same value, or start a new run with another --out",
        )
