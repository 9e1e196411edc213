"""The histogram of a proof's errors as shapes to draw: both axes logarithmic, so that one logit in 100,000 shows."""

from math import ceil, floor, log10
from typing import Final, NamedTuple

from cifarx_export.parity.error_analysis import Histogram

WIDTH: Final = 480
HEIGHT: Final = 250

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 22, 24, 38
_ZERO_WIDTH: Final = 26
"""The bar of the logits without an error stands apart, left of the axis."""

_MIN_DECADES: Final = 2
_GAP: Final = 1


class Bar(NamedTuple):
    """A rectangle, what it stands for, and whether a logit of it may be outside the tolerance."""

    x: float
    y: float
    width: float
    height: float
    title: str
    outside: bool


class Mark(NamedTuple):
    """A place on an axis, in the chart's units, and its text; a power of ten is in two parts."""

    place: float
    text: str
    exponent: str = ""


class HistogramChart(NamedTuple):
    """What to draw in a box of `width` by `height`.

    Attributes:
        bars: of the histogram.
        exponents: along the axis of the errors.
        counts: along the axis of the logits.
        gate: where the absolute tolerance is, None where there is none or it is beyond the axis.
        baseline: of the bars.
        left, right: ends of the baseline.
    """

    width: int
    height: int
    bars: tuple[Bar, ...]
    exponents: tuple[Mark, ...]
    counts: tuple[Mark, ...]
    gate: float | None
    baseline: float
    left: float
    right: float


def histogram_chart(histogram: Histogram, atol: float | None) -> HistogramChart:
    """Lay the histogram out, from the decade of its first bar to that of its last, and of the gate.

    Args:
        histogram: of absolute errors.
        atol: the absolute tolerance of the gate; None or 0 for none to show.
    """
    first, last = _decades(histogram, atol)
    left = _LEFT + (_ZERO_WIDTH + 26 if histogram.zero else 0)
    right, baseline = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    most = max(1, ceil(log10(max(*histogram.counts, histogram.zero, 1))))
    scale = (baseline - _TOP) / (most + 0.3)  # a bar of one has a height too

    def across(exponent: float) -> float:
        return left + (exponent - first) / (last - first) * (right - left)

    def bar(x: float, width: float, count: int, title: str, outside: bool) -> Bar:
        height = (log10(count) + 0.3) * scale
        return Bar(x, baseline - height, width, height, f"{count:,} logits: {title}", outside)

    step = (histogram.highest - histogram.lowest) / len(histogram.counts)
    bars = [bar(_LEFT, _ZERO_WIDTH, histogram.zero, "no error", False)] if histogram.zero else []
    for number, count in enumerate(histogram.counts):
        start = histogram.lowest + number * step
        if count:
            title = f"{10**start:.1e} to {10 ** (start + step):.1e}"
            outside = bool(atol) and 10 ** (start + step / 2) > (atol or 0)
            bars.append(bar(across(start), across(start + step) - across(start) - _GAP, count, title, outside))
    return HistogramChart(
        WIDTH,
        HEIGHT,
        tuple(bars),
        tuple(Mark(across(exponent), "10", f"{exponent}") for exponent in range(first, last + 1)),
        tuple(Mark(baseline - (power + 0.3) * scale, _short(power)) for power in range(most + 1)),
        across(log10(atol)) if atol and first <= log10(atol) <= last else None,
        baseline,
        left,
        right,
    )


def _decades(histogram: Histogram, atol: float | None) -> tuple[int, int]:
    """The exponents where the axis begins and ends."""
    step = (histogram.highest - histogram.lowest) / len(histogram.counts)
    filled = [number for number, count in enumerate(histogram.counts) if count] or [len(histogram.counts) // 2]
    first = floor(histogram.lowest + filled[0] * step)
    last = ceil(histogram.lowest + (filled[-1] + 1) * step)
    if atol and histogram.lowest <= log10(atol) <= histogram.highest:
        first, last = min(first, floor(log10(atol))), max(last, ceil(log10(atol)))
    return first, max(last, first + _MIN_DECADES)


def _short(power: int) -> str:
    """A power of ten: 1, 10, 100, 1k, 10k."""
    return f"{10 ** (power % 3)}{'kMGT'[power // 3 - 1] if power >= 3 else ''}"
