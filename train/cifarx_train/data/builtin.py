"""The built-in data set: ten classes of little pictograms, drawn by code, so that everything runs offline.

The names and their order are CIFAR-10's, and so is the shape of an image: 32 x 32 pixels, RGB, one byte per
channel.  Every image shows its class's pictogram at a random place, size, angle and stretch, in random
colours, over a random gradient, among random clutter and under pixel noise.  Whether the figure is lighter or
darker than its background is drawn by lot, so a mean colour tells nothing about the class.

The drawing is the same, bit for bit, on every machine, because it is made only of

* PCG64's raw 64-bit stream, which numpy promises to keep (``Generator``'s distributions come without that);
* ``+ - * /``, ``sqrt``, comparisons and rounding to integers in float64, each of which IEEE 754 defines
  exactly (``sin`` and ``cos`` differ between libraries, so a rotation is built from rational functions);
* integer arithmetic, and stable sorting.

No reduction (``sum``, ``mean``, ``dot``) touches a float: numpy may order its additions differently per CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

CLASS_NAMES: Final[tuple[str, ...]] = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
TRAIN_IMAGES: Final = 10_000
TEST_IMAGES: Final = 2_000

Split: TypeAlias = Literal["train", "test"]
Bytes: TypeAlias = NDArray[np.uint8]
Shorts: TypeAlias = NDArray[np.int16]
Floats: TypeAlias = NDArray[np.float64]
Point: TypeAlias = tuple[float, float]

SIDE: Final = 32
SAMPLES: Final = 2 * SIDE  # per axis: every pixel is sampled 2 x 2
# Images drawn at once, all of one class: few enough for the masks to stay in the cache, and a divisor of the
# number of images per class.
CHUNK: Final = 200
SEEDS: Final[dict[Split, int]] = {"train": 20_090_408, "test": 19_980_731}

# Colour roles.  A sample holds the role it shows; the colours come last.
BACKGROUND, BODY, ACCENT, DARK, LIGHT, CLUTTER_A, CLUTTER_B = range(7)
ROLES: Final = 7
BLOBS: Final = (CLUTTER_A, CLUTTER_B, CLUTTER_A, CLUTTER_B)


# --- pictograms ---------------------------------------------------------------------------------------------
# Local coordinates: the figure fills about [-1, 1] x [-1, 1], x to the right, y downwards.


@dataclass(frozen=True)
class Ellipse:
    """An axis-parallel ellipse around ``centre``."""

    role: int
    centre: Point
    radii: Point


@dataclass(frozen=True)
class Polygon:
    """A convex polygon; its corners may run either way round."""

    role: int
    corners: tuple[Point, ...]


Part: TypeAlias = Ellipse | Polygon


def disc(role: int, x: float, y: float, rx: float, ry: float | None = None) -> Ellipse:
    """An ellipse, or a circle where ``ry`` is left out."""
    return Ellipse(role, (x, y), (rx, rx if ry is None else ry))


def poly(role: int, *corners: Point) -> Polygon:
    """A convex polygon."""
    return Polygon(role, corners)


def box(role: int, left: float, top: float, right: float, bottom: float) -> Polygon:
    """An axis-parallel rectangle."""
    return poly(role, (left, top), (right, top), (right, bottom), (left, bottom))


def bar(role: int, start: Point, end: Point, width: float) -> Polygon:
    """A straight stroke from ``start`` to ``end``."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    half = 0.5 * width / math.sqrt(dx * dx + dy * dy)
    nx, ny = -dy * half, dx * half
    return poly(
        role,
        (start[0] + nx, start[1] + ny),
        (end[0] + nx, end[1] + ny),
        (end[0] - nx, end[1] - ny),
        (start[0] - nx, start[1] - ny),
    )


def mirrored(part: Part, *, across: Literal["x", "y"]) -> Part:
    """The part with its x (or y) coordinates negated."""
    sx, sy = (-1.0, 1.0) if across == "x" else (1.0, -1.0)
    if isinstance(part, Ellipse):
        return Ellipse(part.role, (sx * part.centre[0], sy * part.centre[1]), part.radii)
    return Polygon(part.role, tuple((sx * x, sy * y) for x, y in part.corners))


def pair(*parts: Part, across: Literal["x", "y"] = "x") -> list[Part]:
    """Every part together with its mirror image."""
    return [twin for part in parts for twin in (part, mirrored(part, across=across))]


def wheel(x: float, y: float, radius: float) -> list[Part]:
    """A dark tyre around a light hub."""
    return [disc(DARK, x, y, radius), disc(LIGHT, x, y, 0.5 * radius)]


def eye(x: float, y: float, radius: float) -> list[Part]:
    """A dark pupil in a light eye."""
    return [disc(LIGHT, x, y, radius), disc(DARK, x, y, 0.6 * radius)]


def airplane() -> list[Part]:
    """Seen from above, nose to the right."""
    return [
        *pair(
            poly(ACCENT, (-0.62, 0.0), (-0.86, -0.42), (-1.0, -0.42), (-0.9, 0.0)),
            poly(BODY, (0.36, -0.05), (-0.34, -0.98), (-0.6, -0.98), (-0.2, -0.05)),
            disc(DARK, 0.12, -0.42, 0.12, 0.09),
            disc(LIGHT, -0.1, -0.42, 0.12, 0.09),
            across="y",
        ),
        disc(BODY, 0.0, 0.0, 1.02, 0.17),
        disc(DARK, 0.72, 0.0, 0.12, 0.1),
        box(LIGHT, -0.4, -0.05, 0.4, 0.05),
    ]


def automobile() -> list[Part]:
    """Seen from the side: a low body, a cabin with two windows, two wheels."""
    return [
        poly(BODY, (-0.68, -0.08), (-0.42, -0.56), (0.24, -0.56), (0.6, -0.08)),
        poly(BODY, (-1.0, 0.3), (-0.98, -0.1), (0.58, -0.12), (0.98, 0.02), (1.0, 0.3)),
        poly(BACKGROUND, (-0.5, -0.1), (-0.34, -0.44), (-0.14, -0.44), (-0.14, -0.1)),
        poly(BACKGROUND, (0.0, -0.1), (0.0, -0.44), (0.18, -0.44), (0.42, -0.1)),
        box(ACCENT, -0.98, 0.08, 0.98, 0.2),
        disc(LIGHT, 0.9, 0.06, 0.1),
        *wheel(-0.54, 0.32, 0.28),
        *wheel(0.56, 0.32, 0.28),
    ]


def bird() -> list[Part]:
    """Standing, seen from the side, beak to the right."""
    return [
        bar(DARK, (-0.02, 0.4), (-0.06, 0.95), 0.09),
        bar(DARK, (0.2, 0.4), (0.2, 0.95), 0.09),
        poly(BODY, (-0.3, -0.1), (-1.0, -0.36), (-0.98, -0.08), (-0.3, 0.3)),
        disc(BODY, 0.02, 0.1, 0.54, 0.4),
        disc(BODY, 0.46, -0.42, 0.34, 0.33),
        poly(ACCENT, (0.7, -0.6), (1.08, -0.36), (0.7, -0.24)),
        disc(ACCENT, -0.12, 0.06, 0.36, 0.2),
        *eye(0.52, -0.48, 0.16),
    ]


def cat() -> list[Part]:
    """A face: pointed ears, slit pupils, whiskers."""
    return [
        *pair(
            poly(BODY, (-0.84, -0.98), (-0.12, -0.46), (-0.8, 0.1)),
            poly(ACCENT, (-0.72, -0.74), (-0.32, -0.44), (-0.66, -0.16)),
        ),
        disc(BODY, 0.0, 0.16, 0.8, 0.68),
        *pair(
            disc(LIGHT, -0.34, 0.04, 0.22, 0.18),
            disc(DARK, -0.34, 0.04, 0.1, 0.18),
            bar(DARK, (-0.3, 0.46), (-1.0, 0.34), 0.06),
            bar(DARK, (-0.3, 0.56), (-1.0, 0.68), 0.06),
        ),
        poly(LIGHT, (-0.16, 0.32), (0.16, 0.32), (0.0, 0.54)),
    ]


def deer() -> list[Part]:
    """A narrow face under branching antlers."""
    return [
        *pair(
            bar(BODY, (-0.14, -0.3), (-0.42, -0.62), 0.14),
            bar(BODY, (-0.4, -0.56), (-0.56, -1.04), 0.13),
            bar(BODY, (-0.42, -0.62), (-0.94, -0.74), 0.13),
            bar(BODY, (-0.3, -0.48), (-0.2, -0.96), 0.12),
            disc(ACCENT, -0.54, -0.16, 0.3, 0.14),
        ),
        disc(BODY, 0.0, -0.06, 0.36, 0.34),
        poly(BODY, (-0.35, 0.0), (0.35, 0.0), (0.17, 0.84), (-0.17, 0.84)),
        disc(LIGHT, 0.0, 0.8, 0.22, 0.2),
        disc(DARK, 0.0, 0.72, 0.18, 0.12),
        *pair(disc(DARK, -0.2, 0.06, 0.09, 0.11)),
    ]


def dog() -> list[Part]:
    """A face: hanging ears, a light muzzle, a tongue."""
    return [
        disc(BODY, 0.0, -0.06, 0.64, 0.74),
        *pair(
            disc(ACCENT, -0.68, 0.02, 0.25, 0.62),
            disc(DARK, -0.25, -0.2, 0.1, 0.13),
        ),
        disc(ACCENT, 0.0, 0.76, 0.16, 0.24),
        disc(LIGHT, 0.0, 0.4, 0.36, 0.28),
        disc(DARK, 0.0, 0.24, 0.22, 0.16),
        bar(DARK, (0.0, 0.3), (0.0, 0.64), 0.1),
    ]


def frog() -> list[Part]:
    """Sitting, seen from the front: bulging eyes, a wide mouth, bent legs."""
    return [
        *pair(
            disc(ACCENT, -0.68, 0.5, 0.3, 0.34),
            disc(ACCENT, -0.74, 0.84, 0.28, 0.11),
            disc(BODY, -0.5, -0.44, 0.32),
        ),
        disc(BODY, 0.0, 0.46, 0.58, 0.46),
        disc(BODY, 0.0, -0.06, 0.9, 0.42),
        disc(ACCENT, 0.0, 0.64, 0.36, 0.24),
        *(part for x in (-0.5, 0.5) for part in eye(x, -0.48, 0.23)),
        disc(DARK, 0.0, 0.1, 0.62, 0.08),
    ]


# Where a horse's legs start, and how far each leans.
LEGS: Final[tuple[Point, ...]] = ((-0.58, -0.06), (-0.36, 0.02), (0.16, -0.02), (0.38, 0.06))


def horse() -> list[Part]:
    """Standing, seen from the side, head to the right."""
    return [
        poly(ACCENT, (-0.62, -0.12), (-0.96, 0.06), (-0.94, 0.6), (-0.78, 0.5)),
        *(bar(BODY, (x, 0.1), (x + lean, 0.92), 0.16) for x, lean in LEGS),
        *(bar(LIGHT, (x + lean, 0.72), (x + lean, 0.86), 0.17) for x, lean in LEGS),
        *(bar(DARK, (x + lean, 0.86), (x + lean, 1.0), 0.18) for x, lean in LEGS),
        disc(BODY, -0.12, 0.06, 0.6, 0.3),
        poly(BODY, (0.06, 0.0), (0.4, -0.78), (0.7, -0.64), (0.48, 0.16)),
        poly(BODY, (0.44, -0.86), (0.66, -0.82), (1.04, -0.44), (0.94, -0.28), (0.46, -0.52)),
        poly(BODY, (0.44, -0.78), (0.5, -1.04), (0.6, -0.8)),
        poly(ACCENT, (0.0, -0.14), (0.36, -0.94), (0.46, -0.84), (0.2, -0.06)),
        disc(DARK, 0.66, -0.64, 0.07),
    ]


def ship() -> list[Part]:
    """A steamer seen from the side: hull, two decks, a funnel, a mast."""
    return [
        bar(DARK, (0.5, 0.1), (0.5, -0.8), 0.08),
        box(BODY, -0.32, -0.9, -0.02, -0.3),
        box(LIGHT, -0.32, -0.76, -0.02, -0.6),
        box(DARK, -0.32, -0.92, -0.02, -0.76),
        box(ACCENT, -0.44, -0.4, 0.24, -0.14),
        box(ACCENT, -0.64, -0.16, 0.4, 0.16),
        poly(BODY, (-1.0, 0.14), (1.04, 0.1), (0.72, 0.68), (-0.8, 0.68)),
        poly(ACCENT, (-0.86, 0.5), (0.83, 0.5), (0.72, 0.68), (-0.8, 0.68)),
        *(part for x in (-0.5, -0.12, 0.26) for part in (disc(DARK, x, 0.0, 0.1), disc(LIGHT, x, 0.3, 0.1))),
    ]


def truck() -> list[Part]:
    """A lorry seen from the side: a tall load, a cab with a window, three wheels."""
    return [
        box(ACCENT, -1.0, 0.3, 0.96, 0.44),
        box(BODY, -1.02, -0.72, 0.32, 0.32),
        poly(BODY, (0.4, 0.36), (0.4, -0.4), (0.74, -0.4), (0.98, 0.02), (0.98, 0.36)),
        poly(BACKGROUND, (0.52, 0.0), (0.52, -0.28), (0.68, -0.28), (0.84, 0.0)),
        box(ACCENT, -1.02, -0.3, 0.32, -0.1),
        *wheel(-0.72, 0.46, 0.24),
        *wheel(-0.2, 0.46, 0.24),
        *wheel(0.66, 0.46, 0.24),
    ]


PICTOGRAMS: Final[tuple[list[Part], ...]] = (
    airplane(),
    automobile(),
    bird(),
    cat(),
    deer(),
    dog(),
    frog(),
    horse(),
    ship(),
    truck(),
)


# --- random numbers -----------------------------------------------------------------------------------------


class Source:
    """Random numbers made by hand from PCG64's raw stream."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def raw(self, count: int) -> NDArray[np.uint64]:
        """``count`` raw 64-bit words, uint64 (count,)."""
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64)

    def uniform(self, low: float, high: float, *shape: int) -> Floats:
        """Uniform numbers in [low, high), float64 of ``shape``."""
        # 53 bits fit a float64's significand, so the conversion and the scaling by a power of two are exact.
        unit = (self.raw(math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (low + (high - low) * unit).reshape(shape)

    def sign(self, *shape: int) -> Floats:
        """-1.0 or 1.0 by lot, float64 of ``shape``."""
        return np.where(self.raw(math.prod(shape)) >> np.uint64(63) == 0, -1.0, 1.0).reshape(shape)

    def grain(self, *shape: int) -> Shorts:
        """Triangular noise in [-15, 15], int16 of ``shape``, whose size must divide by eight."""
        # "<u8" fixes the order of the bytes inside a word, whatever the machine's own is.
        data = self.raw(math.prod(shape) // 8).astype("<u8").view(np.uint8)
        return ((data & 15).astype(np.int16) + (data >> 4) - 15).reshape(shape)

    def order(self, count: int) -> NDArray[np.int64]:
        """A random permutation of range(count), int64 (count,)."""
        return np.argsort(self.raw(count), kind="stable").astype(np.int64)


# --- geometry -----------------------------------------------------------------------------------------------


class Pose(NamedTuple):
    """Per image, the affine map from pixel coordinates (origin in the middle) to local ones; float64 (n,).

    local x = xx * x + xy * y + x0, local y = yx * x + yy * y + y0.
    """

    xx: Floats
    xy: Floats
    x0: Floats
    yx: Floats
    yy: Floats
    y0: Floats


class Spans(NamedTuple):
    """Per image and sample row, the first and last covered x, float64 (n, SAMPLES); empty if first > last."""

    first: Floats
    last: Floats


def sample_order() -> NDArray[np.int8]:
    """The index of every sample along an axis, int8 (SAMPLES,): all pixels' first samples, then the second.

    So a pixel's two samples lie in separate halves of the axis, and adding them up adds contiguous blocks.
    """
    pixel = np.arange(SIDE, dtype=np.int8)
    return np.concatenate([2 * pixel, 2 * pixel + 1]).astype(np.int8)


SAMPLE_INDEX: Final = sample_order()
SAMPLE_AT: Final[Floats] = (SAMPLE_INDEX.astype(np.float64) + 0.5) / 2.0 - SIDE / 2


def pose(centre_x: Floats, centre_y: Floats, reach_x: Floats, reach_y: Floats, tilt: Floats) -> Pose:
    """The pose of figures at a centre, with a half-width and half-height in pixels; all (n,) float64.

    ``tilt`` is the tangent of half the angle; a negative ``reach_x`` flips the figure.
    """
    square = tilt * tilt
    cos, sin = (1.0 - square) / (1.0 + square), 2.0 * tilt / (1.0 + square)
    xx, xy = cos / reach_x, sin / reach_x
    yx, yy = -sin / reach_y, cos / reach_y
    return Pose(xx, xy, -(xx * centre_x + xy * centre_y), yx, yy, -(yx * centre_x + yy * centre_y))


def ellipse_spans(at: Pose, part: Ellipse) -> Spans:
    """The spans of an ellipse: in each row, where its quadratic form in x stays below one."""
    (cx, cy), (rx, ry) = part.centre, part.radii
    u, v = (at.xx / rx)[:, None], (at.yx / ry)[:, None]
    u_row = (at.xy[:, None] * SAMPLE_AT + at.x0[:, None] - cx) / rx
    v_row = (at.yy[:, None] * SAMPLE_AT + at.y0[:, None] - cy) / ry
    square = u * u + v * v
    middle = -(u * u_row + v * v_row)
    under = middle * middle - square * (u_row * u_row + v_row * v_row - 1.0)
    half = np.where(under >= 0.0, np.sqrt(np.maximum(under, 0.0)), -1.0)
    return Spans((middle - half) / square, (middle + half) / square)


def polygon_spans(at: Pose, part: Polygon) -> Spans:
    """The spans of a convex polygon: in each row, what all its edges' half-planes share."""
    first = np.full((len(at.x0), SAMPLES), -np.inf)
    last = np.full((len(at.x0), SAMPLES), np.inf)
    x_row = at.xy[:, None] * SAMPLE_AT + at.x0[:, None]
    y_row = at.yy[:, None] * SAMPLE_AT + at.y0[:, None]
    for nx, ny, offset in half_planes(part.corners):
        slope = nx * at.xx + ny * at.yx
        slope = np.where(slope == 0.0, 1e-12, slope)[:, None]  # an edge along the row: no division by zero
        crossing = -(nx * x_row + ny * y_row + offset) / slope
        first = np.where(slope > 0.0, np.maximum(first, crossing), first)
        last = np.where(slope > 0.0, last, np.minimum(last, crossing))
    return Spans(first, last)


def half_planes(corners: Sequence[Point]) -> list[tuple[float, float, float]]:
    """Per edge (nx, ny, offset), with nx * x + ny * y + offset >= 0 inside."""
    area = 0.0
    planes = []
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        area += x0 * y1 - x1 * y0
        planes.append((y0 - y1, x1 - x0, x0 * y1 - x1 * y0))
    turn = 1.0 if area > 0.0 else -1.0
    return [(turn * nx, turn * ny, turn * offset) for nx, ny, offset in planes]


def paint(canvas: Bytes, at: Pose, part: Part) -> None:
    """Write the part's role over the samples it covers; ``canvas`` is (n, SAMPLES, SAMPLES) uint8."""
    spans = ellipse_spans(at, part) if isinstance(part, Ellipse) else polygon_spans(at, part)
    first = np.clip(np.ceil((spans.first + SIDE / 2) * 2.0 - 0.5), 0, SAMPLES).astype(np.int8)
    last = np.clip(np.floor((spans.last + SIDE / 2) * 2.0 - 0.5), -1, SAMPLES - 1).astype(np.int8)
    covered = first[:, :, None] <= SAMPLE_INDEX
    covered &= last[:, :, None] >= SAMPLE_INDEX
    np.copyto(canvas, np.uint8(part.role), where=covered)


# --- images -------------------------------------------------------------------------------------------------


def figure_pose(source: Source, count: int) -> Pose:
    """A random place, size, stretch, flip and small tilt for ``count`` figures."""
    scale = source.uniform(10.5, 14.0, count)
    stretch = source.uniform(0.88, 1.12, count)
    return pose(
        source.uniform(-4.0, 4.0, count),
        source.uniform(-4.0, 4.0, count),
        source.sign(count) * scale * stretch,
        scale / stretch,
        source.uniform(-0.12, 0.12, count),
    )


def blob_pose(source: Source, count: int) -> Pose:
    """The unit disc turned into ``count`` small blobs or, where one radius is small, short lines."""
    return pose(
        source.uniform(-16.0, 16.0, count),
        source.uniform(-16.0, 16.0, count),
        source.uniform(1.0, 4.5, count),
        source.uniform(0.5, 1.4, count),
        source.uniform(-1.0, 1.0, count),
    )


# How far a role's channels may depart from its level.
TINT: Final[Floats] = np.array([20.0, 20.0, 26.0, 3.0, 3.0, 26.0, 26.0])


def colours(source: Source, count: int) -> Shorts:
    """A palette per image, in bytes' range: int16 (ROLES, count, 3)."""
    # The figure is lighter than its background, or darker.  Both keep to the lower half of the range: the
    # brightness common to all images makes plain gradient descent unstable, so there is little of it.
    polarity = source.sign(count)
    contrast = polarity * source.uniform(62.0, 86.0, count)
    middle = source.uniform(50.0, 66.0, count)
    levels = np.empty((ROLES, count))
    levels[BACKGROUND] = middle - 0.5 * contrast
    levels[BODY] = middle + 0.5 * contrast
    levels[ACCENT] = middle + source.uniform(-0.1, 0.15, count) * contrast
    levels[DARK] = source.uniform(0.0, 10.0, count)
    levels[LIGHT] = source.uniform(225.0, 250.0, count)
    levels[CLUTTER_A] = source.uniform(20.0, 110.0, count)
    levels[CLUTTER_B] = source.uniform(20.0, 110.0, count)
    tints = source.uniform(-1.0, 1.0, ROLES, count, 3) * TINT[:, None, None]
    return np.clip(np.rint(levels[:, :, None] + tints), 0, 255).astype(np.int16)


def gradient(source: Source, count: int) -> Shorts:
    """How far the background departs from its colour, int16 (count, 3, SIDE, SIDE)."""
    at = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    along_x = source.uniform(-20.0, 20.0, count, 3, 1, 1) * at
    along_y = source.uniform(-20.0, 20.0, count, 3, 1, 1) * at[:, None]
    return np.rint(along_x + along_y).astype(np.int16)


def develop(canvas: Bytes, palette: Shorts, slope: Shorts) -> Shorts:
    """Four times the colour of every pixel, int16 (n, 3, SIDE, SIDE), from the roles of its four samples."""
    pixels = np.zeros((len(canvas), 3, SIDE, SIDE), dtype=np.int16)
    for role in range(ROLES):
        shown = (canvas == role).view(np.uint8)
        halves = shown[:, :SIDE] + shown[:, SIDE:]
        hits = (halves[:, :, :SIDE] + halves[:, :, SIDE:]).astype(np.int16)[:, None]
        colour = palette[role][:, :, None, None]
        pixels += hits * (colour + slope if role == BACKGROUND else colour)
    return pixels


def draw_class(source: Source, label: int, count: int) -> Bytes:
    """``count`` images of one class, uint8 (count, SIDE, SIDE, 3)."""
    canvas = np.full((count, SAMPLES, SAMPLES), BACKGROUND, dtype=np.uint8)
    for role in BLOBS:
        paint(canvas, blob_pose(source, count), disc(role, 0.0, 0.0, 1.0))
    at = figure_pose(source, count)
    for part in PICTOGRAMS[label]:
        paint(canvas, at, part)
    pixels = develop(canvas, colours(source, count), gradient(source, count))
    pixels += source.grain(count, 3, SIDE, SIDE) * np.int16(4)
    images: Bytes = np.clip((pixels + 2) >> 2, 0, 255).astype(np.uint8)
    return images.transpose(0, 2, 3, 1)


def draw(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw a split of the data set; the two splits come from different random streams.

    Returns the images, uint8 (N, 32, 32, 3) RGB, and the labels, int64 (N,), in shuffled order and with every
    class equally often.
    """
    count = TRAIN_IMAGES if split == "train" else TEST_IMAGES
    source = Source(SEEDS[split])
    place = source.order(count)
    images = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for start in range(0, count, CHUNK):
        label = start * len(CLASS_NAMES) // count
        chosen = place[start : start + CHUNK]
        images[chosen] = draw_class(source, label, len(chosen))
        labels[chosen] = label
    return images, labels
