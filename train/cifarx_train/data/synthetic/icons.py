"""The icons of the synthetic dataset: one per class, each a list of ellipses and convex polygons.

In its local coordinates an icon fills about [-1, 1] x [-1, 1], with x to the right and y downwards. A later shape is
drawn over an earlier one. Icons are constants: `draw` chooses their position, size and colors at random.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Point: TypeAlias = tuple[float, float]

# Color roles. A shape has a role instead of a color: the palette that assigns a color to each role differs per image.
BACKGROUND, BODY, ACCENT, DARK, LIGHT, CLUTTER_A, CLUTTER_B = range(7)
ROLES: Final = 7


@dataclass(frozen=True)
class Ellipse:
    """An axis-aligned ellipse."""

    role: int
    center: Point
    radii: Point


@dataclass(frozen=True)
class Polygon:
    """A convex polygon, with its corners in clockwise or counterclockwise order."""

    role: int
    corners: tuple[Point, ...]


Shape: TypeAlias = Ellipse | Polygon


def disc(role: int, x: float, y: float, rx: float, ry: float | None = None) -> Ellipse:
    """Return an ellipse around (x, y), or a circle if `ry` is None."""
    return Ellipse(role, (x, y), (rx, rx if ry is None else ry))


def poly(role: int, *corners: Point) -> Polygon:
    """Return a convex polygon."""
    return Polygon(role, corners)


def box(role: int, left: float, top: float, right: float, bottom: float) -> Polygon:
    """Return an axis-aligned rectangle."""
    return poly(role, (left, top), (right, top), (right, bottom), (left, bottom))


def bar(role: int, start: Point, end: Point, width: float) -> Polygon:
    """Return a straight line from `start` to `end`, as a polygon."""
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


def mirrored(shape: Shape, *, across: Literal["x", "y"]) -> Shape:
    """Return the shape with its x (or y) coordinates negated."""
    sx, sy = (-1.0, 1.0) if across == "x" else (1.0, -1.0)
    if isinstance(shape, Ellipse):
        return Ellipse(shape.role, (sx * shape.center[0], sy * shape.center[1]), shape.radii)
    return Polygon(shape.role, tuple((sx * x, sy * y) for x, y in shape.corners))


def pair(*shapes: Shape, across: Literal["x", "y"] = "x") -> list[Shape]:
    """Return every shape followed by its mirror image."""
    return [each for shape in shapes for each in (shape, mirrored(shape, across=across))]


def wheel(x: float, y: float, radius: float) -> list[Shape]:
    """Return a dark tire around a light hub."""
    return [disc(DARK, x, y, radius), disc(LIGHT, x, y, 0.5 * radius)]


def eye(x: float, y: float, radius: float) -> list[Shape]:
    """Return a dark pupil in a light eye."""
    return [disc(LIGHT, x, y, radius), disc(DARK, x, y, 0.6 * radius)]


def airplane() -> list[Shape]:
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


def automobile() -> list[Shape]:
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


def bird() -> list[Shape]:
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


def cat() -> list[Shape]:
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


def deer() -> list[Shape]:
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


def dog() -> list[Shape]:
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


def frog() -> list[Shape]:
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
        *(shape for x in (-0.5, 0.5) for shape in eye(x, -0.48, 0.23)),
        disc(DARK, 0.0, 0.1, 0.62, 0.08),
    ]


# The x coordinate of the top of each leg of the horse, and how far the leg leans.
LEGS: Final[tuple[Point, ...]] = ((-0.58, -0.06), (-0.36, 0.02), (0.16, -0.02), (0.38, 0.06))


def horse() -> list[Shape]:
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


def ship() -> list[Shape]:
    """A steamship seen from the side: a hull, two decks, a funnel, a mast."""
    return [
        bar(DARK, (0.5, 0.1), (0.5, -0.8), 0.08),
        box(BODY, -0.32, -0.9, -0.02, -0.3),
        box(LIGHT, -0.32, -0.76, -0.02, -0.6),
        box(DARK, -0.32, -0.92, -0.02, -0.76),
        box(ACCENT, -0.44, -0.4, 0.24, -0.14),
        box(ACCENT, -0.64, -0.16, 0.4, 0.16),
        poly(BODY, (-1.0, 0.14), (1.04, 0.1), (0.72, 0.68), (-0.8, 0.68)),
        poly(ACCENT, (-0.86, 0.5), (0.83, 0.5), (0.72, 0.68), (-0.8, 0.68)),
        *(shape for x in (-0.5, -0.12, 0.26) for shape in (disc(DARK, x, 0.0, 0.1), disc(LIGHT, x, 0.3, 0.1))),
    ]


def truck() -> list[Shape]:
    """Seen from the side: a tall cargo box, a cab with a window, three wheels."""
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


ICONS: Final[tuple[list[Shape], ...]] = (
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
