"""The checkpoint files of one run: their names, which of them are kept, and which one is the latest."""

import filecmp
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from cifarx_serve.errors import FallbackWarning, ModelFileError, SpecError
from cifarx_serve.files.atomic import atomic_path, remove_partial_files
from cifarx_train.checkpoints.checkpoint import (
    SUFFIX,
    Checkpoint,
    checkpoint_path,
    load_training_checkpoint,
    save_checkpoint,
)


class CheckpointDirectory:
    """The checkpoints `{model}_{epoch}.pth`, with epochs from 0, and `{model}_interrupted.pth`, saved within an epoch.

    Args:
        directory: where the checkpoints are.
        model: the name of the model.
        keep: the number of epochs whose checkpoints are kept, the latest ones. The best checkpoint is then kept as
            `{model}_best.pth`. None keeps all.

    Attributes:
        interrupted_path: the checkpoint of a run that stopped within an epoch.
        best_path: the checkpoint with the best accuracy, written only if `keep` is given.
    """

    def __init__(self, directory: Path, model: str, keep: int | None = None) -> None:
        self.directory = directory
        self._model = model
        self._keep = keep
        self.interrupted_path = directory / f"{model}_interrupted{SUFFIX}"
        self.best_path = directory / f"{model}_best{SUFFIX}"

    def epoch_path(self, epoch: int) -> Path:
        """Return the path of the checkpoint of an epoch."""
        return checkpoint_path(self.directory, self._model, epoch)

    def save(self, epoch: int, checkpoint: Checkpoint, *, is_best: bool) -> Path:
        """Write the checkpoint of an epoch, then remove the ones that are no longer kept, and return its path.

        Raises:
            OutputError: the file cannot be written. Earlier checkpoints are left unchanged.
        """
        path = self.epoch_path(epoch)
        save_checkpoint(path, checkpoint)
        if self._keep is not None:
            if is_best:
                _link_or_copy(path, self.best_path)
            for saved in self._saved_epochs():
                if saved <= epoch - self._keep:  # later epochs belong to an older run and are not ours to remove
                    self.epoch_path(saved).unlink(missing_ok=True)
        self.interrupted_path.unlink(missing_ok=True)
        return path

    def update(self, path: Path, checkpoint: Checkpoint) -> None:
        """Write a checkpoint that is complete now. It keeps its modification time, so it does not become the latest.

        Raises:
            OutputError: the file cannot be written. The earlier one is left unchanged.
        """
        is_best = self._is_best(path)
        save_checkpoint(path, checkpoint, path.stat().st_mtime_ns)
        if is_best:
            _link_or_copy(path, self.best_path)

    def _is_best(self, path: Path) -> bool:
        """Return whether the best checkpoint is another name or a copy of this one."""
        if path == self.best_path or not self.best_path.exists():
            return False
        return path.samefile(self.best_path) or filecmp.cmp(path, self.best_path, shallow=False)

    def save_interrupted(self, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint of a run that stopped within an epoch, and return its path.

        Raises:
            OutputError: the file cannot be written.
        """
        save_checkpoint(self.interrupted_path, checkpoint)
        return self.interrupted_path

    def latest(self) -> tuple[Path, Checkpoint] | None:
        """Return the latest readable checkpoint, or None. Damaged checkpoints are skipped with a `FallbackWarning`.

        The latest is determined by modification time rather than epoch, because the directory may contain later epochs
        of an older run. Also removes the partial files of a killed run.
        """
        remove_partial_files(self.directory, SUFFIX)
        candidates = (self.interrupted_path, self.best_path, *map(self.epoch_path, self._saved_epochs()))
        paths = [path for path in candidates if path.exists()]
        # The best checkpoint may be a hard link to that of an epoch, with the same time. The epoch's name goes first.
        for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path != self.best_path), reverse=True):
            try:
                return path, load_training_checkpoint(path)
            except (ModelFileError, SpecError) as error:
                warnings.warn(f"skipping a damaged checkpoint: {error.problem}", FallbackWarning, stacklevel=2)
        return None

    def _saved_epochs(self) -> list[int]:
        pattern = re.compile(rf"{re.escape(self._model)}_(0|[1-9][0-9]*){re.escape(SUFFIX)}")
        with suppress(FileNotFoundError):
            names = [path.name for path in self.directory.iterdir()]
            return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))
        return []


def _link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link, or a copy where the file system does not support links."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copy2(source, temporary)
