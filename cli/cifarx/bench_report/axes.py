"""Axes of a plot with marks that read well, and labels that cover nothing."""

from collections.abc import Iterator, Sequence
from math import ceil, floor, log10
from typing import Final, Literal, TypeAlias

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FixedLocator, Formatter, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox, BboxBase

AxisName: TypeAlias = Literal["x", "y"]

_MARKS: Final = {"x": 7, "y": 10}
"""As many have room on an axis."""

_LINE: Final = "#5b6470"
"""From a label to its point."""


def log_axis(axes: Axes, name: AxisName, values: Sequence[float], room: float = 1.08) -> None:
    """From one step of 1, 2, 5, 10 to another, so that there are two marks at least; of seconds, with their unit."""
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


def share_axis(axes: Axes, shares: Sequence[float]) -> None:
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
    """Write each label where it covers neither a point nor another label, with a line to its point if it is far.

    It has to be the last thing drawn: a label's place is in pixels, and the axes' place must be known.
    """
    whole = axes.figure.canvas.figure
    whole.draw_without_rendering()
    scale = whole.dpi / 72
    places = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in places]
    for point, (x, y), label in zip(points, places, labels, strict=True):
        measured = axes.text(0, 0, label)
        size = measured.get_window_extent()
        measured.remove()
        around = list(_around(x, y, size.width, size.height, scale))
        free = (place for place in around if _is_free(place[1], taken, axes.bbox))
        reach, box = next(free, around[0])
        taken.append(box)
        axes.annotate(
            label, point, ((box.x0 - x) / scale, (box.y0 - y) / scale), textcoords="offset points", va="bottom",
            in_layout=False, arrowprops={"arrowstyle": "-", "color": _LINE, "linewidth": 0.6} if reach > 1 else None,
        )  # fmt: skip


def _is_free(box: Bbox, taken: Sequence[Bbox], inside: BboxBase) -> bool:
    return not box.count_overlaps(taken) and inside.count_contains(box.corners()) == 4


def _around(x: float, y: float, width: float, height: float, scale: float) -> Iterator[tuple[int, Bbox]]:
    """Places for a label of that size about a point, all in pixels, the better ones first; how far they are, 1 to 5."""
    for reach in range(1, 6):
        for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            left = x + right * (1 + 6 * reach) * scale + (right - 1) / 2 * width
            bottom = y + up * (8 * reach - 2) * scale + (up - 1) / 2 * height
            yield reach, Bbox.from_bounds(left, bottom, width, height)
