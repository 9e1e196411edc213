"""Resizing with antialiasing, with the arithmetic of Pillow.

Pillow resizes an 8-bit image in two passes, one per axis. A pass computes its weights from the filter in double
precision, rounds them to 22 bits, sums in integers and rounds to 8 bits (`precompute_coeffs`, `normalize_coeffs_8bpc`
and `ImagingResampleHorizontal_8bpc` in `Resample.c` of Pillow 13). The nodes in this module do the same. The weights of
a pass are a matrix of integers, split into bytes, and `MatMulInteger` multiplies the image by it without rounding.

On ONNX Runtime's CPU provider, no pixel of any tested image differs from Pillow 13 (docs/embedded-preprocessing.md has
the results and the command). Before Pillow 13 the horizontal pass came first, except for very tall images in some
versions. Those versions resize images that lose much more height than width differently.

The ONNX operator `Resize` with `antialias=1` is not used. It computes its weights in single precision, which changes
0.1 % of the values of random noise by one gray level, and some by two. It has no Lanczos filter, its CUDA kernel
ignores `cubic_coeff_a` (microsoft/onnxruntime issue 25264), and TensorRT does not support it.
"""

from typing import Final

from onnx import TensorProto

from cifarx_export.formats.onnx.resizing.geometry import AXES, crop, is_cropped, is_padded
from cifarx_serve.spec import InputSpec

CONSTANTS: Final = {
    "zero": "double zero = {0}",
    "half": "double half = {0.5}",
    "one": "double one = {1}",
    "one_and_a_half": "double one_and_a_half = {1.5}",
    "two": "double two = {2}",
    "two_and_a_half": "double two_and_a_half = {2.5}",
    "three": "double three = {3}",
    "four": "double four = {4}",
    "five": "double five = {5}",
    "eight": "double eight = {8}",
    "pi": "double pi = {3.141592653589793}",
    "along_rows": "int64[1] along_rows = {0}",
    "along_columns": "int64[1] along_columns = {1}",
    "first_axis": "int64 first_axis = {0}",
    "unit": "double unit = {4194304}",  # 1.0 in 22 bits, Pillow's PRECISION_BITS
    "integer_unit": "int32 integer_unit = {4194304}",
    "half_unit": "int32 half_unit = {2097152}",
    "high_byte": "int32 high_byte = {65536}",
    "middle_byte": "int32 middle_byte = {256}",
    "black": "int32 black = {0}",
    "white": "int32 white = {255}",
    "no_offset": "uint8 no_offset = {0}",
    "high_offset": "uint8 high_offset = {64}",
}

# Each computes `{axis}_shares` from `{axis}_distances`, like Pillow's `bilinear_filter`, `bicubic_filter` and
# `lanczos_filter`.
_FILTERS: Final = {
    "bilinear": """
        {axis}_slopes = Sub (one, {axis}_distances)
        {axis}_shares = Max ({axis}_slopes, zero)
    """,
    "bicubic": """
        {axis}_near_1 = Mul (one_and_a_half, {axis}_distances)
        {axis}_near_2 = Sub ({axis}_near_1, two_and_a_half)
        {axis}_near_3 = Mul ({axis}_near_2, {axis}_distances)
        {axis}_near_4 = Mul ({axis}_near_3, {axis}_distances)
        {axis}_near = Add ({axis}_near_4, one)
        {axis}_far_1 = Sub ({axis}_distances, five)
        {axis}_far_2 = Mul ({axis}_far_1, {axis}_distances)
        {axis}_far_3 = Add ({axis}_far_2, eight)
        {axis}_far_4 = Mul ({axis}_far_3, {axis}_distances)
        {axis}_far_5 = Sub (four, {axis}_far_4)
        {axis}_far = Mul ({axis}_far_5, half)
        {axis}_is_near = Less ({axis}_distances, one)
        {axis}_is_far = Less ({axis}_distances, two)
        {axis}_not_near = Where ({axis}_is_far, {axis}_far, zero)
        {axis}_shares = Where ({axis}_is_near, {axis}_near, {axis}_not_near)
    """,
    "lanczos": """
        {axis}_angles = Mul ({axis}_distances, pi)
        {axis}_sines = Sin ({axis}_angles)
        {axis}_sinc = Div ({axis}_sines, {axis}_angles)
        {axis}_thirds = Div ({axis}_distances, three)
        {axis}_slow_angles = Mul ({axis}_thirds, pi)
        {axis}_slow_sines = Sin ({axis}_slow_angles)
        {axis}_slow_sinc = Div ({axis}_slow_sines, {axis}_slow_angles)
        {axis}_product = Mul ({axis}_sinc, {axis}_slow_sinc)
        {axis}_is_inside = Less ({axis}_distances, three)
        {axis}_truncated = Where ({axis}_is_inside, {axis}_product, zero)
        {axis}_is_centre = Equal ({axis}_distances, zero)
        {axis}_shares = Where ({axis}_is_centre, one, {axis}_truncated)
    """,
}


def resample(spec: InputSpec) -> str:
    """Return the nodes from `input` to `kept`, uint8 (batch, channels, height_kept, width_kept)."""
    if spec.interpolation == "nearest":
        return _nearest(spec)
    return _resample(spec)


def _nearest(spec: InputSpec) -> str:
    """Return the nodes of a nearest-neighbor resize.

    Pillow accumulates its table of positions step by step, with rounding; see `ImagingScaleAffine` in `Geometry.c`.
    """
    tables = [
        f"""
            {_scale(axis)}
            {axis}_indices = Range (zero, {axis}_target, one)
            {axis}_is_start = Equal ({axis}_indices, zero)
            {axis}_steps = Where ({axis}_is_start, half, one)
            {axis}_strides = Mul ({axis}_steps, {axis}_scale)
            {axis}_places = CumSum ({axis}_strides, first_axis)
            {axis}_whole_places = Cast <to = {TensorProto.INT64}> ({axis}_places)
            {_cropped_table(axis, spec)}
        """
        for axis in AXES
    ]
    return (
        "".join(tables)
        + """
            rows = Gather <axis = 1> (input, height_table)
            taken = Gather <axis = 2> (rows, width_table)
            kept = Transpose <perm = [0, 3, 1, 2]> (taken)
        """
    )


def _cropped_table(axis: str, spec: InputSpec) -> str:
    if not is_cropped(spec):
        return f"{axis}_table = Identity ({axis}_whole_places)"
    return f"""
        {axis}_table_first = Unsqueeze ({axis}_first, along_rows)
        {axis}_table_last = Unsqueeze ({axis}_last, along_rows)
        {axis}_table = Slice ({axis}_whole_places, {axis}_table_first, {axis}_table_last)
    """


def _resample(spec: InputSpec) -> str:
    """Return the nodes of two passes in Pillow's order. An image of the right size is not resized.

    Pillow 13 resizes the height first if the height loses more than twice as many pixels as the width
    (`ImagingResampleInner`). A pass that does not change the size changes no value either, so it is not skipped.
    """
    size = "height_kept, width_kept" if is_padded(spec) else f"{spec.height}, {spec.width}"
    result = f"uint8[batch, {spec.channels}, {size}]"
    return f"""
        height_is_right = Equal (height_pixels, height_wanted)
        width_is_right = Equal (width_pixels, width_wanted)
        size_is_right = And (height_is_right, width_is_right)
        kept = If (size_is_right) <
            then_branch = as_it_is () => ({result} same) {{
                same_whole = Transpose <perm = [0, 3, 1, 2]> (input)
                {crop(spec, "same_whole", "same")}
            }},
            else_branch = resampled () => ({result} either) {{
                {_weights("height", spec)}
                {_weights("width", spec)}
                rows_lost = Sub (height_pixels, height_wanted)
                columns_lost = Sub (width_pixels, width_wanted)
                twice_columns_lost = Add (columns_lost, columns_lost)
                bar = Max (twice_columns_lost, no_pixels)
                by_height_first = Greater (rows_lost, bar)
                either = If (by_height_first) <
                    then_branch = by_height () => ({result} vertical) {{
                        vertical_0 = Transpose <perm = [0, 3, 2, 1]> (input)
                        {_pass("height", "vertical_0", "vertical_1")}
                        vertical_2 = Transpose <perm = [0, 1, 3, 2]> (vertical_1)
                        {_pass("width", "vertical_2", "vertical")}
                    }},
                    else_branch = by_width () => ({result} horizontal) {{
                        horizontal_0 = Transpose <perm = [0, 3, 1, 2]> (input)
                        {_pass("width", "horizontal_0", "horizontal_1")}
                        horizontal_2 = Transpose <perm = [0, 1, 3, 2]> (horizontal_1)
                        {_pass("height", "horizontal_2", "horizontal_3")}
                        horizontal = Transpose <perm = [0, 1, 3, 2]> (horizontal_3)
                    }}
                >
            }}
        >
    """


def _scale(axis: str) -> str:
    return f"""
        {axis}_source = Cast <to = {TensorProto.DOUBLE}> ({axis}_pixels)
        {axis}_target = Cast <to = {TensorProto.DOUBLE}> ({axis}_wanted)
        {axis}_scale = Div ({axis}_source, {axis}_target)
    """


def _weights(axis: str, spec: InputSpec) -> str:
    """Return the nodes that compute the weights of the kept pixels of a pass, uint8 (source size, 3 * kept size).

    The three parts are the high, middle and low bytes of 22-bit integers. 1.0 is added to each weight so that none is
    negative; the zero point of the high byte, one of `{axis}_offsets`, subtracts it again.
    """
    return f"""
        {_scale(axis)}
        {axis}_stretch = Max ({axis}_scale, one)
        {axis}_inverse = Div (one, {axis}_stretch)
        {axis}_start = Cast <to = {TensorProto.DOUBLE}> ({axis}_first)
        {axis}_stop = Cast <to = {TensorProto.DOUBLE}> ({axis}_last)
        {axis}_first_middle = Add ({axis}_start, half)
        {axis}_middles = Range ({axis}_first_middle, {axis}_stop, one)
        {axis}_centres = Mul ({axis}_middles, {axis}_scale)
        {axis}_row = Range (zero, {axis}_source, one)
        {axis}_places = Unsqueeze ({axis}_row, along_columns)
        {axis}_from_centres = Sub ({axis}_places, {axis}_centres)
        {axis}_differences = Add ({axis}_from_centres, half)
        {axis}_stretched = Mul ({axis}_differences, {axis}_inverse)
        {axis}_distances = Abs ({axis}_stretched)
        {_FILTERS[spec.interpolation].format(axis=axis)}
        {axis}_sums = ReduceSum ({axis}_shares, along_rows)
        {axis}_weights = Div ({axis}_shares, {axis}_sums)
        {axis}_long = Mul ({axis}_weights, unit)
        {axis}_signs = Sign ({axis}_weights)
        {axis}_halves = Mul ({axis}_signs, half)
        {axis}_away = Add ({axis}_long, {axis}_halves)
        {axis}_integers = Cast <to = {TensorProto.INT32}> ({axis}_away)
        {axis}_positive = Add ({axis}_integers, integer_unit)
        {axis}_high = Div ({axis}_positive, high_byte)
        {axis}_above = Div ({axis}_positive, middle_byte)
        {axis}_middle = Mod ({axis}_above, middle_byte)
        {axis}_low = Mod ({axis}_positive, middle_byte)
        {axis}_joined = Concat <axis = 1> ({axis}_high, {axis}_middle, {axis}_low)
        {axis}_bytes = Cast <to = {TensorProto.UINT8}> ({axis}_joined)
        {axis}_shape = Unsqueeze ({axis}_kept, along_rows)
        {axis}_high_offsets = Expand (high_offset, {axis}_shape)
        {axis}_no_offsets = Expand (no_offset, {axis}_shape)
        {axis}_offsets = Concat <axis = 0> ({axis}_high_offsets, {axis}_no_offsets, {axis}_no_offsets)
    """


def _pass(axis: str, source: str, result: str) -> str:
    """Return the nodes of one pass along the last axis of `source`, rounded and clipped to uint8.

    The division rounds toward zero, whereas Pillow's shift rounds down. They differ only below black.
    """
    return f"""
        {result}_products = MatMulInteger ({source}, {axis}_bytes, no_offset, {axis}_offsets)
        {result}_high, {result}_middle, {result}_low = Split <axis = -1, num_outputs = 3> ({result}_products)
        {result}_high_part = Mul ({result}_high, high_byte)
        {result}_middle_part = Mul ({result}_middle, middle_byte)
        {result}_upper = Add ({result}_high_part, {result}_middle_part)
        {result}_sum = Add ({result}_upper, {result}_low)
        {result}_and_half = Add ({result}_sum, half_unit)
        {result}_levels = Div ({result}_and_half, integer_unit)
        {result}_clipped = Clip ({result}_levels, black, white)
        {result} = Cast <to = {TensorProto.UINT8}> ({result}_clipped)
    """
