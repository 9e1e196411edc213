"""Write the table of docs/formats.md: every format and precision of some checkpoints.

    python benchmarks/format_table.py lzh_9.pth resnet18_4.pth --out docs/formats.md

Each artifact is exported, and checked as by `cifarx export`; a row holds the results, or the reason for a refusal.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from cifarx.output.console import note
from cifarx_export.checked_artifact import ExportResult
from cifarx_export.export import export
from cifarx_export.formats.registry import FORMATS, PRECISIONS
from cifarx_serve.backends.registry import model_file
from cifarx_serve.errors import CifarxError
from cifarx_serve.spec import ParitySummary
from cifarx_serve.system.environment import current_environment
from cifarx_train.checkpoints.checkpoint import load_checkpoint

HEADINGS = ("format", "precision", "MB", "max abs error", "agreement", "accuracy", "")


class Row(NamedTuple):
    """One artifact, or the reason why there is none."""

    format: str
    precision: str
    made: ExportResult | None
    refusal: str
    megabytes: float

    def cells(self) -> tuple[str, ...]:
        if self.made is None:
            return (self.format, self.precision, "", "", "", "", f"refused: {self.refusal}")
        summary = self.made.report.summary
        failed = ", ".join(f"{check.name} {check.found}" for check in self.made.report.checks if not check.passed)
        return (
            self.format,
            self.precision,
            f"{self.megabytes:.1f}" if summary.passed else "",
            "" if summary.max_abs_error is None else f"{summary.max_abs_error:.1e}",
            f"{summary.agreement:.2%}",
            _accuracy(summary),
            "passed" if summary.passed else f"refused: {failed}",
        )


def _accuracy(summary: ParitySummary) -> str:
    if summary.accuracy is None or summary.reference_accuracy is None:
        return ""
    return f"{summary.accuracy:.2%} ({(summary.accuracy - summary.reference_accuracy) * 100:+.2f})"


def _rows(checkpoint: Path, data: str, folder: Path) -> Iterator[Row]:
    for name in FORMATS:
        for precision in PRECISIONS:
            note(f"{checkpoint.name}: {name} {precision}")
            try:
                (made,) = export(checkpoint, [name], [precision], data=data, out=folder)
            except CifarxError as error:
                yield Row(name, precision, None, error.problem, 0.0)
                continue
            model = model_file(made.path) if made.report.summary.passed else None
            yield Row(name, precision, made, "", model.stat().st_size / 1e6 if model else 0.0)


def _section(checkpoint: Path, data: str) -> str:
    spec = load_checkpoint(checkpoint).spec
    taken, training = spec.input, spec.training
    trained = f"{training.accuracy_text} on {training.data.name}" if training else "no training record"
    with tempfile.TemporaryDirectory() as folder:
        rows = [row.cells() for row in _rows(checkpoint, data, Path(folder))]
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- | --- |" + " ---: |" * 4 + " --- |"]
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


def main(
    checkpoints: list[Path],
    out: Annotated[Path, typer.Option(help="The Markdown file.")],
    data: Annotated[str, typer.Option(help="The images of the parity checks.")] = "auto",
) -> None:
    """Write the table."""
    here = current_environment()
    versions = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    sections = [
        "# Formats and precisions",
        "\n".join(format_rows()),
        "Written by `python benchmarks/format_table.py CHECKPOINT… --out docs/formats.md`. Each row is one\n"
        "`cifarx export`, checked on the whole test split. The error is that of a logit; the accuracy is that of the\n"
        "artifact, with its difference from the checkpoint in percentage points.\n\n"
        f"{here.cpu}, {here.cpus} CPUs; {versions}.",
    ]
    for checkpoint in checkpoints:
        sections.append(_section(checkpoint, data))
        out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
