"""A progress bar on the terminal while pytest captures the output."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class ProgressBar:
    """Shows one bar for several stages; each stage advances it to a given share of the whole.

    Create it while the output is not captured: it keeps a copy of standard error. Where that is no terminal,
    it prints a line per stage instead.
    """

    def __init__(self) -> None:
        self._console = Console(file=os.fdopen(os.dup(2), "w", encoding="utf-8"))
        self._share = 0.0
        self._started = time.monotonic()

    @contextmanager
    def stage(self, title: str, share: float, steps: int) -> Iterator["Stage"]:
        """Show the bar during one stage.

        Args:
            title: shown before the message of the current step.
            share: the share of the whole that this stage takes.
            steps: the expected number of steps; the bar stops short of the end of the stage if there are more.
        """
        start, self._share = self._share, min(self._share + share, 1.0)
        if not self._console.is_terminal:
            self._console.print(f"{title} …")
            yield Stage(None, title, 0.0, 0.0)
            return
        self._console.print()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True, get_time=time.monotonic) as progress:
            task = progress.add_task(title, total=1.0)
            progress.update(task, completed=start)
            progress.tasks[0].start_time = self._started  # of the session, not of the stage
            yield Stage(progress, title, share / (steps + 1), self._share)


class Stage:
    """One stage of a `ProgressBar`; call it with a message when a step begins."""

    def __init__(self, progress: Progress | None, title: str, step: float, end: float) -> None:
        self._progress = progress
        self._title = title
        self._step = step
        self._end = end

    def __call__(self, message: str) -> None:
        if self._progress is not None:
            (task,) = self._progress.tasks
            completed = min(task.completed + self._step, self._end)
            self._progress.update(task.id, completed=completed, description=f"{self._title}: {message}"[:60])
