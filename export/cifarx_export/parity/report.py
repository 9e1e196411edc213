"""The parity report: the full JSON document next to the artifact, and its short form for the command line."""

from pathlib import Path
from typing import Final

import msgspec

from cifarx_export.parity.checks import Check
from cifarx_export.parity.error_analysis import ErrorAnalysis
from cifarx_serve.files.atomic import atomic_path
from cifarx_serve.spec import ParitySummary
from cifarx_serve.system.environment import Environment, current_environment

SUFFIX = ".parity.json"
FAILED_SUFFIX = ".failed.parity.json"

WARNING: Final = "WARNING"
"""The word before what a check that passed does not prove, wherever it is shown."""


class ParityRow(msgspec.Struct, frozen=True):
    """The parity check of one artifact, as `export --json` and `verify --json` print it.

    `assumed` lists the checks that compare only what nobody stated, such as `preprocessing`, and `warnings` what a
    check that passed does not prove.
    """

    artifact: str
    format: str
    precision: str
    passed: bool
    images: int
    batch_sizes: tuple[int, ...]
    max_abs_error: float | None
    mean_abs_error: float | None
    p999_abs_error: float | None
    required_tolerance: float | None
    agreement: float
    forgiven: int
    reference_accuracy: float | None
    accuracy: float | None
    nonfinite: int
    provider: str
    agreement_bound: float | None
    test_images: int | None
    training_images: int
    warnings: tuple[str, ...]
    assumed: tuple[str, ...]


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """The full report of a parity check.

    Attributes:
        schema_version: version of the document.
        artifact: file name of the artifact.
        artifact_sha256: checksum of that file; None if the check failed and the file was not written.
        checkpoint: file name of the reference.
        checkpoint_sha256: checksum of the reference.
        format: export format of the artifact.
        precision: precision whose tolerance was used.
        checks: every check, in order.
        summary: the metrics, as they are stored inside the artifact.
        error_analysis: None if the artifact returned no logits.
        environment: the machine and the library versions.
    """

    schema_version: int = 1
    artifact: str
    artifact_sha256: str | None
    checkpoint: str
    checkpoint_sha256: str
    format: str
    precision: str
    checks: tuple[Check, ...]
    summary: ParitySummary
    error_analysis: ErrorAnalysis | None = msgspec.field(name="evidence")
    environment: Environment = msgspec.field(default_factory=current_environment)

    def row(self) -> ParityRow:
        """Return the short form of the command line."""
        common = {name: getattr(self.summary, name) for name in ParityRow.__struct_fields__[3:-1]}
        return ParityRow(self.artifact, self.format, self.precision, **common, assumed=self.assumed)

    @property
    def assumed(self) -> tuple[str, ...]:
        """The names of the checks that compare only what nobody stated."""
        return tuple(check.name for check in self.checks if check.assumed)

    def write(self, path: Path) -> None:
        """Write the report as indented JSON, atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        document = msgspec.json.format(msgspec.json.encode(self), indent=2)
        with atomic_path(path) as temporary:
            temporary.write_bytes(document + b"\n")


def describe_images(summary: ParitySummary) -> str:
    """Return how many images of which splits a check was run on."""
    if not summary.training_images:
        return f"{summary.images:,} images of {summary.data}"
    return f"{summary.test_images:,} test and {summary.training_images:,} training images of {summary.data}"
