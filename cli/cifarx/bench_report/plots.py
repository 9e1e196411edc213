"""Plots of a benchmark report: as SVG for the HTML page, and as one PNG.

A file has the same color, marker and line style in all plots. A hollow marker stands for a row that was not stable.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, log10
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from cifarx.bench_report.axes import label_points, log_axis, percent_axis
from cifarx.bench_report.plot_style import COLORS, QUIET, plot_style
from cifarx.bench_report.summary import environment_line, title
from cifarx.bench_report.svg import svg_element
from cifarx_serve.benchmarking.benchmark import BenchmarkReport, BenchmarkRow
from cifarx_serve.system.terminal import printable

PNG_WIDTH: Final = 1800
"""Width of the PNG in pixels; its height grows with the number of files."""

_PNG_DPI: Final = 150

_Dash: TypeAlias = Literal["-", "--", ":"]

_MARKERS: Final = "os^dvPX<>ph*"
_DASHES: Final[tuple[_Dash, ...]] = ("-", "--", ":")

_PLOT_INCHES: Final = (4.8, 3.3)
_SWATCH_INCHES: Final = (0.46, 0.17)

_MAX_LABELS: Final = 8
_MAX_LABEL_LENGTH: Final = 20
"""Points are labeled with file names if there are at most `_MAX_LABELS` of this length, and with numbers otherwise."""

_MAX_LEGEND_NAME: Final = 80
"""Characters of a file name in the legend of the PNG."""

_MICRO: Final = 1e-6
_PERCENTILES: Final = (50, 90, 99)
_MAXIMUM: Final = 2.6
"""Position of the 100th percentile, which the scale would put at infinity; the 99th is at 2."""


class Series(NamedTuple):
    """One file's rows, sorted by batch size, and its style; `label` is its name if there is room, or its number."""

    name: str
    label: str
    rows: tuple[BenchmarkRow, ...]
    color: str
    marker: str
    dash: _Dash


class Plot(NamedTuple):
    """One plot; `note` explains how to read it, `svg` is the drawing without a title or a legend."""

    title: str
    note: str
    svg: str


class _Drawing(NamedTuple):
    """A plot before it is drawn: `draw` draws it into a figure."""

    name: str
    title: str
    note: str
    draw: Callable[[FigureBase, Sequence[Series]], None]


def file_series(report: BenchmarkReport) -> tuple[Series, ...]:
    """Return one series per file, in the order of the report; a file that was measured twice has two."""
    occurrences: Counter[tuple[str, int]] = Counter()
    rows: dict[tuple[str, int], list[BenchmarkRow]] = {}
    for row in report.rows:
        occurrences[row.file, row.batch] += 1
        rows.setdefault((row.file, occurrences[row.file, row.batch]), []).append(row)
    names = [printable(name) for name, _ in rows]
    short = len(names) <= _MAX_LABELS and max(map(len, names), default=0) <= _MAX_LABEL_LENGTH
    return tuple(
        Series(
            name,
            name if short else f"{number + 1}",
            tuple(sorted(file_rows, key=lambda row: row.batch)),
            COLORS[number % len(COLORS)],
            _MARKERS[number % len(_MARKERS)],
            _DASHES[number // len(COLORS) % len(_DASHES)],
        )
        for number, (name, file_rows) in enumerate(zip(names, rows.values(), strict=True))
    )


def render_plots(report: BenchmarkReport) -> tuple[Plot, ...]:
    """Draw each plot of a report with at least one row as SVG; they share the legend of `legend_swatches`.

    The SVG is reproducible and refers to nothing outside itself, and no id occurs in two plots.
    """
    files = file_series(report)
    plots = []
    with plot_style():
        for drawing in _drawings(report):
            figure = Figure(_PLOT_INCHES, dpi=72, layout="constrained")
            drawing.draw(figure, files)
            plots.append(Plot(drawing.title, drawing.note, svg_element(figure, drawing.name, drawing.title)))
    return tuple(plots)


def legend_swatches(report: BenchmarkReport) -> tuple[str, ...]:
    """Draw the line and the marker of each file as a small SVG with the id `swatch-1`, `swatch-2` and so on."""
    swatches = []
    with plot_style():
        for number, series in enumerate(file_series(report), 1):
            figure = Figure(_SWATCH_INCHES, dpi=72, facecolor="none")
            axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 2), ylim=(-1, 1))
            axes.set_axis_off()
            axes.plot([0.1, 1, 1.9], [0, 0, 0], color=series.color, linestyle=series.dash)
            _draw_markers(axes, series, [(1, 0)], [True])
            swatches.append(svg_element(figure, f"swatch-{number}"))
    return tuple(swatches)


def write_png(report: BenchmarkReport, path: Path) -> None:
    """Write all plots, their legend and the environment as one picture that is `PNG_WIDTH` pixels wide."""
    files = file_series(report)
    heading = textwrap.wrap(printable(". WARNING: ".join([f"Benchmark: {title(report)}", *report.warnings])), 120)
    below = textwrap.wrap(printable(environment_line(report.environment)), 170)
    longest = max(len(_legend_text(series)) for series in files)
    lines = ceil(len(files) / max(1, min(4, 150 // (longest + 8))))
    head, body = 0.3 + 0.22 * len(heading), 8.0
    if not all(row.stable for row in report.rows):
        below.insert(0, "○ hollow: not stable, the medians of the last three windows differ by more than 10 %")
    foot = 0.35 + 0.19 * lines + 0.16 * len(below)
    with plot_style():
        size = (PNG_WIDTH / _PNG_DPI, head + body + foot)
        figure = Figure(size, dpi=_PNG_DPI, layout=ConstrainedLayoutEngine(w_pad=0.12))
        top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=(head, body, foot)).flat
        top.text(0.012, 0.4, "\n".join(heading), size=12, weight="bold", va="center")
        cells = middle.subfigures(2, 2, squeeze=False, wspace=0.03, hspace=0.04).flat
        for cell, drawing in zip(cells, _drawings(report), strict=True):
            cell.suptitle(drawing.title, x=0.025, ha="left", size=11, weight="bold")
            drawing.draw(cell, files)
        _draw_legend(bottom, files, ceil(len(files) / lines))
        bottom.text(0.012, 0.06 / foot, "\n".join(below), size=8, color=QUIET, va="bottom")
        figure.savefig(path, format="png", metadata={"Software": None})


def _drawings(report: BenchmarkReport) -> tuple[_Drawing, ...]:
    """Return the four plots; accuracy is last, because its labels are placed around everything else."""
    least, most = min(row.batch for row in report.rows), max(row.batch for row in report.rows)
    panels = f"batch {least}" if least == most else f"batch {least} and batch {most}"
    share = "Accuracy" if _has_accuracy(report.rows) else "Agreement"
    return (
        _Drawing(
            "latency",
            "Latency by batch size",
            "Line: p50 of a call; whisker: up to p99. Files are drawn slightly apart.",
            _draw_latency,
        ),
        _Drawing(
            "throughput",
            "Throughput by batch size",
            "Images divided by the total time of all counted calls.",
            _draw_throughput,
        ),
        _Drawing(
            "percentiles",
            "Distribution of latency",
            f"The latency that this percentage of calls does not exceed; at {panels}. Markers: p50, p90 and p99.",
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
    step = min(1.03, nearest ** (0.5 / len(files)))  # keeps the whiskers from covering each other
    for number, series in enumerate(files):
        across = np.array([row.batch for row in series.rows]) * step ** (number - (len(files) - 1) / 2)
        middle = np.array([row.p50_us for row in series.rows]) * _MICRO
        tail = np.array([row.p99_us for row in series.rows]) * _MICRO
        axes.plot(across, middle, color=series.color, linestyle=series.dash)
        axes.vlines(across, middle, tail, color=series.color, linewidth=1, alpha=0.7)
        axes.plot(across, tail, "_", color=series.color, markersize=5, alpha=0.7)
        _draw_markers(axes, series, list(zip(across, middle, strict=True)), [row.stable for row in series.rows])
    rows = [row for series in files for row in series.rows]
    log_axis(axes, "y", [value * _MICRO for row in rows for value in (row.p50_us, row.p99_us)])
    axes.set_ylabel("latency of a call: p50, whisker to p99")


def _draw_throughput(figure: FigureBase, files: Sequence[Series]) -> None:
    axes = figure.add_subplot()
    _batch_axis(axes, files)
    for series in files:
        points = [(float(row.batch), row.images_per_s) for row in series.rows]
        axes.plot(*zip(*points, strict=True), color=series.color, linestyle=series.dash)
        _draw_markers(axes, series, points, [row.stable for row in series.rows])
    log_axis(axes, "y", [row.images_per_s for series in files for row in series.rows])
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.set_ylabel("images per second")


def _draw_percentiles(figure: FigureBase, files: Sequence[Series]) -> None:
    """Draw the smallest and the largest batch size, on a scale on which 90 to 99 is as long as 0 to 90."""
    batches = sorted({row.batch for series in files for row in series.rows})
    panels = list(dict.fromkeys((batches[0], batches[-1])))
    for axes, batch in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        values: list[float] = []
        for series in files:
            for row in (row for row in series.rows if row.batch == batch):
                seconds = [value * _MICRO for value in row.percentiles_us]
                across = [_percentile_position(percent) for percent in range(len(seconds))]
                axes.plot(across, seconds, color=series.color, linestyle=series.dash)
                marked = [(across[percent], seconds[percent]) for percent in _PERCENTILES]
                _draw_markers(axes, series, marked, [row.stable] * len(marked))
                values += seconds
        log_axis(axes, "y", values)
        axes.set_xticks(
            [*map(_percentile_position, _PERCENTILES), _MAXIMUM], [*(f"{percent}" for percent in _PERCENTILES), "max"]
        )
        axes.set(xlim=(0, _MAXIMUM + 0.1), xlabel="percentile", title=f"batch {batch}")
        if batch == panels[0]:
            axes.set_ylabel("latency of a call")


def _draw_accuracy(figure: FigureBase, files: Sequence[Series]) -> None:
    axes = figure.add_subplot()
    batch = min(row.batch for series in files for row in series.rows)
    shown = [(series, row) for series in files for row in series.rows if row.batch == batch]
    exact = _has_accuracy([row for _, row in shown])
    points = [(row.p50_us * _MICRO, _share(row, exact)) for _, row in shown]
    log_axis(axes, "x", [seconds for seconds, _ in points], room=1.3)
    percent_axis(axes, [share for _, share in points])
    axes.set_xlabel(f"p50 latency at batch {batch}")
    axes.set_ylabel("accuracy" if exact else "agreement with the first file")
    for (series, row), point in zip(shown, points, strict=True):
        _draw_markers(axes, series, [point], [row.stable], size=8)
    label_points(axes, points, [series.label for series, _ in shown])


def _draw_markers(
    axes: Axes, series: Series, points: Sequence[tuple[float, float]], stable: Sequence[bool], size: float = 5.5
) -> None:
    """Draw one marker per point, hollow if its row was not stable."""
    for (across, up), filled in zip(points, stable, strict=True):
        axes.plot(
            [across], [up], series.marker, color=series.color, markerfacecolor=series.color if filled else "white",
            markersize=size, clip_on=False,
        )  # fmt: skip


def _batch_axis(axes: Axes, files: Sequence[Series]) -> list[int]:
    """Set up a batch-size axis and return the measured batch sizes; its marks omit those too close together."""
    batches = sorted({row.batch for series in files for row in series.rows})
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


def _percentile_position(percent: int) -> float:
    """Return the number of nines: 0 for the 0th percentile, 1 for the 90th, 2 for the 99th."""
    return _MAXIMUM if percent == 100 else -log10(1 - percent / 100)


def _draw_legend(figure: FigureBase, files: Sequence[Series], columns: int) -> None:
    handles = [
        Line2D([], [], color=series.color, linestyle=series.dash, marker=series.marker, label=_legend_text(series))
        for series in files
    ]
    figure.legend(handles=handles, loc="upper center", ncols=columns)


def _legend_text(series: Series) -> str:
    """Return the label and the name; a long name loses its middle, because mostly the ends of file names differ."""
    name = series.name
    if len(name) > _MAX_LEGEND_NAME:
        name = f"{name[: _MAX_LEGEND_NAME // 3]}…{name[-2 * _MAX_LEGEND_NAME // 3 :]}"
    return name if series.label == series.name else f"{series.label}  {name}"


def _has_accuracy(rows: Sequence[BenchmarkRow]) -> bool:
    return all(row.accuracy is not None for row in rows)


def _share(row: BenchmarkRow, exact: bool) -> float:
    return row.accuracy if exact and row.accuracy is not None else row.agreement
