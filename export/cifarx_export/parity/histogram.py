"""Lay out the error histogram of a parity report for drawing.

Both axes are logarithmic, so that a single logit among 100,000 is visible.
"""

from math import ceil, floor, log10
from typing import Final, NamedTuple

from cifarx_export.parity.error_analysis import Histogram

WIDTH: Final = 480
HEIGHT: Final = 250

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 22, 24, 38
_ZERO_WIDTH: Final = 26
"""Width of the bar of logits without an error, which stands to the left of the axis."""

_MIN_DECADES: Final = 2
_GAP: Final = 1


class Bar(NamedTuple):
    """A rectangle, its tooltip, and whether errors of this size are outside the absolute tolerance."""

    x: float
    y: float
    width: float
    height: float
    title: str
    outside: bool


class Tick(NamedTuple):
    """A position on an axis, in the units of the chart, and its label; `exponent` is a superscript after the label."""

    position: float
    label: str
    exponent: str = ""


class HistogramLayout(NamedTuple):
    """The shapes of a histogram in a box of `width` by `height`.

    Attributes:
        bars: the bars.
        x_ticks: ticks of the axis of errors.
        y_ticks: ticks of the axis of counts.
        tolerance: x of the absolute tolerance; None if there is none or it is outside the axis.
        baseline: y of the bottom of the bars.
        left, right: x of the ends of the axis of errors.
    """

    width: int
    height: int
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    tolerance: float | None
    baseline: float
    left: float
    right: float


def layout_histogram(histogram: Histogram, atol: float | None) -> HistogramLayout:
    """Lay out a histogram over the decades of its filled bins and of the tolerance.

    Args:
        histogram: histogram of absolute errors.
        atol: the absolute tolerance to mark; None or 0 for no mark.
    """
    first, last = _decades(histogram, atol)
    left = _LEFT + (_ZERO_WIDTH + 26 if histogram.zero else 0)
    right, baseline = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    top_power = max(1, ceil(log10(max(*histogram.counts, histogram.zero, 1))))
    scale = (baseline - _TOP) / (top_power + 0.3)  # 0.3 gives a bar of one logit a height

    def x_of(exponent: float) -> float:
        return left + (exponent - first) / (last - first) * (right - left)

    def bar(x: float, width: float, count: int, title: str, outside: bool) -> Bar:
        height = (log10(count) + 0.3) * scale
        return Bar(x, baseline - height, width, height, f"{count:,} logits: {title}", outside)

    step = (histogram.highest - histogram.lowest) / len(histogram.counts)
    bars = [bar(_LEFT, _ZERO_WIDTH, histogram.zero, "no error", False)] if histogram.zero else []
    for index, count in enumerate(histogram.counts):
        start = histogram.lowest + index * step
        if count:
            title = f"{10**start:.1e} to {10 ** (start + step):.1e}"
            outside = bool(atol) and 10 ** (start + step / 2) > (atol or 0)
            bars.append(bar(x_of(start), x_of(start + step) - x_of(start) - _GAP, count, title, outside))
    return HistogramLayout(
        WIDTH,
        HEIGHT,
        tuple(bars),
        tuple(Tick(x_of(exponent), "10", f"{exponent}") for exponent in range(first, last + 1)),
        tuple(Tick(baseline - (power + 0.3) * scale, _short(power)) for power in range(top_power + 1)),
        x_of(log10(atol)) if atol and first <= log10(atol) <= last else None,
        baseline,
        left,
        right,
    )


def _decades(histogram: Histogram, atol: float | None) -> tuple[int, int]:
    """Return the first and the last power of ten of the axis of errors."""
    step = (histogram.highest - histogram.lowest) / len(histogram.counts)
    filled = [index for index, count in enumerate(histogram.counts) if count] or [len(histogram.counts) // 2]
    first = floor(histogram.lowest + filled[0] * step)
    last = ceil(histogram.lowest + (filled[-1] + 1) * step)
    if atol and histogram.lowest <= log10(atol) <= histogram.highest:
        first, last = min(first, floor(log10(atol))), max(last, ceil(log10(atol)))
    return first, max(last, first + _MIN_DECADES)


def _short(power: int) -> str:
    """Return a power of ten as 1, 10, 100, 1k, 10k, …"""
    return f"{10 ** (power % 3)}{'kMGT'[power // 3 - 1] if power >= 3 else ''}"
