"""The files in which the workers of a server count for each other, as prometheus_client names and maps them.

A process is killed when it writes to a mapped page for which the disk has no space. So the supervisor writes the files
in full before it starts a worker. A worker that replaces another one goes on counting in the same files, so that
restarts need no more space.
"""

from pathlib import Path
from typing import Final

from cifarx_serve.errors import OutputError, error_message

_GAUGES: Final = "gauge_livesum"
# prometheus_client doubles a file that is full. The series of all routes, and of fifty models with ten classes or one
# with a thousand, fit into these sizes.
_SIZES: Final = {"counter": 1 << 18, "histogram": 1 << 20, _GAUGES: 1 << 16}
_EMPTY: Final = bytes(8)
"""The head of a file without values."""


def create_metrics_files(directory: Path, worker: int) -> None:
    """Create the files of a worker, with all of their space.

    Raises:
        OutputError: the directory has no space for them.
    """
    try:
        for kind, size in _SIZES.items():
            (directory / f"{kind}_{worker}.db").write_bytes(bytes(size))
    except OSError as error:
        problem = f"the metrics of worker {worker} cannot be written to {directory} ({error_message(error)})"
        raise OutputError(problem, "free some space, or set TMPDIR to another directory") from error


def clear_gauges(directory: Path, worker: int) -> None:
    """Remove the values that hold only while a worker runs. Its counters are kept."""
    with (directory / f"{_GAUGES}_{worker}.db").open("r+b") as file:
        file.write(_EMPTY)
