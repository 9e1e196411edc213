"""The parts that all benchmark report formats share: title, columns, MLPerf scenarios, remarks and environment."""

from collections.abc import Callable
from typing import Final, NamedTuple

from cifarx_serve.benchmarking.benchmark import BenchmarkReport, BenchmarkRow
from cifarx_serve.system.environment import Environment

UNSTABLE: Final = "~"
"""Precedes the p50 of a row whose last windows did not agree."""

_DEVICE: Final = "device µs"
_GPU_MEMORY: Final = "GPU MB"
_SINGLE_STREAM_BATCH: Final = 1


class Column(NamedTuple):
    """One column of the table on a terminal and in Markdown; a narrow terminal shows only the `essential` ones."""

    heading: str
    text: Callable[[BenchmarkRow], str]
    essential: bool = True


class ScenarioResults(NamedTuple):
    """One file's results in the SingleStream and Offline scenarios of MLPerf Inference.

    Attributes:
        file: the file's name.
        single_stream_us: the 90th-percentile latency at batch size 1, in microseconds; None if that was not measured.
        offline_images_per_s: the highest throughput at any batch size.
        offline_batch: the batch size of that throughput.
    """

    file: str
    single_stream_us: float | None
    offline_images_per_s: float
    offline_batch: int


def title(report: BenchmarkReport) -> str:
    """Return a line that says what was measured."""
    agreement = "agreement of all labels" if report.multi_label else "agreement"
    return f"one call, host memory to host memory; {agreement} on {_images(report)}"


def _images(report: BenchmarkReport) -> str:
    if report.test_images in (None, report.images):
        return f"{report.images:,} images of {report.data}"
    tested = report.test_images or 0
    splits = f"{tested:,} test and {report.images - tested:,} training images of {report.data}"
    return f"{splits}, accuracy on the test images"


def has_device_times(report: BenchmarkReport) -> bool:
    """Return whether any file ran on a device that reports its own time."""
    return any(row.device_us is not None for row in report.rows)


def has_gpu_memory(report: BenchmarkReport) -> bool:
    """Return whether the memory on a GPU is known for any file."""
    return any(row.gpu_bytes is not None for row in report.rows)


def columns(report: BenchmarkReport) -> list[Column]:
    """Return the columns of the table, without the device time and the memory on a GPU if no row has one."""
    shown = {_DEVICE: has_device_times(report), _GPU_MEMORY: has_gpu_memory(report)}
    return [column for column in _COLUMNS if shown.get(column.heading, True)]


def scenario_results(report: BenchmarkReport) -> list[ScenarioResults]:
    """Return the results of each file, in the order of the report."""
    rows_by_file: dict[str, list[BenchmarkRow]] = {}
    for row in report.rows:
        rows_by_file.setdefault(row.file, []).append(row)
    results = []
    for file, rows in rows_by_file.items():
        single_stream = next((row.p90_us for row in rows if row.batch == _SINGLE_STREAM_BATCH), None)
        fastest = max(rows, key=lambda row: row.images_per_s)
        results.append(ScenarioResults(file, single_stream, fastest.images_per_s, fastest.batch))
    return results


def scenario_lines(report: BenchmarkReport) -> list[str]:
    """Return one line per scenario that names the best file."""
    results = scenario_results(report)
    best = max(results, key=lambda result: result.offline_images_per_s)
    lines = [f"Offline: {best.file}, {best.offline_images_per_s:,.0f} images/s at batch {best.offline_batch}"]
    latencies = [(result.single_stream_us, result.file) for result in results if result.single_stream_us is not None]
    if latencies:
        latency, file = min(latencies)
        lines.insert(0, f"SingleStream: {file}, {latency:,.0f} µs at the 90th percentile")
    return lines


def remarks(report: BenchmarkReport) -> list[str]:
    """Return the warnings, and lines that explain the device times and the mark of unstable rows, if there are any."""
    lines = [f"WARNING: {warning}" for warning in report.warnings]
    if has_device_times(report):
        lines.append(
            f"{_DEVICE}: between two events around the run, with the input already on the device; the p50 includes "
            "the copies"
        )
    if has_gpu_memory(report):
        lines.append(f"{_GPU_MEMORY}: what all GPUs held more after the file was opened and warmed up, by all programs")
    if not all(row.stable for row in report.rows):
        lines.append(f"{UNSTABLE} the last three windows differ by more than 10 %: measure again on a quiet machine")
    return lines


def environment_line(environment: Environment) -> str:
    """Return the machine and the versions of its libraries on one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    gpus = f", {', '.join(environment.gpus)}" if environment.gpus else ""
    clock = f" at {environment.clock_mhz:,.0f} MHz" if environment.clock_mhz else ""
    cpu = f"{environment.cpu}{clock}, {environment.threads} of {environment.cpus} CPUs{gpus}"
    return f"{cpu}; Python {environment.python}, {versions}"


_COLUMNS: Final = (
    Column("file", lambda row: row.file),
    Column("provider", lambda row: row.provider),
    Column("precision", lambda row: row.precision, essential=False),
    Column("batch", lambda row: str(row.batch)),
    Column("p50 µs", lambda row: f"{'' if row.stable else UNSTABLE}{row.p50_us:,.0f}"),
    Column("p90 µs", lambda row: f"{row.p90_us:,.0f}", essential=False),
    Column("p99 µs", lambda row: f"{row.p99_us:,.0f}"),
    Column(_DEVICE, lambda row: "" if row.device_us is None else f"{row.device_us:,.0f}"),
    Column("samples", lambda row: f"{row.samples:,}", essential=False),
    Column("images/s", lambda row: f"{row.images_per_s:,.0f}"),
    Column("agreement", lambda row: f"{row.agreement:.2%}"),
    Column("accuracy", lambda row: "" if row.accuracy is None else f"{row.accuracy:.2%}", essential=False),
    Column("load ms", lambda row: f"{row.load_ms:,.0f}", essential=False),
    Column("first ms", lambda row: f"{row.first_call_ms:,.1f}", essential=False),
    Column("KB", lambda row: f"{row.size_bytes / 1000:,.0f}", essential=False),
    Column("peak MB", lambda row: f"{row.peak_bytes / 1e6:,.0f}", essential=False),
    Column(_GPU_MEMORY, lambda row: "" if row.gpu_bytes is None else f"{row.gpu_bytes / 1e6:,.0f}", essential=False),
)
