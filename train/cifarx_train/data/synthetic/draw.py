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

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_train.data.dataset import Split
from cifarx_train.data.synthetic.pictograms import (
    ACCENT,
    BACKGROUND,
    BODY,
    CLUTTER_A,
    CLUTTER_B,
    DARK,
    LIGHT,
    PICTOGRAMS,
    ROLES,
    Ellipse,
    Part,
    Point,
    Polygon,
    disc,
)
from cifarx_train.data.synthetic.rng import Floats, Shorts, Source

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

Bytes: TypeAlias = NDArray[np.uint8]

SIDE: Final = 32
SAMPLES: Final = 2 * SIDE  # per axis: every pixel is sampled 2 x 2
# Images drawn at once, all of one class: few enough for the masks to stay in the cache, and a divisor of the
# number of images per class.
CHUNK: Final = 200
SEEDS: Final[dict[Split, int]] = {"train": 20_090_408, "test": 19_980_731}

BLOBS: Final = (CLUTTER_A, CLUTTER_B, CLUTTER_A, CLUTTER_B)


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
