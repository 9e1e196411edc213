"""Verify: the proof of an artifact again, at any time, on any data."""

from pathlib import Path

from cifarx_export.formats import FORMATS
from cifarx_export.gates import gate
from cifarx_export.parity_report import ParityReport
from cifarx_export.proof import ask_reference, prove
from cifarx_export.proof_data import proof_data
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.devices import Device
from cifarx_serve.progress import Progress, silent
from cifarx_train.checkpoint import file_sha256
from cifarx_train.data.dataset import Broken
from cifarx_train.pytorch_backend import PyTorchBackend


def verify(
    artifact: str | Path,
    checkpoint: str | Path,
    *,
    model: str | None = None,
    data: str = "auto",
    broken: Broken = "refuse",
    atol: float | None = None,
    rtol: float | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an artifact with a checkpoint; nothing is written. The report says whether it holds.

    Args:
        artifact: a file that `cifarx export` made, or any that a backend opens.
        checkpoint: the `.pth` file to agree with.
        model: the network's name, for a checkpoint that does not say it itself.
        broken: refuse a data set with broken images, or skip them.
        data: the images: auto, cifar10, builtin, or the path of a folder or `.tar.gz`.
        atol, rtol: in place of the gate's own.
        progress: told what is being done.

    Raises:
        UsageError, ModelFileError, DataError: one of the inputs cannot be used.
    """
    path, source = Path(artifact), Path(checkpoint)
    with open_backend(path, device="cpu") as backend, PyTorchBackend(source, Device("cpu"), model) as trained:
        limits = gate(backend.spec.precision, atol, rtol)
        reference = ask_reference(trained, proof_data(trained.spec, data, broken), progress)
        proof = prove(reference, backend, limits, progress)
        return ParityReport(
            artifact=path.name,
            artifact_sha256=file_sha256(path),
            checkpoint=source.name,
            checkpoint_sha256=file_sha256(source),
            format=_format_name(path),
            precision=backend.spec.precision,
            checks=proof.checks,
            summary=proof.summary,
            worst=proof.worst,
        )


def _format_name(path: Path) -> str:
    """The format that has this suffix; a file of another package's backend has none of ours."""
    return next((name for name, kind in FORMATS.items() if path.name.endswith(kind.suffix)), path.suffix)
