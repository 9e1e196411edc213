"""The checkpoints of one run: their names, which are kept, and where a run goes on."""

import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from cifarx_serve.errors import FallbackWarning, ModelFileError, SpecError
from cifarx_serve.files.atomic import atomic_path, remove_leftovers
from cifarx_train.checkpoints.checkpoint import SUFFIX, Checkpoint, checkpoint_path, load_checkpoint, save_checkpoint


class CheckpointDirectory:
    """`{model}_{epoch}.pth`, epochs from 0; `{model}_interrupted.pth` of a run stopped within an epoch.

    Args:
        folder: where they are.
        model: the network's name.
        keep: how many epochs' files stay, the newest; then `{model}_best.pth` is kept beside them. None keeps all.
    """

    def __init__(self, folder: Path, model: str, keep: int | None = None) -> None:
        self.folder = folder
        self._model = model
        self._keep = keep
        self.interrupted = folder / f"{model}_interrupted{SUFFIX}"
        self.best = folder / f"{model}_best{SUFFIX}"

    def path(self, epoch: int) -> Path:
        """The file of an epoch."""
        return checkpoint_path(self.folder, self._model, epoch)

    def save(self, epoch: int, checkpoint: Checkpoint, *, is_best: bool) -> Path:
        """Write an epoch's checkpoint; only then remove what it makes superfluous.

        Raises:
            OutputError: the place cannot be written; what was saved before is as it was.
        """
        path = self.path(epoch)
        save_checkpoint(path, checkpoint)
        if self._keep is not None:
            if is_best:
                _copy(path, self.best)
            for old in self._epochs():
                if old <= epoch - self._keep:  # later ones are an older run's, and not ours to remove
                    self.path(old).unlink(missing_ok=True)
        self.interrupted.unlink(missing_ok=True)
        return path

    def save_interrupted(self, checkpoint: Checkpoint) -> Path:
        """Write the state within an epoch."""
        save_checkpoint(self.interrupted, checkpoint)
        return self.interrupted

    def newest(self) -> tuple[Path, Checkpoint] | None:
        """The checkpoint written last, of those that can be read; a damaged one is told of and passed over.

        Time decides, not the epoch: the folder may hold the later epochs of an older run. Also removes what a killed
        run left half written.
        """
        remove_leftovers(self.folder, SUFFIX)
        paths = [path for path in (self.interrupted, self.best, *map(self.path, self._epochs())) if path.exists()]
        # The best may be a second name of an epoch's file, and as new: then the epoch's own name counts.
        for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path != self.best), reverse=True):
            try:
                return path, load_checkpoint(path)
            except (ModelFileError, SpecError) as error:
                warnings.warn(f"passing over a damaged checkpoint: {error.problem}", FallbackWarning, stacklevel=2)
        return None

    def _epochs(self) -> list[int]:
        pattern = re.compile(rf"{re.escape(self._model)}_(0|[1-9][0-9]*){re.escape(SUFFIX)}")
        with suppress(FileNotFoundError):
            names = [path.name for path in self.folder.iterdir()]
            return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))
        return []


def _copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, temporary)
