"""Verify: whether a file answers as a checkpoint or another file does, at any time, on any data."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats.registry import FORMATS, PRECISIONS
from cifarx_export.layerwise.locate import locate as locate_layer
from cifarx_export.layerwise.locate import require_locatable
from cifarx_export.parity.checks import Check
from cifarx_export.parity.compare import ParityData, Proof, Reference, check_parity, proved_batch_sizes, run_reference
from cifarx_export.parity.data import parity_data
from cifarx_export.parity.external_spec import read_given_spec, with_spec
from cifarx_export.parity.html import require_page, write_parity_page
from cifarx_export.parity.report import ParityReport
from cifarx_export.parity.tolerances import gate
from cifarx_serve.backends.base import Backend, require_file
from cifarx_serve.backends.registry import backend_for, model_file, open_backend
from cifarx_serve.devices import parse_device
from cifarx_serve.errors import CifarxError, DataError, ModelFileError, UsageError
from cifarx_serve.progress import Progress, silent
from cifarx_train.checkpoints.checkpoint import file_sha256, load_checkpoint, weights_sha256
from cifarx_train.data.dataset import Broken
from cifarx_train.pytorch_backend import PyTorchBackend


def verify(
    artifact: str | Path,
    reference: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    model: str | None = None,
    data: str = "auto",
    broken: Broken = "refuse",
    device: str = "cpu",
    batch: int | None = None,
    spec: str | Path | None = None,
    locate: bool = False,
    page: str | Path | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare a file with another, or with a checkpoint. The report says whether it holds; its gate is that of the
    lower precision of the two.

    Args:
        artifact: a file that a backend opens.
        reference: another, to agree with; or
        checkpoint: a `.pth` file, of any name.
        model: the network's name, for a checkpoint that does not say it itself.
        data: the images: auto, cifar10, builtin, or the path of a folder or `.tar.gz`.
        broken: refuse a data set with broken images, or skip them.
        device: where the artifact runs; the reference runs on the CPU.
        batch: the largest batch size to compare, beside 1, 3 and 64.
        spec: a model spec as JSON, for files that carry none.
        locate: name the first layer that differs, where one does.
        page: write the report there as a page, `.html`.
        atol, rtol: in place of the gate's own.
        progress: told what is being done.

    Raises:
        UsageError, ModelFileError, SpecError, DataError, OutputError: one of the inputs cannot be used.
    """
    if (reference is None) == (checkpoint is None):
        raise UsageError("one file is compared with one other", "give either a second file or --ckpt")
    require_page(page)
    with ExitStack() as stack:
        sides = _Sides(Path(artifact), Path(reference or checkpoint or ""), checkpoint is not None, model)
        if locate:
            require_locatable(*map(model_file, sides[:2]))
        opened = _open(sides, device, spec, stack)
        limits = gate(opened.precision, atol, rtol)
        images = parity_data(opened.reference.spec, data, broken)
        batch_sizes = proved_batch_sizes(batch, len(images.images))
        asked = _ask(opened, sides.reference, images, progress)
        proof = _with_weights(check_parity(asked, opened.artifact, limits, progress, batch_sizes), opened)
        if locate and not proof.passed and proof.evidence:
            progress("looking for the first layer that differs")
            worst = images.images[proof.evidence.worst[0].image][None]
            proof = msgspec.structs.replace(proof, checks=(*proof.checks, _layer_check(opened, worst, model)))
        report = _report(sides, opened, proof)
        if page is not None:
            write_parity_page(Path(page), [report], images.images)
        return report


class _Sides(NamedTuple):
    """The files as the user names them."""

    artifact: Path
    reference: Path
    is_checkpoint: bool
    model: str | None


class _Opened(NamedTuple):
    """The files made ready to run.

    Attributes:
        artifact, reference: the backends.
        files: what they opened: a copy where a spec had to be put inside.
        weights: sha256 of the weights of a reference that is a checkpoint.
    """

    artifact: Backend
    reference: Backend
    files: tuple[Path, Path]
    weights: str | None

    @property
    def precision(self) -> str:
        """The lower of the two; what a checkpoint says is not what it runs in."""
        specs = [side.spec for side in (self.artifact, self.reference) if not isinstance(side, PyTorchBackend)]
        return max((spec.precision for spec in specs), key=PRECISIONS.index, default=PRECISIONS[0])


def _open(sides: _Sides, device: str, spec: str | Path | None, stack: ExitStack) -> _Opened:
    """Open both, each with the spec where it carries none.

    Raises:
        UsageError: both carry one, so that the spec would say nothing.
    """
    files = (model_file(sides.artifact), model_file(sides.reference))
    if spec is not None:
        given = read_given_spec(Path(spec))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        copies = [with_spec(path, given, folder / str(number)) for number, path in enumerate(files)]
        if copies == list(files):
            raise UsageError(f"both files carry a spec of their own, and {spec} says nothing", "leave --spec out")
        files = (copies[0], copies[1])
    artifact = stack.enter_context(_open_one(files[0], sides.artifact, device, sides.model))
    if not sides.is_checkpoint and backend_for(files[1]) is not PyTorchBackend:
        reference = stack.enter_context(_open_one(files[1], sides.reference, "cpu", None))
        return _Opened(artifact, reference, files, None)
    loaded = load_checkpoint(files[1], sides.model)
    trained = stack.enter_context(PyTorchBackend.of(loaded, parse_device("cpu")))
    return _Opened(artifact, trained, files, weights_sha256(loaded.model))


def _open_one(path: Path, named: Path, device: str, model: str | None) -> Backend:
    require_file(path)
    try:
        if backend_for(path) is PyTorchBackend:
            return PyTorchBackend(path, parse_device(device), model)
        return open_backend(path, device=device)
    except ModelFileError as error:  # of a copy, where a spec had to be put inside
        raise ModelFileError(error.problem.replace(str(path), str(named)), error.remedy) from error


def _ask(opened: _Opened, path: Path, images: ParityData, progress: Progress) -> Reference:
    """The reference's answers; nothing can be compared with a file that does not give logits.

    Raises:
        ModelFileError: it does not run at these batch sizes, or gives something else.
    """
    backend = opened.reference
    try:
        asked = run_reference(backend, images, progress)
    except DataError:
        raise
    except Exception as error:  # a runtime's own errors have no common base
        reason = str(error).strip().partition("\n")[0].replace(str(opened.files[1]), str(path))
        raise ModelFileError(
            f"the reference {path} does not run ({reason})", "give one that takes a batch of any size"
        ) from error
    classes = len(backend.spec.class_names)
    if asked.logits.shape != (len(images.images), classes) or asked.logits.dtype != np.float32:
        raise ModelFileError(
            f"the reference {path} gives {asked.logits.dtype} {asked.logits.shape} for {len(images.images)} images "
            f"of {classes} classes",
            "give a classifier with float32 logits, and a spec with its class names",
        )
    return asked


def _with_weights(proof: Proof, opened: _Opened) -> Proof:
    """The proof and whether the artifact was made from the checkpoint's weights, where both are known."""
    recorded = opened.artifact.spec.weights_sha256
    if recorded is None or opened.weights is None:
        return proof
    same = recorded == opened.weights
    check = Check("weights", same, "recorded as the checkpoint's" if same else "made from other weights")
    summary = msgspec.structs.replace(proof.summary, passed=proof.passed and same)
    return msgspec.structs.replace(proof, checks=(check, *proof.checks), summary=summary)


def _layer_check(opened: _Opened, images: NDArray[np.uint8], model: str | None) -> Check:
    try:
        found = locate_layer(*opened.files, images, model)
    except CifarxError as error:
        return Check("layer", False, str(error))
    if found is None:
        return Check("layer", True, "no layer differs: look at the checks above, and at the runtime's optimizations")
    return Check("layer", False, str(found))


def _report(sides: _Sides, opened: _Opened, proof: Proof) -> ParityReport:
    return ParityReport(
        artifact=sides.artifact.name,
        artifact_sha256=file_sha256(model_file(sides.artifact)),
        checkpoint=sides.reference.name,
        checkpoint_sha256=file_sha256(model_file(sides.reference)),
        format=_format_name(sides.artifact),
        precision=opened.precision,
        checks=proof.checks,
        summary=proof.summary,
        evidence=proof.evidence,
    )


def _format_name(path: Path) -> str:
    """The format that has this suffix; a file of another package's backend has none of ours."""
    return next((name for name, kind in FORMATS.items() if path.name.endswith(kind.suffix)), path.suffix)
