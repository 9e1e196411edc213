"""Write the tables of docs/formats.md: every format and precision of some checkpoints.

    python benchmarks/format_table.py lzh_9.pth resnet18_4.pth --out docs/formats.md

Each artifact is exported, and checked as by `cifarx export`. One that passes is measured in turns with the ONNX file in
fp32. A row holds the results, or the reason for a refusal, or what has to be installed. Let nothing else run meanwhile.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, NamedTuple

import typer
from packaging.requirements import Requirement

from cifarx.output.console import note
from cifarx_export.checked_artifact import ExportResult
from cifarx_export.export import export
from cifarx_export.formats.registry import FORMATS, PRECISIONS
from cifarx_export.parity.data import load_parity_data
from cifarx_serve.backends.registry import model_file
from cifarx_serve.benchmarking.benchmark import BenchmarkRow, benchmark
from cifarx_serve.errors import CifarxError
from cifarx_serve.spec import ParitySummary
from cifarx_serve.system.environment import current_environment
from cifarx_train.checkpoints.checkpoint import load_checkpoint

HEADINGS: Final = ("format", "precision", "MB", "max abs error", "agreement", "accuracy", "time", "first answer, s", "")

MEASURED_IMAGES: Final = 64
"""Number of images to measure with: all of them are also classified, which takes long on slow runtimes."""

PACKAGES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
        "torchscript": ("torch",),
        "exported_program": ("torch",),
        "aot_inductor": ("torch",),
        "openvino": ("openvino",),
        "executorch": ("executorch",),
        "litert": ("ai-edge-litert",),
    }
)
"""The package of each backend's runtime; of several, the first that is installed."""


class Row(NamedTuple):
    """One artifact, or the reason why there is none.

    Attributes:
        made: the export, if it ended with a parity check.
        refusal: why it did not.
        measured: the artifact and the ONNX file in fp32, measured in turns; None if there is no artifact.
    """

    format: str
    precision: str
    made: ExportResult | None = None
    refusal: str = ""
    measured: tuple[BenchmarkRow, BenchmarkRow] | None = None

    def cells(self) -> tuple[str, ...]:
        if self.made is None:
            return (self.format, self.precision, *[""] * (len(HEADINGS) - 3), self.refusal)
        summary = self.made.report.summary
        failed = ", ".join(f"{check.name} {check.found}" for check in self.made.report.checks if not check.passed)
        return (
            self.format,
            self.precision,
            f"{_megabytes(self.made.path):.1f}" if summary.passed else "",
            "" if summary.max_abs_error is None else f"{summary.max_abs_error:.1e}",
            f"{summary.agreement:.2%}",
            _accuracy(summary),
            *self._speed(),
            "passed" if summary.passed else f"refused: {failed}",
        )

    def _speed(self) -> tuple[str, str]:
        if self.measured is None:
            return "", ""
        artifact, reference = self.measured
        return f"{artifact.p50_us / reference.p50_us:.2f}", f"{(artifact.load_ms + artifact.first_call_ms) / 1000:.2f}"


def _megabytes(path: Path) -> float:
    """Return the size of a file, or of all files in a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def _accuracy(summary: ParitySummary) -> str:
    if summary.accuracy is None or summary.reference_accuracy is None:
        return ""
    return f"{summary.accuracy:.2%} ({(summary.accuracy - summary.reference_accuracy) * 100:+.2f})"


def _rows(checkpoint: Path, data: str, folder: Path, seconds: float) -> Iterator[Row]:
    images = load_parity_data(load_checkpoint(checkpoint).spec, data).images[:MEASURED_IMAGES]
    reference: Path | None = None
    for name, kind in FORMATS.items():
        for precision in PRECISIONS:
            if precision not in kind.precisions:
                continue
            note(f"{checkpoint.name}: {name} {precision}")
            try:
                (made,) = export(checkpoint, [name], [precision], data=data, out=folder)
            except CifarxError as error:
                missing = "is not installed" in error.problem
                refusal = f"not measured: {error}" if missing else f"refused: {error.problem}"
                yield Row(name, precision, refusal=refusal)
                continue
            if not made.report.summary.passed:
                yield Row(name, precision, made)
                continue
            artifact = model_file(made.path)
            reference = reference or artifact  # the first row is that of ONNX in fp32
            report = benchmark([reference, artifact], images, data, (1,), "cpu", seconds, single_threaded=True)
            yield Row(name, precision, made, measured=(report.rows[1], report.rows[0]))
            if made.path != reference:  # the files of a large network would fill the disk
                shutil.rmtree(made.path) if made.path.is_dir() else made.path.unlink()


def _section(checkpoint: Path, data: str, seconds: float) -> str:
    spec = load_checkpoint(checkpoint).spec
    taken, training = spec.input, spec.training
    trained = f"{training.accuracy_text} on {training.data.name}" if training else "no training record"
    with tempfile.TemporaryDirectory() as folder:
        rows = [row.cells() for row in _rows(checkpoint, data, Path(folder), seconds)]
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- | --- |" + " ---: |" * 6 + " --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return f"## {spec.model}, {taken.height}x{taken.width}, {trained}\n\n" + "\n".join(lines)


def format_rows() -> list[str]:
    """Return the registry of formats as Markdown."""
    lines = ["| format | file | precisions | devices | options | runs on |", "| --- | --- | --- | --- | --- | --- |"]
    for name, kind in FORMATS.items():
        options = ", ".join(f"`--{option.replace('_', '-')}`" for option in kind.options)
        file = f"`NAME{kind.suffix}{'/' if kind.directory_suffix else ''}`"
        cells = (name, file, ", ".join(kind.precisions), ", ".join(kind.devices), options, kind.backend)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def runtime_rows() -> list[str]:
    """Return the size of each installed runtime, with all that it requires and cifarx does not, as Markdown."""
    base = _required_packages("cifarx") - set(PACKAGES["onnxruntime"])
    lines = ["| runs on | package | MB installed |", "| --- | --- | ---: |"]
    for backend, packages in PACKAGES.items():
        name = next((name for name in packages if _is_installed(name)), None)
        if name is None:
            lines.append(f"| {backend} | {packages[0]} | not installed |")
            continue
        size = sum(_installed_bytes(package) for package in _required_packages(name) - base)
        lines.append(f"| {backend} | {name} {distribution(name).version} | {size / 1e6:,.0f} |")
    return lines


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _required_packages(name: str) -> set[str]:
    """Return the names of a package and of all installed packages that it requires, without extras."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        package = waiting.pop()
        if package in found or not _is_installed(package):
            continue
        found.add(package)
        for line in distribution(package).requires or ():
            required = Requirement(line)
            if required.marker is None or required.marker.evaluate({"extra": ""}):
                waiting.append(required.name.lower().replace("_", "-"))
    return found


def _installed_bytes(name: str) -> int:
    files = (Path(str(file.locate())) for file in distribution(name).files or ())
    return sum(file.stat().st_size for file in files if file.is_file())


def main(
    checkpoints: list[Path],
    out: Annotated[Path, typer.Option(help="The Markdown file.")],
    data: Annotated[str, typer.Option(help="The images of the parity checks.")] = "auto",
    seconds: Annotated[float, typer.Option(help="How long to measure each artifact.")] = 3.0,
) -> None:
    """Write the tables."""
    here = current_environment()
    versions = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    sections = [
        "# Formats and precisions",
        "\n".join(format_rows()),
        "Written by `python benchmarks/format_table.py CHECKPOINT… --out docs/formats.md`. Each row is one\n"
        "`cifarx export`, checked on the whole test split. The error is that of a logit; the accuracy is that of the\n"
        "artifact, with its difference from the checkpoint in percentage points. The time is that of one image in one\n"
        "thread, over that of the ONNX file in fp32 in ONNX Runtime, measured in turns. The first answer comes from a\n"
        "new process, which imports the runtime and opens the file.\n\n"
        f"{here.cpu}, {here.cpus} CPUs; {versions}.",
        "\n".join(runtime_rows()),
    ]
    for checkpoint in checkpoints:
        sections.append(_section(checkpoint, data, seconds))
        out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
