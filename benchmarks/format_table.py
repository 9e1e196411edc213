"""Write docs/formats.md: every format and precision of some checkpoints, each proved and measured.

    python benchmarks/format_table.py lzh_9.pth --data cifar10 --work DIR --out docs/formats.md

The artifacts, their parity reports and their measurements stay in DIR. What is there is neither made nor measured
again, so each checkpoint has a run of its own, with its own data, and so has each environment: formats whose packages
are not installed are left to a run in another one. Let nothing else run meanwhile. CIFARX_TRUST_AOTI=1 is needed to
measure packages of AOTInductor that an earlier run has compiled.

How six networks of the page were trained, where `t20k`, `t10k` and `t5k` have the first 2,000, 1,000 and 500 training
images of each class, all with `--batch-size 64`. Those with `--recipe fast` also had `--set channels_last=true`. The
last three were trained in one thread (OMP_NUM_THREADS=1), twice, with the same accuracy:

    cifarx train --model resnet18 --image-size 32 --data t20k --recipe fast --epochs 3
    cifarx train --model mobilenet_v3_small --image-size 96 --data t20k --recipe fast --epochs 4
    cifarx train --model efficientnet_b0 --image-size 64 --data t20k --recipe fast --epochs 1, then 3 epochs more with
        --weights
    cifarx train --model convnext_tiny --image-size 64 --data t10k --epochs 1 --lr 0.0005 --precision bf16
        --set optimizer=adamw --set schedule=linear --set warmup_fraction=0.1 --set max_grad_norm=1.0
        --set normalize=true --set flip=true
    cifarx train --model vit_b_16 --image-size 64 --data t5k, the rest like convnext_tiny but with --lr 0.0003, then the
        same with t10k and --weights
    cifarx train --model resnet18 --image-size 64 --data t20k --recipe fast --epochs 1 --precision bf16, then the same
        with --image-size 224 --lr 0.02 --data t5k --weights, then again with t10k
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray
from packaging.requirements import Requirement

from cifarx.output.console import note
from cifarx_export.checked_artifact import ExportResult
from cifarx_export.export import export
from cifarx_export.formats.registry import FORMATS, PRECISIONS
from cifarx_export.parity.data import load_parity_data
from cifarx_serve.backends.registry import model_file
from cifarx_serve.benchmarking.benchmark import benchmark
from cifarx_serve.errors import CifarxError, DataError
from cifarx_serve.files.atomic import atomic_path
from cifarx_serve.spec import ParitySummary, Precision
from cifarx_serve.system.environment import current_environment
from cifarx_train.checkpoints.checkpoint import file_sha256, load_checkpoint

HEADINGS: Final = ("format", "precision", "MB", "max abs error", "agreement", "accuracy", "time", "first answer, s", "")

MEASURED_IMAGES: Final = 64
"""Number of images to measure with: all of them are also classified, which takes long on slow runtimes."""

BASELINE: Final[tuple[str, Precision]] = ("onnx", "fp32")
"""The format and precision that every time is relative to."""

MEASURED_FORMATS: Final = tuple(name for name in FORMATS if name != "triton")
"""Triton's directories contain the ONNX file."""

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

INTRODUCTION: Final = """\
Written by `python benchmarks/format_table.py CHECKPOINT --work DIR --out docs/formats.md`, once per network and
environment: [LiteRT](litert.md) and [ExecuTorch](executorch.md) have environments of their own. Each row is one
`cifarx export`. The error is that of a logit; the accuracy is that of the artifact, with its difference from the
checkpoint in percentage points. The time is that of one image in one thread, over that of the ONNX file in fp32 in ONNX
Runtime, measured in turns; what the row of that file itself differs from 1 is noise. The first answer comes from a new
process, which imports the runtime and opens the file. The networks were measured on different CPUs, named with each:
compare times within a network. [Triton](triton.md) directories contain the ONNX file. [Web](web.md) directories contain
their runtime, ONNX Runtime Web, which ran in Node.js.

The networks were trained for a few minutes on the JPEG copy of CIFAR-10, whose images are scaled to the size of the
network. `cifar10-jpeg-1000` is the first 100 test images of each class."""

_NOT_INSTALLED: Final = "is not installed"
"""Part of the error for a package that is missing in this environment."""


class Row(msgspec.Struct):
    """One format and precision of a network.

    Attributes:
        summary: the metrics of its parity check; None if there is no artifact.
        reason: why there is no artifact, or which checks failed.
        megabytes: size of the artifact.
        time: latency of one image in one thread, over that of the baseline, measured in turns.
        first_answer_s: time from the start of a process to its first answer.
    """

    format: str
    precision: Precision
    summary: ParitySummary | None = None
    reason: str = ""
    megabytes: float | None = None
    time: float | None = None
    first_answer_s: float | None = None

    @property
    def passed(self) -> bool:
        return self.summary is not None and self.summary.passed

    def cells(self) -> tuple[str, ...]:
        verdict = "passed" if self.passed else f"refused: {self.reason}"
        if self.summary is None:
            return (self.format, self.precision, *[""] * (len(HEADINGS) - 3), verdict)
        error = self.summary.max_abs_error
        return (
            self.format,
            self.precision,
            _number(self.megabytes, ".1f"),
            _number(error, ".1e"),
            f"{self.summary.agreement:.2%}",
            _accuracy(self.summary),
            _number(self.time, ".2f"),
            _number(self.first_answer_s, ".2f"),
            verdict,
        )


class Network(msgspec.Struct):
    """The rows of a checkpoint.

    Attributes:
        title: name and image size of the network.
        sha256: hash of the checkpoint.
        cpus: the CPUs that the rows were measured on; empty if none was.
    """

    title: str
    sha256: str
    rows: list[Row] = msgspec.field(default_factory=list)
    cpus: str = ""

    def row(self, name: str, precision: str) -> Row | None:
        return next((row for row in self.rows if (row.format, row.precision) == (name, precision)), None)

    def section(self) -> str:
        baseline = self.row(*BASELINE)
        summary = baseline.summary if baseline else None
        images = (
            "" if summary is None else f"{summary.images:,} images of {summary.data}; {self.cpus or 'no times'}.\n\n"
        )
        return f"## {self.title}\n\n{images}" + _table(
            HEADINGS, [row.cells() for row in self._sorted()], texts=(0, 1, 8)
        )

    def _sorted(self) -> list[Row]:
        return sorted(self.rows, key=lambda row: (list(FORMATS).index(row.format), PRECISIONS.index(row.precision)))


class Runtime(msgspec.Struct):
    """The installed size of the packages of a backend that cifarx does not require itself."""

    package: str
    megabytes: float


class Work:
    """A directory with the artifacts of checkpoints, and what is known about them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._runtimes_file = directory / "runtimes.json"

    def prove_and_measure(self, checkpoint: Path, data: str, seconds: float) -> None:
        """Add the rows that are missing, as far as packages are installed."""
        spec = load_checkpoint(checkpoint).spec
        title = f"{spec.model}, {spec.input.height}x{spec.input.width}"
        folder = self._directory / title.replace(", ", "-").replace("/", "_")
        sha256 = file_sha256(checkpoint)
        network = self._read(folder) or Network(title, sha256)
        if network.sha256 != sha256:
            raise typer.BadParameter(f"{folder} has the artifacts of another checkpoint")
        for precision in PRECISIONS:
            for row in _prove(checkpoint, _missing_formats(network, precision), precision, data, folder):
                network.rows.append(row)
                self._write(folder / "rows.json", network)
        if seconds:
            here = current_environment()
            cpus = f"{here.cpu}, {here.cpus} CPUs"
            if network.cpus not in ("", cpus):
                raise typer.BadParameter(f"the rows of {folder} were measured on {network.cpus}, this is {cpus}")
            network.cpus = cpus
            images = load_parity_data(spec, data).images[:MEASURED_IMAGES]
            for row in network.rows:
                if row.passed and row.time is None:
                    _measure(row, checkpoint.stem, folder, images, seconds)
                    self._write(folder / "rows.json", network)

    def networks(self) -> list[Network]:
        """Return all networks in the directory."""
        found = [self._read(folder) for folder in sorted(self._directory.iterdir()) if folder.is_dir()]
        return [network for network in found if network is not None]

    def runtimes(self) -> dict[str, Runtime]:
        """Return the runtimes of this environment and of those before it."""
        known: dict[str, Runtime] = {}
        if self._runtimes_file.is_file():
            known = msgspec.json.decode(self._runtimes_file.read_bytes(), type=dict[str, Runtime])
        known |= installed_runtimes()
        self._write(self._runtimes_file, known)
        return known

    def _read(self, folder: Path) -> Network | None:
        file = folder / "rows.json"
        return msgspec.json.decode(file.read_bytes(), type=Network) if file.is_file() else None

    def _write(self, file: Path, content: Network | dict[str, Runtime]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            temporary.write_bytes(msgspec.json.encode(content))


def _missing_formats(network: Network, precision: Precision) -> list[str]:
    """Return the formats that the network has no row of, as far as their packages are installed."""
    return [
        name
        for name in MEASURED_FORMATS
        if precision in FORMATS[name].precisions
        and network.row(name, precision) is None
        and (FORMATS[name].backend not in PACKAGES or any(map(_is_installed, PACKAGES[FORMATS[name].backend])))
    ]


def _prove(checkpoint: Path, formats: Sequence[str], precision: Precision, data: str, folder: Path) -> Iterator[Row]:
    """Export to formats in one precision. Together, they share the search for int8."""
    if not formats:
        return
    note(f"{folder.name}: {precision} of {', '.join(formats)}")
    try:
        results = export(checkpoint, formats, [precision], data=data, out=folder)
    except DataError:
        raise
    except CifarxError as error:
        if len(formats) > 1:
            for name in formats:
                yield from _prove(checkpoint, [name], precision, data, folder)
        elif _NOT_INSTALLED not in error.problem:
            yield Row(formats[0], precision, reason=error.problem)
        return
    yield from (_proved(result, precision) for result in results)


def _proved(result: ExportResult, precision: Precision) -> Row:
    report = result.report
    failed = "; ".join(f"{check.name}: {check.found}" for check in report.checks if not check.passed)
    megabytes = _megabytes(result.path) if report.summary.passed else None
    return Row(report.format, precision, report.summary, failed, megabytes)


def _measure(row: Row, stem: str, folder: Path, images: NDArray[np.uint8], seconds: float) -> None:
    """Measure a row in turns with the baseline, if its runtime is installed."""
    note(f"measuring {folder.name} {row.format} {row.precision}")
    files = [
        model_file(folder / FORMATS[name].file_name(stem, precision))
        for name, precision in (BASELINE, (row.format, row.precision))
    ]
    try:
        report = benchmark(files, images, "", (1,), "cpu", seconds, single_threaded=True)
    except CifarxError as error:
        note(f"not measured: {error}")
        return
    baseline, own = report.rows
    row.time = own.p50_us / baseline.p50_us
    row.first_answer_s = (own.load_ms + own.first_call_ms) / 1000


def _megabytes(path: Path) -> float:
    """Return the size of a file, or of all files in a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _accuracy(summary: ParitySummary) -> str:
    if summary.accuracy is None or summary.reference_accuracy is None:
        return ""
    return f"{summary.accuracy:.2%} ({(summary.accuracy - summary.reference_accuracy) * 100:+.2f})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int]) -> str:
    """Return a table in Markdown. The columns with these numbers are aligned to the left."""
    marks = ["---" if column in texts else "---:" for column in range(len(headings))]
    lines = [list(headings), marks, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_table() -> str:
    """Return the registry of formats as Markdown."""
    rows = []
    for name, kind in FORMATS.items():
        options = ", ".join(f"`--{option.replace('_', '-')}`" for option in kind.options)
        file = f"`NAME{kind.suffix}{'/' if kind.directory_suffix else ''}`"
        rows.append((name, file, ", ".join(kind.precisions), ", ".join(kind.devices), options, kind.backend))
    return _table(("format", "file", "precisions", "devices", "options", "runs on"), rows, texts=range(6))


def time_table(networks: Sequence[Network]) -> str:
    """Return the relative time of every format and precision of every network as Markdown."""
    rows = [
        (f"{name} {precision}", *(_time(network.row(name, precision)) for network in networks))
        for name in MEASURED_FORMATS
        for precision in FORMATS[name].precisions
    ]
    return _table(("", *(network.title for network in networks)), rows, texts=(0,))


def _time(row: Row | None) -> str:
    if row is None:
        return "not made"
    return _number(row.time, ".2f") or "not measured" if row.passed else "refused"


def runtime_table(runtimes: Mapping[str, Runtime]) -> str:
    """Return the installed size of each runtime as Markdown."""
    rows = [
        (backend, known.package, f"{known.megabytes:,.0f}") if known else (backend, packages[0], "not measured")
        for backend, packages in PACKAGES.items()
        for known in (runtimes.get(backend),)
    ]
    return _table(("runs on", "package", "MB installed"), rows, texts=(0, 1))


def installed_runtimes() -> dict[str, Runtime]:
    """Return the runtimes that are installed in this environment, by the name of the backend."""
    base = _required_packages("cifarx") - set(PACKAGES["onnxruntime"])
    found = {}
    for backend, packages in PACKAGES.items():
        name = next((name for name in packages if _is_installed(name)), None)
        if name is not None:
            size = sum(_installed_bytes(package) for package in _required_packages(name) - base)
            found[backend] = Runtime(f"{name} {distribution(name).version}", size / 1e6)
    return found


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


def write_page(work: Work, out: Path) -> None:
    """Write the page."""
    here = current_environment()
    versions = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    networks = work.networks()
    sections = [
        "# Formats and precisions",
        format_table(),
        INTRODUCTION,
        f"{versions}.",
        "## Runtimes\n\n" + runtime_table(work.runtimes()),
        "## Time\n\n" + time_table(networks),
        *(network.section() for network in networks),
    ]
    out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def main(
    checkpoint: Path,
    work: Annotated[Path, typer.Option(help="Directory for the artifacts and the measurements.")],
    out: Annotated[Path, typer.Option(help="The Markdown file.")],
    data: Annotated[str, typer.Option(help="The images of the parity checks.")] = "auto",
    seconds: Annotated[float, typer.Option(help="How long to measure each artifact; 0 to measure later.")] = 3.0,
) -> None:
    """Prove and measure every format and precision of a checkpoint, and write the page with all in the directory."""
    directory = Work(work)
    directory.prove_and_measure(checkpoint, data, seconds)
    write_page(directory, out)


if __name__ == "__main__":
    typer.run(main)
