"""Resizing without antialiasing, with the arithmetic of `cifarx_serve.images.interpolate`: all of it in float32."""

from collections.abc import Sequence
from itertools import product
from typing import Final

from onnx import TensorProto

from cifarx_export.formats.onnx.resizing.geometry import AXES
from cifarx_serve.spec import InputSpec

CONSTANTS: Final = {
    "float_zero": "float float_zero = {0}",
    "float_half": "float float_half = {0.5}",
    "float_one": "float float_one = {1}",
    "float_two": "float float_two = {2}",
    "float_white": "float float_white = {255}",
    "near_cubic": "float near_cubic = {1.25}",  # with A = -0.75: A + 2, A + 3; then A, 5 A, 8 A and 4 A
    "near_square": "float near_square = {2.25}",
    "far_cubic": "float far_cubic = {-0.75}",
    "far_square": "float far_square = {-3.75}",
    "far_linear": "float far_linear = {-6}",
    "far_constant": "float far_constant = {-3}",
    "two_before": "int64 two_before = {-1}",
    "spread_over_columns": "int64[2] spread_over_columns = {0, 2}",
    "spread_over_rows": "int64[3] spread_over_rows = {0, 2, 3}",
}

_TAPS: Final = {"bilinear": 2, "bicubic": 4}
"""The number of sources of a pixel along an axis."""


def interpolate(spec: InputSpec) -> str:
    """Return the nodes from `input` to `kept`, uint8 (batch, channels, height_kept, width_kept)."""
    if spec.interpolation == "nearest":
        return (
            "".join(map(_nearest, AXES))
            + """
            rows = Gather <axis = 1> (input, height_table)
            taken = Gather <axis = 2> (rows, width_table)
            kept = Transpose <perm = [0, 3, 1, 2]> (taken)
        """
        )
    taps = _TAPS[spec.interpolation]
    weights = _bilinear if taps == 2 else _bicubic
    return "".join(weights(axis) + _spread(axis, taps) for axis in AXES) + _weighted_sum(taps)


def _positions(axis: str) -> str:
    """Return the nodes that compute the pixels to make, `{axis}_row`, and the scale of an axis."""
    return f"""
        {axis}_row_first = Cast <to = {TensorProto.FLOAT}> ({axis}_first)
        {axis}_row_last = Cast <to = {TensorProto.FLOAT}> ({axis}_last)
        {axis}_row = Range ({axis}_row_first, {axis}_row_last, float_one)
        {axis}_source = Cast <to = {TensorProto.FLOAT}> ({axis}_pixels)
        {axis}_target = Cast <to = {TensorProto.FLOAT}> ({axis}_wanted)
        {axis}_scale = Div ({axis}_source, {axis}_target)
        {axis}_end = Sub ({axis}_pixels, one_pixel)
    """


def _nearest(axis: str) -> str:
    return f"""
        {_positions(axis)}
        {axis}_places = Mul ({axis}_row, {axis}_scale)
        {axis}_whole_places = Cast <to = {TensorProto.INT64}> ({axis}_places)
        {axis}_table = Min ({axis}_whole_places, {axis}_end)
    """


def _centers(axis: str) -> str:
    """Return the nodes that compute where the center of each pixel is in the source."""
    return f"""
        {_positions(axis)}
        {axis}_middles = Add ({axis}_row, float_half)
        {axis}_scaled = Mul ({axis}_scale, {axis}_middles)
        {axis}_centers = Sub ({axis}_scaled, float_half)
    """


def _fraction(axis: str, centers: str, floor: str) -> str:
    """Return the nodes that split a position into the index of the source below it and the rest."""
    return f"""
        {axis}_floor = Cast <to = {TensorProto.INT64}> ({floor})
        {axis}_lower = Min ({axis}_floor, {axis}_end)
        {axis}_lower_exact = Cast <to = {TensorProto.FLOAT}> ({axis}_lower)
        {axis}_rest = Sub ({centers}, {axis}_lower_exact)
        {axis}_fraction = Clip ({axis}_rest, float_zero, float_one)
    """


def _bilinear(axis: str) -> str:
    """Return the nodes that compute the index and weight of each of the two sources of each pixel."""
    return f"""
        {_centers(axis)}
        {axis}_inside = Max ({axis}_centers, float_zero)
        {_fraction(axis, f"{axis}_inside", f"{axis}_inside")}
        {axis}_above = Add ({axis}_lower, one_pixel)
        {axis}_upper = Min ({axis}_above, {axis}_end)
        {axis}_index_0 = Identity ({axis}_lower)
        {axis}_index_1 = Identity ({axis}_upper)
        {axis}_weight_0 = Sub (float_one, {axis}_fraction)
        {axis}_weight_1 = Identity ({axis}_fraction)
    """


def _bicubic(axis: str) -> str:
    """Return the nodes that compute the index and weight of each of the four sources of each pixel."""
    indices = "".join(
        f"""
            {axis}_place_{tap} = Add ({axis}_lower, {offset})
            {axis}_not_before_{tap} = Max ({axis}_place_{tap}, no_pixels)
            {axis}_index_{tap} = Min ({axis}_not_before_{tap}, {axis}_end)
        """
        for tap, offset in enumerate(("two_before", "no_pixels", "one_pixel", "two_pixels"))
    )
    return f"""
        {_centers(axis)}
        {axis}_floored = Floor ({axis}_centers)
        {_fraction(axis, f"{axis}_centers", f"{axis}_floored")}
        {axis}_distance_0 = Add ({axis}_fraction, float_one)
        {axis}_distance_1 = Identity ({axis}_fraction)
        {axis}_distance_2 = Sub (float_one, {axis}_fraction)
        {axis}_distance_3 = Sub (float_two, {axis}_fraction)
        {indices}
        {_polynomial(axis, 0, _FAR)}
        {_polynomial(axis, 1, _NEAR)}
        {_polynomial(axis, 2, _NEAR)}
        {_polynomial(axis, 3, _FAR)}
    """


_NEAR: Final = (
    "Mul (near_cubic, {distance})",
    "Sub ({before}, near_square)",
    "Mul ({before}, {distance})",
    "Mul ({before}, {distance})",
    "Add ({before}, float_one)",
)
"""The weight of a source at a distance of up to one pixel, step by step."""

_FAR: Final = (
    "Mul (far_cubic, {distance})",
    "Sub ({before}, far_square)",
    "Mul ({before}, {distance})",
    "Add ({before}, far_linear)",
    "Mul ({before}, {distance})",
    "Sub ({before}, far_constant)",
)
"""The weight of a source at a distance of one to two pixels, step by step."""


def _polynomial(axis: str, tap: int, steps: Sequence[str]) -> str:
    """Return the nodes from `{axis}_distance_{tap}` to `{axis}_weight_{tap}`."""
    distance = f"{axis}_distance_{tap}"
    names = [distance, *(f"{axis}_step_{tap}_{step}" for step in range(1, len(steps))), f"{axis}_weight_{tap}"]
    return "\n".join(
        f"{after} = {step.format(before=before, distance=distance)}"
        for step, before, after in zip(steps, names, names[1:], strict=False)
    )


def _spread(axis: str, taps: int) -> str:
    """Return the nodes that give the weights the shape of an image (batch, height, width, channels)."""
    axes = "spread_over_rows" if axis == "height" else "spread_over_columns"
    return "".join(f"{axis}_factor_{tap} = Unsqueeze ({axis}_weight_{tap}, {axes})\n" for tap in range(taps))


def _weighted_sum(taps: int) -> str:
    """Return the nodes that sum the sources, each column of a row first, in the order of `interpolate`."""
    nodes = [f"rows_{row} = Gather <axis = 1> (input, height_index_{row})" for row in range(taps)]
    for row, column in product(range(taps), range(taps)):
        here = f"{row}_{column}"
        nodes += [
            f"source_{here} = Gather <axis = 2> (rows_{row}, width_index_{column})",
            f"values_{here} = Cast <to = {TensorProto.FLOAT}> (source_{here})",
            f"part_{here} = Mul (values_{here}, width_factor_{column})",
        ]
    for row in range(taps):
        nodes += _running_sum(f"line_{row}", [f"part_{row}_{column}" for column in range(taps)])
        nodes.append(f"weighted_{row} = Mul (line_{row}, height_factor_{row})")
    nodes += _running_sum("total", [f"weighted_{row}" for row in range(taps)])
    return (
        "\n".join(nodes)
        + f"""
        rounded = Round (total)
        clipped = Clip (rounded, float_zero, float_white)
        levels_of_gray = Cast <to = {TensorProto.UINT8}> (clipped)
        kept = Transpose <perm = [0, 3, 1, 2]> (levels_of_gray)
    """
    )


def _running_sum(result: str, terms: list[str]) -> list[str]:
    """Return the nodes that add the terms one after the other."""
    sums = [terms[0], *(f"{result}_{count}" for count in range(2, len(terms))), result]
    return [f"{after} = Add ({before}, {term})" for before, after, term in zip(sums, sums[1:], terms[1:], strict=False)]
