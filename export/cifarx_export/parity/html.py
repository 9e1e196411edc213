"""Write parity reports as one self-contained HTML page: no scripts, and nothing loaded from other files."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_export.html_report import render_page
from cifarx_export.parity.error_analysis import ClassAgreement, Disagreement, ErrorAnalysis, WorstImage
from cifarx_export.parity.histogram import HistogramLayout, layout_histogram
from cifarx_export.parity.report import WARNING, ParityReport, describe_images
from cifarx_export.parity.spec_checks import ASSUMED
from cifarx_export.parity.tolerances import Tolerance, get_tolerance
from cifarx_serve.errors import UsageError
from cifarx_serve.files.atomic import atomic_path, require_writable
from cifarx_serve.spec import ParitySummary
from cifarx_train.binomial import CONFIDENCE, floor_percent

SUFFIX: Final = ".html"

_TEMPLATE: Final = "parity_report.html"

_MATRIX_CLASSES: Final = 12
"""Maximum number of classes for a matrix of disagreements; with more classes the most frequent ones are listed."""

_MAX_ROWS: Final = 15
"""Maximum number of rows of a list whose length depends on the number of classes."""

_THUMBNAIL_PIXELS: Final = 160
"""Small images are enlarged by an integer factor to about this size; larger ones are reduced to at most twice this."""


Images: TypeAlias = NDArray[np.uint8] | Mapping[int, NDArray[np.uint8]]
"""The images of a parity check, (N, height, width, channels), or the worst ones by their position."""


class MetricRow(NamedTuple):
    """A row of the table of metrics; `tolerance` is empty if the metric has none."""

    name: str
    value: str
    tolerance: str = ""


class ClassRow(NamedTuple):
    """The agreement for one class.

    Attributes:
        name: name of the class.
        images: number of images that the reference predicts as this class.
        agreement: share of them that the artifact predicts as the same class.
        flips: number of the others.
        bar: share of flips, relative to the class with the largest share.
    """

    name: str
    images: int
    agreement: float
    flips: int
    bar: float


class DisagreementMatrix(NamedTuple):
    """The number of images for each reference class (row) and artifact class (column), over the classes that occur."""

    names: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    max_count: int


class LogitRow(NamedTuple):
    """The logits of one class; None if a logit is not finite. The flags mark the predicted class of each side."""

    name: str
    reference: float | None
    artifact: float | None
    reference_prediction: bool
    artifact_prediction: bool


class Thumbnail(NamedTuple):
    """One of the worst images; `source` is its data URI."""

    source: str
    image: int
    label: str | None
    flipped: bool
    logits: tuple[LogitRow, ...]
    error: float | None


class Section(NamedTuple):
    """The section of one artifact; the parts of the error analysis are empty if the artifact returned no logits."""

    anchor: str
    report: ParityReport
    metrics: tuple[MetricRow, ...]
    histogram: HistogramLayout | None
    classes: tuple[ClassRow, ...]
    matrix: DisagreementMatrix | None
    pairs: tuple[tuple[str, str, int], ...]
    worst: tuple[Thumbnail, ...]


def require_html_path(path: str | Path | None) -> None:
    """Check that a report can be written to this path, before any long computation; None means no report.

    Raises:
        UsageError: the name does not end in `.html`.
        OutputError: the folder cannot be written.
    """
    if path is None:
        return
    if not str(path).endswith(SUFFIX):
        raise UsageError(f"cannot write a report as {path}", f"give a name that ends in {SUFFIX}")
    require_writable(Path(path).parent)


def write_html_report(path: Path, reports: Sequence[ParityReport], images: NDArray[np.uint8]) -> None:
    """Write an HTML page with a section for each report, atomically.

    Args:
        path: path of the page.
        reports: reports of artifacts, at least one, in the order of their sections.
        images: the images of the parity check, uint8 (N, height, width, channels).

    Raises:
        OutputError: the page cannot be written.
    """
    text = render_html_report(reports, images)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render_html_report(reports: Sequence[ParityReport], images: Images) -> str:
    """Return the page as text; for the arguments see `write_html_report`."""
    sections = [_section(f"artifact-{number}", report, images) for number, report in enumerate(reports, 1)]
    filters: dict[str, Callable[..., str]] = {"scientific": _scientific, "images": describe_images}
    words = {"assumed": ASSUMED, "warning": WARNING}
    return render_page("cifarx_export.parity", _TEMPLATE, filters, sections=sections, words=words)


def _section(anchor: str, report: ParityReport, images: Images) -> Section:
    summary, analysis = report.summary, report.error_analysis
    metrics = _metric_rows(summary, get_tolerance(report.precision, summary.atol, summary.rtol))
    if analysis is None:
        return Section(anchor, report, metrics, None, (), None, (), ())
    few = len(analysis.class_names) <= _MATRIX_CLASSES
    return Section(
        anchor,
        report,
        metrics,
        layout_histogram(analysis.histogram, summary.atol),
        _class_rows(analysis.class_names, analysis.by_class),
        _matrix(analysis.class_names, analysis.disagreements) if few and analysis.disagreements else None,
        () if few else _pairs(analysis.class_names, analysis.disagreements),
        tuple(_thumbnail(worst, analysis, images[worst.image]) for worst in analysis.worst),
    )


def _metric_rows(summary: ParitySummary, tolerance: Tolerance) -> tuple[MetricRow, ...]:
    bound = f"≤ {tolerance.atol or 0:g} + {tolerance.rtol or 0:g}·|ref|" if tolerance.bounds_logits else ""
    rows = [
        MetricRow("Max error", _scientific(summary.max_abs_error), bound),
        MetricRow("Mean error", _scientific(summary.mean_abs_error)),
        MetricRow("99.9th percentile", _scientific(summary.p999_abs_error)),
        MetricRow("Required tolerance", _scientific(summary.required_tolerance)),
        MetricRow("NaN or Inf", f"{summary.nonfinite:,}", "0"),
        MetricRow("Agreement", f"{summary.agreement:.4%}", f"≥ {tolerance.agreement * 100:g}%"),
        *_bound_rows(summary),
        MetricRow("Forgiven flips", f"{summary.forgiven:,}"),
    ]
    before, after = summary.reference_accuracy, summary.accuracy
    if before is not None and after is not None:
        tested = f" of {summary.test_images:,} test images" if summary.training_images else ""
        drop = "" if tolerance.accuracy_drop is None else f"≥ {-tolerance.accuracy_drop * 100:+.2f}"
        rows += [
            MetricRow(f"Accuracy{tested}, reference", f"{before:.2%}"),
            MetricRow(f"Accuracy{tested}, artifact", f"{after:.2%}"),
            MetricRow("Difference in points", f"{(after - before) * 100:+.2f}", drop),
        ]
    return tuple(rows)


def _bound_rows(summary: ParitySummary) -> list[MetricRow]:
    if summary.agreement_bound is None:
        return []
    return [MetricRow(f"{CONFIDENCE:.0%} bound, one-sided", f"≥ {floor_percent(summary.agreement_bound)}")]


def _class_rows(names: Sequence[str], by_class: Sequence[ClassAgreement]) -> tuple[ClassRow, ...]:
    """Return all classes in label order, or the classes with the lowest agreement if there are many."""
    shares = [1 - row.agreeing / row.images if row.images else 0.0 for row in by_class]
    largest = max(shares) or 1.0
    rows = [
        ClassRow(name, row.images, 1 - share, row.images - row.agreeing, share / largest)
        for name, row, share in zip(names, by_class, shares, strict=True)
    ]
    if len(rows) > _MATRIX_CLASSES:
        rows = sorted(rows, key=lambda row: row.agreement)[:_MAX_ROWS]
    return tuple(rows)


def _matrix(names: Sequence[str], disagreements: Sequence[Disagreement]) -> DisagreementMatrix:
    counts = {(one.reference, one.artifact): one.count for one in disagreements}
    occurring = sorted({index for pair in counts for index in pair})
    return DisagreementMatrix(
        tuple(names[index] for index in occurring),
        tuple(tuple(counts.get((row, column), 0) for column in occurring) for row in occurring),
        max(counts.values()),
    )


def _pairs(names: Sequence[str], disagreements: Sequence[Disagreement]) -> tuple[tuple[str, str, int], ...]:
    return tuple((names[one.reference], names[one.artifact], one.count) for one in disagreements[:_MAX_ROWS])


def _thumbnail(worst: WorstImage, analysis: ErrorAnalysis, pixels: NDArray[np.uint8]) -> Thumbnail:
    names = analysis.class_names
    return Thumbnail(
        _png_data_uri(pixels),
        worst.image,
        None if worst.label is None else names[worst.label],
        worst.flipped,
        _logit_rows(worst, names),
        worst.error,
    )


def _logit_rows(worst: WorstImage, names: Sequence[str]) -> tuple[LogitRow, ...]:
    """Return the predicted classes of both sides, or, if they agree, that class and another one.

    The other one is the reference's second choice, or the label with the largest error if the sets of labels differ.
    One logit of two classes is that of the second class.
    """
    if len(worst.reference) == 1:
        return (LogitRow(names[1], worst.reference[0], worst.artifact[0], False, False),)
    shown = list(dict.fromkeys([worst.reference_prediction, worst.artifact_prediction]))
    if len(shown) == 1:
        others = [index for index in range(len(names)) if index not in shown]
        shown.append(max(others, key=lambda index: _error(worst, index) if worst.flipped else _logit(worst, index)))
    return tuple(
        LogitRow(
            names[index],
            worst.reference[index],
            worst.artifact[index],
            index == worst.reference_prediction,
            index == worst.artifact_prediction,
        )
        for index in shown
    )


def _logit(worst: WorstImage, index: int) -> float:
    """Return the reference's logit of a class, or minus infinity if it is not finite."""
    logit = worst.reference[index]
    return float("-inf") if logit is None else logit


def _error(worst: WorstImage, index: int) -> float:
    """Return the error of the logit of a class, or infinity if it is not finite."""
    reference, artifact = worst.reference[index], worst.artifact[index]
    return float("inf") if reference is None or artifact is None else abs(artifact - reference)


def _png_data_uri(pixels: NDArray[np.uint8]) -> str:
    """Return an image, uint8 (height, width, channels), as a PNG data URI at the size of a thumbnail."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    longest = max(picture.size)
    if longest > 2 * _THUMBNAIL_PIXELS:
        picture.thumbnail((2 * _THUMBNAIL_PIXELS, 2 * _THUMBNAIL_PIXELS))
    elif factor := _THUMBNAIL_PIXELS // longest:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _scientific(value: float | None) -> str:
    """Format a number with three significant digits; a dash stands for a value that is not known."""
    return "-" if value is None else f"{value:.2e}"
