"""Proofs as one HTML page that stands alone: no script, nothing loaded from elsewhere, readable from the disk."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_export.parity.error_analysis import ClassAgreement, Disagreement, ErrorAnalysis, WorstImage
from cifarx_export.parity.histogram import HistogramChart, histogram_chart
from cifarx_export.parity.report import ParityReport
from cifarx_export.parity.tolerances import Tolerance, gate
from cifarx_serve.errors import UsageError
from cifarx_serve.files.atomic import atomic_path, require_writable
from cifarx_serve.spec import ParitySummary

if TYPE_CHECKING:
    import jinja2

SUFFIX: Final = ".html"

_TEMPLATE: Final = "parity_page.html"

_MATRIX_CLASSES: Final = 12
"""As many classes fit a matrix of disagreements; of more, the most frequent are listed."""

_LISTED: Final = 15
"""Rows of a list that would be longer with more classes."""

_PICTURE_PIXELS: Final = 160
"""Small images are enlarged by a whole factor to about this; those of twice as many are made smaller."""


class Figure(NamedTuple):
    """A row of the table of figures; `gate` is empty where nothing is asked of it."""

    name: str
    value: str
    gate: str = ""


class ClassRow(NamedTuple):
    """How often one class is answered alike; `bar` is the share that differs, 1 for the class that differs most."""

    name: str
    images: int
    agreement: float
    differing: int
    bar: float


class Matrix(NamedTuple):
    """Disagreements: `rows[reference][artifact]` images, with the names of the classes that occur."""

    names: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    most: int


class LogitRow(NamedTuple):
    """The logit of one class by both; None where it is not finite."""

    name: str
    reference: float | None
    artifact: float | None
    reference_answer: bool
    artifact_answer: bool


class Picture(NamedTuple):
    """One of the worst images; `source` is its data URI."""

    source: str
    image: int
    label: str | None
    reference: str
    artifact: str
    flipped: bool
    logits: tuple[LogitRow, ...]
    error: float | None


class Section(NamedTuple):
    """One artifact's part of the page; what evidence shows is empty where the artifact gave no answer."""

    anchor: str
    report: ParityReport
    figures: tuple[Figure, ...]
    chart: HistogramChart | None
    classes: tuple[ClassRow, ...]
    matrix: Matrix | None
    pairs: tuple[tuple[str, str, int], ...]
    pictures: tuple[Picture, ...]


def require_page(page: str | Path | None) -> None:
    """Find out before long work whether a page of that name can be written; None is no page.

    Raises:
        UsageError: the name does not end in `.html`.
        OutputError: its folder cannot be written.
    """
    if page is None:
        return
    if not str(page).endswith(SUFFIX):
        raise UsageError(f"a report as {page}", f"give a name that ends in {SUFFIX}")
    require_writable(Path(page).parent)


def write_parity_page(path: Path, reports: Sequence[ParityReport], images: NDArray[np.uint8]) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the page.
        reports: of artifacts, at least one, in the order of their sections.
        images: of their proof, uint8 (N, height, width, 3): the positions of the worst images count in these.

    Raises:
        OutputError: it cannot be written.
    """
    text = parity_page(reports, images)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parity_page(reports: Sequence[ParityReport], images: NDArray[np.uint8]) -> str:
    """The page as text; see `write_parity_page`."""
    sections = [_section(f"artifact-{number}", report, images) for number, report in enumerate(reports, 1)]
    return _templates().get_template(_TEMPLATE).render(sections=sections)


def _templates() -> "jinja2.Environment":
    """Names of classes and files come from anywhere: all text is escaped."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("cifarx_export.parity"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["scientific"] = _scientific
    return found


def _section(anchor: str, report: ParityReport, images: NDArray[np.uint8]) -> Section:
    summary, evidence = report.summary, report.evidence
    figures = _figures(summary, gate(report.precision, summary.atol, summary.rtol))
    if evidence is None:
        return Section(anchor, report, figures, None, (), None, (), ())
    few = len(evidence.class_names) <= _MATRIX_CLASSES
    return Section(
        anchor,
        report,
        figures,
        histogram_chart(evidence.histogram, summary.atol),
        _class_rows(evidence.class_names, evidence.by_class),
        _matrix(evidence.class_names, evidence.disagreements) if few and evidence.disagreements else None,
        () if few else _pairs(evidence.class_names, evidence.disagreements),
        tuple(_picture(worst, evidence, images[worst.image]) for worst in evidence.worst),
    )


def _figures(summary: ParitySummary, limits: Tolerance) -> tuple[Figure, ...]:
    tolerance = f"{limits.atol or 0:g} + {limits.rtol or 0:g}·|ref|" if limits.has_tolerance else ""
    figures = [
        Figure("Largest error", _scientific(summary.max_abs_error), tolerance and f"≤ {tolerance}"),
        Figure("Mean error", _scientific(summary.mean_abs_error)),
        Figure("99.9th percentile", _scientific(summary.p999_abs_error)),
        Figure("Tolerance needed", _scientific(summary.required_tolerance)),
        Figure("NaN or Inf", f"{summary.nonfinite:,}", "0"),
        Figure("Same answer", f"{summary.agreement:.4%}", f"≥ {limits.agreement * 100:g}%"),
        Figure("Flips forgiven", f"{summary.forgiven:,}"),
    ]
    before, after = summary.reference_accuracy, summary.accuracy
    if before is not None and after is not None:
        budget = "" if limits.accuracy_drop is None else f"≥ {-limits.accuracy_drop * 100:+.2f}"
        figures += [
            Figure("Accuracy, checkpoint", f"{before:.2%}"),
            Figure("Accuracy, artifact", f"{after:.2%}"),
            Figure("Difference in points", f"{(after - before) * 100:+.2f}", budget),
        ]
    return tuple(figures)


def _class_rows(names: Sequence[str], by_class: Sequence[ClassAgreement]) -> tuple[ClassRow, ...]:
    """In label order; of many classes, those that differ most."""
    shares = [1 - row.agreeing / row.images if row.images else 0.0 for row in by_class]
    most = max(shares) or 1.0
    rows = [
        ClassRow(name, row.images, 1 - share, row.images - row.agreeing, share / most)
        for name, row, share in zip(names, by_class, shares, strict=True)
    ]
    if len(rows) > _MATRIX_CLASSES:
        rows = sorted(rows, key=lambda row: row.agreement)[:_LISTED]
    return tuple(rows)


def _matrix(names: Sequence[str], disagreements: Sequence[Disagreement]) -> Matrix:
    counts = {(one.reference, one.artifact): one.count for one in disagreements}
    occurring = sorted({index for pair in counts for index in pair})
    return Matrix(
        tuple(names[index] for index in occurring),
        tuple(tuple(counts.get((row, column), 0) for column in occurring) for row in occurring),
        max(counts.values()),
    )


def _pairs(names: Sequence[str], disagreements: Sequence[Disagreement]) -> tuple[tuple[str, str, int], ...]:
    return tuple((names[one.reference], names[one.artifact], one.count) for one in disagreements[:_LISTED])


def _picture(worst: WorstImage, evidence: ErrorAnalysis, pixels: NDArray[np.uint8]) -> Picture:
    names = evidence.class_names
    return Picture(
        _png(pixels),
        worst.image,
        None if worst.label is None else names[worst.label],
        names[worst.reference_answer],
        names[worst.artifact_answer],
        worst.flipped,
        _logit_rows(worst, names),
        worst.error,
    )


def _logit_rows(worst: WorstImage, names: Sequence[str]) -> tuple[LogitRow, ...]:
    """Of both answers; where they are the same, of the reference's second choice too."""
    chosen = list(dict.fromkeys([worst.reference_answer, worst.artifact_answer]))
    if len(chosen) == 1:
        others = [index for index in range(len(names)) if index not in chosen]
        chosen.append(max(others, key=lambda index: _or_least(worst.reference[index])))
    return tuple(
        LogitRow(
            names[index],
            worst.reference[index],
            worst.artifact[index],
            index == worst.reference_answer,
            index == worst.artifact_answer,
        )
        for index in chosen
    )


def _or_least(logit: float | None) -> float:
    return float("-inf") if logit is None else logit


def _png(pixels: NDArray[np.uint8]) -> str:
    """An image, uint8 (height, width, 3), as a data URI that shows its pixels."""
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    if longest > 2 * _PICTURE_PIXELS:
        picture.thumbnail((2 * _PICTURE_PIXELS, 2 * _PICTURE_PIXELS))
    elif factor := _PICTURE_PIXELS // longest:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _scientific(value: float | None) -> str:
    """Where nothing finite was found there is a dash."""
    return "-" if value is None else f"{value:.2e}"
