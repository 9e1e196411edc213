"""Plot axes with round tick marks, and point labels that do not overlap."""

from collections.abc import Iterator, Sequence
from math import ceil, floor, log10
from typing import Final, Literal, TypeAlias

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FixedLocator, Formatter, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox, BboxBase

AxisName: TypeAlias = Literal["x", "y"]

_MARKS: Final = {"x": 7, "y": 10}
"""The maximum number of tick marks on an axis."""

_LINE: Final = "#5b6470"
"""Color of the line from a label to its point."""


def log_axis(axes: Axes, name: AxisName, values: Sequence[float], room: float = 1.08) -> None:
    """Make an axis of seconds logarithmic, from one step of 1, 2, 5, 10 to another, with at least two marks.

    Args:
        axes: the axes of the plot.
        name: the axis.
        values: all values that the axis must show.
        room: the factor by which the axis extends beyond them at either end.
    """
    least, most = min(values) / room, max(values) * room
    exponents = range(floor(log10(least)), ceil(log10(most)) + 1)
    steps = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    first = max(step for step in steps if step <= least)
    last = min(step for step in steps if step >= most)
    marks = [step for step in steps if first <= step <= last]
    if len(marks) > _MARKS[name]:
        marks = [10.0**exponent for exponent in exponents if first <= 10.0**exponent <= last]
    axis = axes.xaxis if name == "x" else axes.yaxis
    axes.set(**{f"{name}scale": "log", f"{name}lim": (first, last)})
    _set_marks(axes, name, marks, EngFormatter("s"))
    axis.set_minor_locator(NullLocator())


def percent_axis(axes: Axes, shares: Sequence[float]) -> None:
    """Make the y axis show shares as percentages, with some room above and below them."""
    room = max(0.25 * (max(shares) - min(shares)), 0.005)
    low, high = min(shares) - room, max(shares) + room
    axes.set_ylim(low, high)
    marks = [
        mark
        for mark in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= mark <= high and 0 <= mark <= 1
    ]
    _set_marks(axes, "y", marks, PercentFormatter(1, None))


def _set_marks(axes: Axes, name: AxisName, marks: Sequence[float], formatter: Formatter) -> None:
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(marks)))
    axis.set_major_formatter(formatter)


def label_points(axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Place each label where it covers neither a point nor another label, with a line to its point if that is far.

    Call this last: labels are placed in pixels, so the position of the axes must be final.
    """
    figure = axes.figure.canvas.figure
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    positions = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in positions]
    for point, (x, y), label in zip(points, positions, labels, strict=True):
        measured = axes.text(0, 0, label)
        size = measured.get_window_extent()
        measured.remove()
        candidates = list(_positions_around(x, y, size.width, size.height, scale))
        free = (candidate for candidate in candidates if _is_free(candidate[1], taken, axes.bbox))
        reach, box = next(free, candidates[0])
        taken.append(box)
        axes.annotate(
            label, point, ((box.x0 - x) / scale, (box.y0 - y) / scale), textcoords="offset points", va="bottom",
            in_layout=False, arrowprops={"arrowstyle": "-", "color": _LINE, "linewidth": 0.6} if reach > 1 else None,
        )  # fmt: skip


def _is_free(box: Bbox, taken: Sequence[Bbox], inside: BboxBase) -> bool:
    return not box.count_overlaps(taken) and inside.count_contains(box.corners()) == 4


def _positions_around(x: float, y: float, width: float, height: float, scale: float) -> Iterator[tuple[int, Bbox]]:
    """Yield boxes for a label around a point, in pixels, the best first, each with its distance from 1 to 5."""
    for reach in range(1, 6):
        for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            left = x + right * (1 + 6 * reach) * scale + (right - 1) / 2 * width
            bottom = y + up * (8 * reach - 2) * scale + (up - 1) / 2 * height
            yield reach, Bbox.from_bounds(left, bottom, width, height)
