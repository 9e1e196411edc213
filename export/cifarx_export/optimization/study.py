"""The study of a search: a directory with the artifacts of its candidates, and one document about them.

The document is written again after each step, so that a search that was killed goes on where it was.
"""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

from cifarx_export.formats.registry import FORMATS
from cifarx_export.optimization.candidates import Candidate
from cifarx_export.optimization.results import CandidateResult
from cifarx_export.parity.report import SUFFIX as REPORT_SUFFIX
from cifarx_serve.backends.registry import model_file
from cifarx_serve.errors import ModelFileError, error_message
from cifarx_serve.files.atomic import atomic_path, remove_partial_files
from cifarx_serve.progress import Progress
from cifarx_train.checkpoints.checkpoint import file_sha256

SUFFIX: Final = ".optimize"
"""Suffix of the directory, which lies beside the checkpoint."""

DOCUMENT: Final = "study.json"
REPORT: Final = "report.html"
FINE_TUNED: Final = "fine_tuned.pth"
"""The weights that were fine-tuned for int8."""

_PRUNED: Final = "pruned*.pth"
"""The weights of pruned networks, one file for each share of the channels."""

_TRUSTED_ONCE: Final = "aotinductor"
"""The format whose files are machine code, see `cifarx_serve.backends.torch.aot_inductor`."""

_LARGEST_BYTES: Final = 2**26


class StudyIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What the results of a study depend on.

    Attributes:
        checkpoint: hash of the file of the network.
        spec: hash of its spec, with all that the user states.
        data: fingerprint of the images of the parity checks.
        cpu, threads: the machine, and the number of its CPUs that may be used.
        version: the version of cifarx.
    """

    checkpoint: str
    spec: str
    data: str
    cpu: str
    threads: int
    version: str

    def difference(self, other: "StudyIdentity") -> str | None:
        """Return what is different in another study, in words, or None."""
        for name, what in (
            ("checkpoint", "another checkpoint"),
            ("spec", "other statements about the network"),
            ("data", "other images"),
        ):
            if getattr(self, name) != getattr(other, name):
                return what
        if (self.cpu, self.threads) != (other.cpu, other.threads):
            return f"another machine ({other.cpu}, {other.threads} threads)"
        return None if self.version == other.version else f"another version of cifarx ({other.version})"


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int = 1
    identity: StudyIdentity
    results: tuple[CandidateResult, ...] = ()


class Study:
    """The results of a search that are kept. Only one process may use it, see `lock_directory`.

    An earlier study in the directory goes on if it has the same identity and its files are intact. Otherwise its files
    are removed, and a line of progress says why.

    Args:
        directory: its directory, which must exist.
        identity: what the results depend on.
        progress: called with a line of text.
    """

    def __init__(self, directory: Path, identity: StudyIdentity, progress: Progress) -> None:
        self.directory = directory
        self._identity = identity
        self._results: dict[Candidate, CandidateResult] = {}
        _remove_leftovers(directory)
        earlier = self._read(progress)
        if earlier is None:
            _remove_weights(directory)  # nothing says what they were made from
            return
        difference = identity.difference(earlier.identity)
        if difference is not None:
            progress(f"note: {directory} is a study with {difference}: starting anew")
            self._remove_files(earlier)
            return
        for result in earlier.results:
            problem = self._problem(result)
            if problem is None:
                self._results[result.candidate] = result
            else:
                progress(f"note: {result.name} is tried again: {problem}")
        if self._results:
            progress(f"going on with {directory}: {len(self._results)} candidates are there")

    def get(self, candidate: Candidate) -> CandidateResult | None:
        """Return what was found about a candidate before, or None."""
        return self._results.get(candidate)

    def record(self, result: CandidateResult) -> None:
        """Keep a result, in place of an earlier one of the same candidate.

        Raises:
            OutputError: the document cannot be written.
        """
        self._results[result.candidate] = result
        document = _Document(identity=self._identity, results=tuple(self._results.values()))
        with atomic_path(self.directory / DOCUMENT) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")

    def path(self, result: CandidateResult) -> Path:
        """Return the artifact of a proved candidate."""
        assert result.file is not None, "the candidate was proved"
        return self.directory / result.file

    def weights_file(self, candidate: Candidate) -> Path | None:
        """Return the file of the fine-tuned weights that a candidate is made from, or None if it has none."""
        if candidate.pruned:
            return self.directory / _PRUNED.replace("*", f"{100 * candidate.pruned:g}")
        return self.directory / FINE_TUNED if candidate.fine_tuned else None

    def _read(self, progress: Progress) -> _Document | None:
        path = self.directory / DOCUMENT
        try:
            if path.stat().st_size > _LARGEST_BYTES:
                raise ModelFileError(f"{path} is too large for a study", "remove it")
            return msgspec.json.decode(path.read_bytes(), type=_Document)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            progress(f"note: {path} is not a study ({error_message(error)}): starting anew")
            return None

    def _problem(self, result: CandidateResult) -> str | None:
        """Return why an earlier result does not hold any more, or None."""
        if result.format == _TRUSTED_ONCE and result.outcome == "proved" and not result.is_measured:
            return "only the run that compiled its code may open it"
        for name, before in result.versions.items():
            now = installed_version(name)
            if now != before:
                return f"it was made with {name} {before}, and {now or 'none'} is installed"
        weights = self.weights_file(result.candidate)
        if weights is not None and result.weights_sha256 and (problem := _damage(weights, result.weights_sha256)):
            return problem
        return None if result.file is None else _damage(model_file(self.path(result)), result.sha256)

    def _remove_files(self, earlier: _Document) -> None:
        """Remove the files of an earlier study, as far as they are files beside its document."""
        names = [result.file for result in earlier.results if result.file and Path(result.file).name == result.file]
        for name in [DOCUMENT, REPORT, *names, *(f"{name}{REPORT_SUFFIX}" for name in names)]:
            with suppress(OSError):  # such as a directory
                (self.directory / name).unlink()
        _remove_weights(self.directory)


def _damage(path: Path, sha256: str | None) -> str | None:
    """Return what has happened to a file since its hash was computed, or None."""
    try:
        return None if file_sha256(path) == sha256 else f"{path.name} has changed"
    except OSError:
        return f"{path.name} is missing"


def _remove_weights(directory: Path) -> None:
    for path in [directory / FINE_TUNED, *directory.glob(_PRUNED)]:
        with suppress(OSError):
            path.unlink()


def _remove_leftovers(directory: Path) -> None:
    suffixes = {Path(f"x{row.suffix}").suffix for row in FORMATS.values() if row.directory_suffix is None}
    for suffix in (*suffixes, ".json", ".html", ".pth"):
        remove_partial_files(directory, suffix)


def installed_version(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(name)
    except (PackageNotFoundError, ValueError):  # a fact of a spec may have any name
        return None
