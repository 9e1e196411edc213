"""The proof as a document: beside the artifact in full, and on the command line in one row."""

from pathlib import Path

import msgspec

from cifarx_export.parity.checks import Check
from cifarx_export.parity.error_analysis import ErrorAnalysis
from cifarx_serve.files.atomic import atomic_path
from cifarx_serve.spec import ParitySummary
from cifarx_serve.system.environment import Environment, environment

SUFFIX = ".parity.json"
FAILED_SUFFIX = ".failed.parity.json"


class ParityRow(msgspec.Struct, frozen=True):
    """One artifact's proof, as `export --json` and `verify --json` print it."""

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


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of a proof. `artifact_sha256` is of the file as named, or None where it never was."""

    schema_version: int = 1
    artifact: str
    artifact_sha256: str | None
    checkpoint: str
    checkpoint_sha256: str
    format: str
    precision: str
    checks: tuple[Check, ...]
    summary: ParitySummary
    evidence: ErrorAnalysis | None
    environment: Environment = msgspec.field(default_factory=environment)

    def row(self) -> ParityRow:
        """The command line's short form."""
        common = {name: getattr(self.summary, name) for name in ParityRow.__struct_fields__[3:]}
        return ParityRow(self.artifact, self.format, self.precision, **common)

    def write(self, path: Path) -> None:
        """Write it as indented JSON, whole or not at all."""
        document = msgspec.json.format(msgspec.json.encode(self), indent=2)
        with atomic_path(path) as temporary:
            temporary.write_bytes(document + b"\n")
