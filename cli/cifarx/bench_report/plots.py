"""A benchmark as plots: as SVG for its page, and as one picture.

A file has one colour, one marker and one dash in all of them. A hollow marker is a row that was not stable.
"""

import textwrap
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import ceil, log10
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from cifarx.bench_report.axes import label_points, log_axis, share_axis
from cifarx.bench_report.svg import svg_element
from cifarx.bench_report.writers import environment_line, title
from cifarx_serve.benchmarking.benchmark import BenchmarkReport, BenchmarkRow

PICTURE_WIDTH: Final = 1800
"""Pixels of the picture; its height grows with the number of files."""

_PICTURE_DPI: Final = 150

_Dash: TypeAlias = Literal["-", "--", ":"]

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart, without the yellow: it is too faint on white."""

_MARKERS: Final = "os^dvPX<>ph*"
_DASHES: Final[tuple[_Dash, ...]] = ("-", "--", ":")

_INK: Final = "#1b1f24"
_QUIET: Final = "#5b6470"
_RULE: Final = "#dfe3e8"

_STYLE: Final = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # the one that matplotlib brings: the same picture on every machine
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar in a file's name is a dollar
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "xtick.color": _QUIET,
    "xtick.labelcolor": _INK,
    "ytick.color": _QUIET,
    "ytick.labelcolor": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "cifarx",  # ids that are the same each time
}

_PLOT_INCHES: Final = (4.8, 3.3)
_SWATCH_INCHES: Final = (0.46, 0.17)

_SHOWN_NAMES: Final = 8
_SHOWN_NAME_LETTERS: Final = 20
"""As many names, and as long, have room beside their points; of more, or longer, the numbers are shown."""

_LONGEST_NAME: Final = 80
"""Letters of a name in the picture's legend."""

_MICRO: Final = 1e-6
_PERCENTILES: Final = (50, 90, 99)
_MAXIMUM: Final = 2.6
"""Where the 100th percentile is drawn: by its scale it would be at infinity; the 99th is at 2."""


class Series(NamedTuple):
    """One file's rows, by batch size, and how it is drawn; `label` is its name where there is room, else its number."""

    name: str
    label: str
    rows: tuple[BenchmarkRow, ...]
    colour: str
    marker: str
    dash: _Dash


class Plot(NamedTuple):
    """One plot; `note` says how to read it, `svg` is its picture without a title and without a legend."""

    title: str
    note: str
    svg: str


class _Drawing(NamedTuple):
    """What to draw into a figure that has room for it."""

    name: str
    title: str
    note: str
    draw: Callable[[FigureBase, Sequence[Series]], None]


def by_file(report: BenchmarkReport) -> tuple[Series, ...]:
    """The report's files in their order; one that was measured twice is two."""
    times: Counter[tuple[str, int]] = Counter()
    rows: dict[tuple[str, int], list[BenchmarkRow]] = {}
    for row in report.rows:
        times[row.file, row.batch] += 1
        rows.setdefault((row.file, times[row.file, row.batch]), []).append(row)
    names = [printable(name) for name, _ in rows]
    short = len(names) <= _SHOWN_NAMES and max(map(len, names), default=0) <= _SHOWN_NAME_LETTERS
    return tuple(
        Series(
            name,
            name if short else f"{number + 1}",
            tuple(sorted(found, key=lambda row: row.batch)),
            _COLOURS[number % len(_COLOURS)],
            _MARKERS[number % len(_MARKERS)],
            _DASHES[number // len(_COLOURS) % len(_DASHES)],
        )
        for number, (name, found) in enumerate(zip(names, rows.values(), strict=True))
    )


def benchmark_figures(report: BenchmarkReport) -> tuple[Plot, ...]:
    """Each plot of a report with at least one row; they share one legend, for which see `swatches`.

    The SVG refers to nothing outside itself, its ids occur in no other, and it is the same each time.
    """
    files = by_file(report)
    found = []
    with _drawing_style():
        for drawing in _drawings(report):
            figure = Figure(_PLOT_INCHES, dpi=72, layout="constrained")
            drawing.draw(figure, files)
            found.append(Plot(drawing.title, drawing.note, svg_element(figure, drawing.name, drawing.title)))
    return tuple(found)


def swatches(report: BenchmarkReport) -> tuple[str, ...]:
    """The line and the marker of each file as a small SVG whose id is `swatch-1` and so on, for a legend."""
    found = []
    with _drawing_style():
        for number, one in enumerate(by_file(report), 1):
            figure = Figure(_SWATCH_INCHES, dpi=72, facecolor="none")
            axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 2), ylim=(-1, 1))
            axes.set_axis_off()
            axes.plot([0.1, 1, 1.9], [0, 0, 0], color=one.colour, linestyle=one.dash)
            _points(axes, one, [(1, 0)], [True])
            found.append(svg_element(figure, f"swatch-{number}"))
    return tuple(found)


def write_png(report: BenchmarkReport, path: Path) -> None:
    """All plots, their legend and the environment as one picture, `PICTURE_WIDTH` wide."""
    files = by_file(report)
    heading = textwrap.wrap(printable(f"Benchmark: {title(report)}"), 120)
    below = textwrap.wrap(printable(environment_line(report.environment)), 170)
    lines = ceil(len(files) / max(1, min(4, 150 // (max(len(_legend_text(one)) for one in files) + 8))))
    head, body = 0.3 + 0.22 * len(heading), 8.0
    if not all(row.stable for row in report.rows):
        below.insert(0, "○ hollow: not stable, the medians of the last three windows differ by more than 10 %")
    foot = 0.35 + 0.19 * lines + 0.16 * len(below)
    with _drawing_style():
        size = (PICTURE_WIDTH / _PICTURE_DPI, head + body + foot)
        figure = Figure(size, dpi=_PICTURE_DPI, layout=ConstrainedLayoutEngine(w_pad=0.12))
        top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=(head, body, foot)).flat
        top.text(0.012, 0.4, "\n".join(heading), size=12, weight="bold", va="center")
        cells = middle.subfigures(2, 2, squeeze=False, wspace=0.03, hspace=0.04).flat
        for cell, drawing in zip(cells, _drawings(report), strict=True):
            cell.suptitle(drawing.title, x=0.025, ha="left", size=11, weight="bold")
            drawing.draw(cell, files)
        _legend(bottom, files, ceil(len(files) / lines))
        bottom.text(0.012, 0.06 / foot, "\n".join(below), size=8, color=_QUIET, va="bottom")
        figure.savefig(path, format="png", metadata={"Software": None})


def printable(text: str) -> str:
    """With a � for what is no letter: neither XML nor UTF-8 can hold all that a file's name can."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter)[0] == "C" else letter for letter in text)


@contextmanager
def _drawing_style() -> Iterator[None]:
    """Whatever the user's own settings of matplotlib are; they are back afterwards."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # of a name: drawn as a box
        yield


def _drawings(report: BenchmarkReport) -> tuple[_Drawing, ...]:
    """The accuracy last: its labels find their place when the rest has its own."""
    least, most = min(row.batch for row in report.rows), max(row.batch for row in report.rows)
    panels = f"batch {least}" if least == most else f"batch {least} and batch {most}"
    share = "Accuracy" if _has_accuracy(report.rows) else "Agreement"
    return (
        _Drawing(
            "latency",
            "Latency by batch size",
            "Line: p50 of a call; whisker: up to p99. Files are drawn a little apart.",
            _draw_latency,
        ),
        _Drawing(
            "throughput",
            "Throughput by batch size",
            "Images by the time of all counted calls.",
            _draw_throughput,
        ),
        _Drawing(
            "percentiles",
            "Distribution of latency",
            f"So many percent of the calls take no longer; at {panels}. Markers: p50, p90 and p99.",
            _draw_percentiles,
        ),
        _Drawing(
            "accuracy",
            f"{share} against latency",
            f"On {report.images:,} images, against p50 at batch {least}; up and to the left is better.",
            _draw_accuracy,
        ),
    )


def _draw_latency(figure: FigureBase, files: Sequence[Series]) -> None:
    axes = figure.add_subplot()
    batches = _batch_axis(axes, files)
    nearest = min((after / before for before, after in pairwise(batches)), default=2)
    step = min(1.03, nearest ** (0.5 / len(files)))  # whiskers beside each other, not over each other
    for number, one in enumerate(files):
        across = np.array([row.batch for row in one.rows]) * step ** (number - (len(files) - 1) / 2)
        middle = np.array([row.p50_us for row in one.rows]) * _MICRO
        tail = np.array([row.p99_us for row in one.rows]) * _MICRO
        axes.plot(across, middle, color=one.colour, linestyle=one.dash)
        axes.vlines(across, middle, tail, color=one.colour, linewidth=1, alpha=0.7)
        axes.plot(across, tail, "_", color=one.colour, markersize=5, alpha=0.7)
        _points(axes, one, list(zip(across, middle, strict=True)), [row.stable for row in one.rows])
    rows = [row for one in files for row in one.rows]
    log_axis(axes, "y", [value * _MICRO for row in rows for value in (row.p50_us, row.p99_us)])
    axes.set_ylabel("latency of a call: p50, whisker to p99")


def _draw_throughput(figure: FigureBase, files: Sequence[Series]) -> None:
    axes = figure.add_subplot()
    _batch_axis(axes, files)
    for one in files:
        points = [(float(row.batch), row.images_per_s) for row in one.rows]
        axes.plot(*zip(*points, strict=True), color=one.colour, linestyle=one.dash)
        _points(axes, one, points, [row.stable for row in one.rows])
    log_axis(axes, "y", [row.images_per_s for one in files for row in one.rows])
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.set_ylabel("images per second")


def _draw_percentiles(figure: FigureBase, files: Sequence[Series]) -> None:
    """The smallest and the largest batch size, the tail drawn out: as far from 90 to 99 as from 0 to 90."""
    batches = sorted({row.batch for one in files for row in one.rows})
    panels = list(dict.fromkeys((batches[0], batches[-1])))
    for axes, batch in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        values: list[float] = []
        for one in files:
            for row in (row for row in one.rows if row.batch == batch):
                seconds = [value * _MICRO for value in row.percentiles_us]
                across = [_percentile_place(percent) for percent in range(len(seconds))]
                axes.plot(across, seconds, color=one.colour, linestyle=one.dash)
                marked = [(across[percent], seconds[percent]) for percent in _PERCENTILES]
                _points(axes, one, marked, [row.stable] * len(marked))
                values += seconds
        log_axis(axes, "y", values)
        axes.set_xticks(
            [*map(_percentile_place, _PERCENTILES), _MAXIMUM], [*(f"{percent}" for percent in _PERCENTILES), "max"]
        )
        axes.set(xlim=(0, _MAXIMUM + 0.1), xlabel="percentile", title=f"batch {batch}")
        if batch == panels[0]:
            axes.set_ylabel("latency of a call")


def _draw_accuracy(figure: FigureBase, files: Sequence[Series]) -> None:
    axes = figure.add_subplot()
    batch = min(row.batch for one in files for row in one.rows)
    shown = [(one, row) for one in files for row in one.rows if row.batch == batch]
    exact = _has_accuracy([row for _, row in shown])
    points = [(row.p50_us * _MICRO, _share(row, exact)) for _, row in shown]
    log_axis(axes, "x", [seconds for seconds, _ in points], room=1.3)
    share_axis(axes, [share for _, share in points])
    axes.set_xlabel(f"p50 latency at batch {batch}")
    axes.set_ylabel("accuracy" if exact else "agreement with the first file")
    for (one, row), point in zip(shown, points, strict=True):
        _points(axes, one, [point], [row.stable], size=8)
    label_points(axes, points, [one.label for one, _ in shown])


def _points(
    axes: Axes, one: Series, points: Sequence[tuple[float, float]], stable: Sequence[bool], size: float = 5.5
) -> None:
    """Markers, hollow where a row was not stable."""
    for (across, up), filled in zip(points, stable, strict=True):
        axes.plot(
            [across], [up], one.marker, color=one.colour, markerfacecolor=one.colour if filled else "white",
            markersize=size, clip_on=False,
        )  # fmt: skip


def _batch_axis(axes: Axes, files: Sequence[Series]) -> list[int]:
    """The batch sizes that were measured, which are its marks; some of them where they are too close together."""
    batches = sorted({row.batch for one in files for row in one.rows})
    room = max(1.4, (batches[-1] / batches[0]) ** 0.08)
    least, most = batches[0] / room, batches[-1] * room
    axes.set_xscale("log", base=2)
    axes.set_xlim(least, most)
    marks: list[int] = []
    for batch in batches:
        if not marks or log10(batch / marks[-1]) > log10(most / least) / 14:
            marks.append(batch)
    axes.set_xticks(marks, [f"{mark}" for mark in marks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch size, images")
    return batches


def _percentile_place(percent: int) -> float:
    """By how many nines it has: 0 at 0, 90 at 1, 99 at 2."""
    return _MAXIMUM if percent == 100 else -log10(1 - percent / 100)


def _legend(figure: FigureBase, files: Sequence[Series], columns: int) -> None:
    handles = [
        Line2D([], [], color=one.colour, linestyle=one.dash, marker=one.marker, label=_legend_text(one))
        for one in files
    ]
    figure.legend(handles=handles, loc="upper center", ncols=columns)


def _legend_text(one: Series) -> str:
    """With the middle of a long name left out: what tells files apart is at the end, mostly."""
    name = one.name
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 3]}…{name[-2 * _LONGEST_NAME // 3 :]}"
    return name if one.label == one.name else f"{one.label}  {name}"


def _has_accuracy(rows: Sequence[BenchmarkRow]) -> bool:
    return all(row.accuracy is not None for row in rows)


def _share(row: BenchmarkRow, exact: bool) -> float:
    return row.accuracy if exact and row.accuracy is not None else row.agreement
