"""The plot of the Pareto front: agreement against what is preferred, one point per measured candidate."""

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cifarx.bench_report.axes import label_points, log_axis, percent_axis
from cifarx.bench_report.plot_style import COLORS, INK, QUIET, plot_style
from cifarx.bench_report.svg import svg_element
from cifarx_export.optimization.results import CandidateResult, OptimizationReport, Preference

_INCHES: Final = (9.2, 4.4)
_MICRO: Final = 1e-6
_BLUE, _ORANGE, *_ = COLORS


class _Axis(NamedTuple):
    """The horizontal axis for a preference: its label, and the value of a measured candidate."""

    label: str
    value: Callable[[CandidateResult], float]
    lower_is_better: bool = True


def render_front(report: OptimizationReport) -> str:
    """Draw the measured candidates, of which there is at least one, and the front as SVG.

    The SVG is reproducible and refers to nothing outside itself.
    """
    axis = _AXES[report.prefer]
    measured = [result for result in report.results if result.is_measured]
    points = [(axis.value(result), result.agreement or 0.0) for result in measured]
    with plot_style():
        figure = Figure(_INCHES, dpi=72, layout="constrained")
        axes = figure.add_subplot()
        _set_axes(axes, report.prefer, points)
        _draw_front(axes, [point for point, one in zip(points, measured, strict=True) if one.name in report.front])
        for point, result in zip(points, measured, strict=True):
            _draw_point(axes, point, result, report)
        label_points(axes, points, [result.name for result in measured])
        better = "left" if axis.lower_is_better else "right"
        return svg_element(figure, "front", f"Agreement against {axis.label}; up and to the {better} is better")


def describe_direction(prefer: Preference) -> str:
    """Return where the better candidates are in the plot."""
    return f"up and to the {'left' if _AXES[prefer].lower_is_better else 'right'} is better"


def _set_axes(axes: Axes, prefer: Preference, points: list[tuple[float, float]]) -> None:
    log_axis(axes, "x", [value for value, _ in points], room=1.15)
    if prefer != "latency":
        axes.xaxis.set_major_formatter("{x:,.10g}")
    percent_axis(axes, [share for _, share in points])
    axes.set_xlabel(_AXES[prefer].label)
    axes.set_ylabel("agreement with the network")


def _draw_front(axes: Axes, front: list[tuple[float, float]]) -> None:
    across, up = zip(*sorted(front), strict=True)
    axes.plot(across, up, color=_ORANGE, linestyle="--", zorder=1)


def _draw_point(axes: Axes, point: tuple[float, float], result: CandidateResult, report: OptimizationReport) -> None:
    """Draw a star for the pick, a filled circle for the rest of the front, and a hollow circle for all others."""
    if result.name == report.pick:
        axes.plot(*point, "*", color=_ORANGE, markeredgecolor=INK, markersize=17, clip_on=False)
    elif result.name in report.front:
        axes.plot(*point, "o", color=_ORANGE, markersize=8, clip_on=False)
    else:
        color = QUIET if result.name == report.baseline else _BLUE
        axes.plot(*point, "o", color=color, markerfacecolor="white", markersize=8, clip_on=False)


def _latency_s(result: CandidateResult) -> float:
    assert result.measurement is not None
    return result.measurement.latency.p50_us * _MICRO


def _throughput(result: CandidateResult) -> float:
    assert result.measurement is not None
    return result.measurement.images_per_s


_AXES: Final[Mapping[Preference, _Axis]] = {
    "latency": _Axis("p50 latency at batch 1", _latency_s),
    "throughput": _Axis("images per second at the best batch size", _throughput, lower_is_better=False),
    "size": _Axis("size of the file in KB", lambda result: (result.size_bytes or 0) / 1e3),
}
