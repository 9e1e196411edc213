"""Draws the images of the synthetic dataset, bit for bit the same on every machine.

Every image shows the icon of its class at a random position, size, angle and stretch, in random colors, over a random
gradient, among random clutter and under pixel noise. Whether the icon is lighter or darker than its background is
random, so the mean color of an image carries no information about its class.

The images are reproducible because they are computed only from

* the raw 64-bit stream of PCG64, which NumPy guarantees not to change (it does not for `Generator`'s distributions);
* `+ - * /`, `sqrt`, comparisons and rounding to integers in float64, all of which IEEE 754 defines exactly (`sin` and
  `cos` differ between math libraries, so rotations are built from rational functions);
* integer arithmetic and stable sorting.

Floats are never reduced (`sum`, `mean`, `dot`): NumPy may order the additions differently on different CPUs.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_train.data.synthetic.icons import (
    ACCENT,
    BACKGROUND,
    BODY,
    CLUTTER_A,
    CLUTTER_B,
    DARK,
    ICONS,
    LIGHT,
    ROLES,
    Ellipse,
    Point,
    Polygon,
    Shape,
    disc,
)
from cifarx_train.data.synthetic.rng import Float64Array, Int16Array, PortableGenerator

UInt8Array: TypeAlias = NDArray[np.uint8]

SIDE: Final = 32
SAMPLES: Final = 2 * SIDE  # per axis: every pixel is sampled at 2x2 points

BLOBS: Final = (CLUTTER_A, CLUTTER_B, CLUTTER_A, CLUTTER_B)


class Pose(NamedTuple):
    """The affine map of each image from pixel coordinates (origin in the middle) to local ones, float64 (n,).

    local x = xx * x + xy * y + x0, local y = yx * x + yy * y + y0.
    """

    xx: Float64Array
    xy: Float64Array
    x0: Float64Array
    yx: Float64Array
    yy: Float64Array
    y0: Float64Array


class Spans(NamedTuple):
    """The first and last covered x in each row of samples, float64 (n, SAMPLES); empty where first > last."""

    first: Float64Array
    last: Float64Array


def sample_order() -> NDArray[np.int8]:
    """Return the sample indices along an axis, int8 (SAMPLES,): the first sample of every pixel, then the second.

    The two samples of a pixel then lie in different halves of the axis, so adding them adds contiguous blocks.
    """
    pixel = np.arange(SIDE, dtype=np.int8)
    return np.concatenate([2 * pixel, 2 * pixel + 1]).astype(np.int8)


SAMPLE_INDEX: Final = sample_order()
SAMPLE_POSITION: Final[Float64Array] = (SAMPLE_INDEX.astype(np.float64) + 0.5) / 2.0 - SIDE / 2


def make_pose(
    center_x: Float64Array,
    center_y: Float64Array,
    half_width: Float64Array,
    half_height: Float64Array,
    tilt: Float64Array,
) -> Pose:
    """Return the pose of icons with a given center and size in pixels; all arguments are float64 (n,).

    Args:
        center_x: the x coordinate of the center.
        center_y: the y coordinate of the center.
        half_width: half of the width; a negative value mirrors the icon.
        half_height: half of the height.
        tilt: the tangent of half the rotation angle.
    """
    square = tilt * tilt
    cos, sin = (1.0 - square) / (1.0 + square), 2.0 * tilt / (1.0 + square)
    xx, xy = cos / half_width, sin / half_width
    yx, yy = -sin / half_height, cos / half_height
    return Pose(xx, xy, -(xx * center_x + xy * center_y), yx, yy, -(yx * center_x + yy * center_y))


def ellipse_spans(pose: Pose, shape: Ellipse) -> Spans:
    """Return the spans of an ellipse: the part of each row where its quadratic form in x is below one."""
    (cx, cy), (rx, ry) = shape.center, shape.radii
    u, v = (pose.xx / rx)[:, None], (pose.yx / ry)[:, None]
    u_row = (pose.xy[:, None] * SAMPLE_POSITION + pose.x0[:, None] - cx) / rx
    v_row = (pose.yy[:, None] * SAMPLE_POSITION + pose.y0[:, None] - cy) / ry
    square = u * u + v * v
    middle = -(u * u_row + v * v_row)
    discriminant = middle * middle - square * (u_row * u_row + v_row * v_row - 1.0)
    half = np.where(discriminant >= 0.0, np.sqrt(np.maximum(discriminant, 0.0)), -1.0)
    return Spans((middle - half) / square, (middle + half) / square)


def polygon_spans(pose: Pose, shape: Polygon) -> Spans:
    """Return the spans of a convex polygon: the part of each row that lies in the half-planes of all its edges."""
    first = np.full((len(pose.x0), SAMPLES), -np.inf)
    last = np.full((len(pose.x0), SAMPLES), np.inf)
    x_row = pose.xy[:, None] * SAMPLE_POSITION + pose.x0[:, None]
    y_row = pose.yy[:, None] * SAMPLE_POSITION + pose.y0[:, None]
    for nx, ny, offset in half_planes(shape.corners):
        slope = nx * pose.xx + ny * pose.yx
        slope = np.where(slope == 0.0, 1e-12, slope)[:, None]  # avoids 0 / 0 for an edge along the row
        crossing = -(nx * x_row + ny * y_row + offset) / slope
        first = np.where(slope > 0.0, np.maximum(first, crossing), first)
        last = np.where(slope > 0.0, last, np.minimum(last, crossing))
    return Spans(first, last)


def half_planes(corners: Sequence[Point]) -> list[tuple[float, float, float]]:
    """Return (nx, ny, offset) for each edge of a polygon, with nx * x + ny * y + offset >= 0 inside."""
    area = 0.0
    planes = []
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        area += x0 * y1 - x1 * y0
        planes.append((y0 - y1, x1 - x0, x0 * y1 - x1 * y0))
    turn = 1.0 if area > 0.0 else -1.0
    return [(turn * nx, turn * ny, turn * offset) for nx, ny, offset in planes]


def paint(canvas: UInt8Array, pose: Pose, shape: Shape) -> None:
    """Write the role of a shape into the samples that it covers, in place; `canvas` is uint8 (n, SAMPLES, SAMPLES)."""
    spans = ellipse_spans(pose, shape) if isinstance(shape, Ellipse) else polygon_spans(pose, shape)
    first = np.clip(np.ceil((spans.first + SIDE / 2) * 2.0 - 0.5), 0, SAMPLES).astype(np.int8)
    last = np.clip(np.floor((spans.last + SIDE / 2) * 2.0 - 0.5), -1, SAMPLES - 1).astype(np.int8)
    covered = first[:, :, None] <= SAMPLE_INDEX
    covered &= last[:, :, None] >= SAMPLE_INDEX
    np.copyto(canvas, np.uint8(shape.role), where=covered)


def random_icon_pose(generator: PortableGenerator, count: int) -> Pose:
    """Return a random position, size, stretch, flip and small rotation for `count` icons."""
    scale = generator.uniform(10.5, 14.0, count)
    stretch = generator.uniform(0.88, 1.12, count)
    return make_pose(
        generator.uniform(-4.0, 4.0, count),
        generator.uniform(-4.0, 4.0, count),
        generator.signs(count) * scale * stretch,
        scale / stretch,
        generator.uniform(-0.12, 0.12, count),
    )


def random_blob_pose(generator: PortableGenerator, count: int) -> Pose:
    """Return poses that turn the unit disc into `count` small blobs, or short lines where one radius is small."""
    return make_pose(
        generator.uniform(-16.0, 16.0, count),
        generator.uniform(-16.0, 16.0, count),
        generator.uniform(1.0, 4.5, count),
        generator.uniform(0.5, 1.4, count),
        generator.uniform(-1.0, 1.0, count),
    )


# The largest difference between the channels of a role and its level.
TINT: Final[Float64Array] = np.array([20.0, 20.0, 26.0, 3.0, 3.0, 26.0, 26.0])


def random_palettes(generator: PortableGenerator, count: int) -> Int16Array:
    """Return a palette per image, int16 (ROLES, count, 3), with values in [0, 255]."""
    # The icon is lighter or darker than its background. Both stay in the lower half of the range, because brightness
    # that all images have in common makes plain gradient descent unstable.
    polarity = generator.signs(count)
    contrast = polarity * generator.uniform(62.0, 86.0, count)
    middle = generator.uniform(50.0, 66.0, count)
    levels = np.empty((ROLES, count))
    levels[BACKGROUND] = middle - 0.5 * contrast
    levels[BODY] = middle + 0.5 * contrast
    levels[ACCENT] = middle + generator.uniform(-0.1, 0.15, count) * contrast
    levels[DARK] = generator.uniform(0.0, 10.0, count)
    levels[LIGHT] = generator.uniform(225.0, 250.0, count)
    levels[CLUTTER_A] = generator.uniform(20.0, 110.0, count)
    levels[CLUTTER_B] = generator.uniform(20.0, 110.0, count)
    tints = generator.uniform(-1.0, 1.0, ROLES, count, 3) * TINT[:, None, None]
    return np.clip(np.rint(levels[:, :, None] + tints), 0, 255).astype(np.int16)


def random_gradients(generator: PortableGenerator, count: int) -> Int16Array:
    """Return what to add to the background color of each pixel, int16 (count, 3, SIDE, SIDE)."""
    offset = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    along_x = generator.uniform(-20.0, 20.0, count, 3, 1, 1) * offset
    along_y = generator.uniform(-20.0, 20.0, count, 3, 1, 1) * offset[:, None]
    return np.rint(along_x + along_y).astype(np.int16)


def resolve_pixels(canvas: UInt8Array, palettes: Int16Array, gradients: Int16Array) -> Int16Array:
    """Return four times the color of every pixel, int16 (n, 3, SIDE, SIDE): the sum over its four samples."""
    pixels = np.zeros((len(canvas), 3, SIDE, SIDE), dtype=np.int16)
    for role in range(ROLES):
        covered = (canvas == role).view(np.uint8)
        rows = covered[:, :SIDE] + covered[:, SIDE:]
        samples = (rows[:, :, :SIDE] + rows[:, :, SIDE:]).astype(np.int16)[:, None]
        color = palettes[role][:, :, None, None]
        pixels += samples * (color + gradients if role == BACKGROUND else color)
    return pixels


def draw_class(generator: PortableGenerator, label: int, count: int) -> UInt8Array:
    """Draw `count` images of one class, uint8 (count, SIDE, SIDE, 3)."""
    canvas = np.full((count, SAMPLES, SAMPLES), BACKGROUND, dtype=np.uint8)
    for role in BLOBS:
        paint(canvas, random_blob_pose(generator, count), disc(role, 0.0, 0.0, 1.0))
    pose = random_icon_pose(generator, count)
    for shape in ICONS[label]:
        paint(canvas, pose, shape)
    pixels = resolve_pixels(canvas, random_palettes(generator, count), random_gradients(generator, count))
    pixels += generator.noise(count, 3, SIDE, SIDE) * np.int16(4)
    images: UInt8Array = np.clip((pixels + 2) >> 2, 0, 255).astype(np.uint8)
    return images.transpose(0, 2, 3, 1)
