"""Resizing, scaling and normalization inside an ONNX model, with the arithmetic of Pillow.

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

import re
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, parser

from cifarx_serve.spec import InputSpec

_PREFIX: Final = "preprocessing/"
"""Prefix of every added name. Names from PyTorch's exporter never contain a slash, whatever the modules are called."""

# The names of values below are written into the model: changing one changes the bytes of an exported file.

_CONSTANTS: Final = {
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
    "no_pixels": "int64 no_pixels = {0}",
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
    "levels": "float levels = {255}",
}
"""Constants by name. A graph gets only those that it uses, because ONNX Runtime warns about unused ones."""

# Each computes `{axis}_shares` from `{axis}_distances`, like Pillow's `bilinear_filter`, `bicubic_filter` and
# `lanczos_filter`. The names of all values are part of the file: renaming one changes the bytes of an artifact.
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

_SIZES: Final = """
    height_of_input = Shape <start = 1, end = 2> (input)
    width_of_input = Shape <start = 2, end = 3> (input)
    height_pixels = Squeeze (height_of_input)
    width_pixels = Squeeze (width_of_input)
"""


def embed_preprocessing(model: onnx.ModelProto, spec: InputSpec) -> onnx.ModelProto:
    """Return a copy of the model with the preprocessing in front.

    Args:
        model: a model whose input is `input`, float32 (batch, 3, height, width), of opset 18 or newer.
        spec: how an image is preprocessed.

    Returns:
        A model whose input `input` is RGB images, uint8 (batch, height, width, 3), of any height and width.
    """
    combined = onnx.ModelProto()
    combined.CopyFrom(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    result = f"float[batch, 3, {spec.height}, {spec.width}] result"
    preprocessing = _parse(_resize(spec) + _scale(spec), result, spec, opset, model.ir_version).graph
    _rename(preprocessing, lambda name: name if name == "input" else _PREFIX + name)
    _rename(combined.graph, lambda name: f"{_PREFIX}result" if name == "input" else name)
    nodes = [*preprocessing.node, *combined.graph.node]
    del combined.graph.node[:], combined.graph.input[:]
    combined.graph.node.extend(nodes)
    combined.graph.input.extend(preprocessing.input)
    combined.graph.initializer.extend(preprocessing.initializer)
    return combined


def _rename(graph: onnx.GraphProto, new_name: Callable[[str], str]) -> None:
    """Rename every value of a graph and its subgraphs. An empty name stands for an omitted input and is kept."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [name and new_name(name) for name in names]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, new_name)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = new_name(value.name)


def resize_model(spec: InputSpec, opset: int = 18) -> onnx.ModelProto:
    """Return the resize alone, to compare with Pillow: from `input` to `resized`, uint8 (batch, 3, height, width)."""
    return _parse(_resize(spec), f"uint8[batch, 3, {spec.height}, {spec.width}] resized", spec, opset, 10)


def _parse(nodes: str, output: str, spec: InputSpec, opset: int, ir_version: int) -> onnx.ModelProto:
    """Parse nodes in the textual syntax of ONNX, https://github.com/onnx/onnx/blob/main/docs/Syntax.md."""
    constants = _CONSTANTS | _spec_constants(spec)
    used = set(re.findall(r"\w+", nodes))
    return parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>'
        f"preprocessing (uint8[batch, height, width, 3] input) => ({output})"
        f"<{', '.join(text for name, text in constants.items() if name in used)}>"
        f"{{ {nodes} }}"
    )


def _spec_constants(spec: InputSpec) -> dict[str, str]:
    """Return the constants that depend on the input spec, by name.

    Sizes and steps are per axis. The constants of the normalization are in single precision, as in `normalize`.
    """
    low, high = spec.value_range
    constants = {
        "range": _float_constant("range", [high - low]),
        "low": _float_constant("low", [low]),
        "mean": _float_constant("mean", spec.mean),
        "std": _float_constant("std", spec.std),
    }
    for axis, size in (("height", spec.height), ("width", spec.width)):
        constants |= {
            f"{axis}_target": f"double {axis}_target = {{{size}}}",
            f"{axis}_wanted": f"int64 {axis}_wanted = {{{size}}}",
            f"{axis}_steps": f"double[{size}] {axis}_steps = {{{', '.join(['0.5', *['1'] * (size - 1)])}}}",
            f"{axis}_offsets": f"uint8[{3 * size}] {axis}_offsets = {{{', '.join(['64'] * size + ['0'] * 2 * size)}}}",
        }
    return constants


def _float_constant(name: str, values: Sequence[float]) -> str:
    """Return a constant in single precision: one number, or one per channel."""
    shape = "[1, 3, 1, 1]" if len(values) == 3 else ""
    return f"float{shape} {name} = {{{', '.join(repr(float(np.float32(value))) for value in values)}}}"


def _resize(spec: InputSpec) -> str:
    """Return the nodes from `input` to `resized`, uint8 (batch, 3, height, width)."""
    return _SIZES + (_nearest() if spec.interpolation == "nearest" else _resample(spec))


def _nearest() -> str:
    """Return the nodes of a nearest-neighbor resize.

    Pillow accumulates its table of positions step by step, with rounding; see `ImagingScaleAffine` in `Geometry.c`.
    """
    tables = [
        f"""
            {axis}_source = Cast <to = {TensorProto.DOUBLE}> ({axis}_pixels)
            {axis}_scale = Div ({axis}_source, {axis}_target)
            {axis}_strides = Mul ({axis}_steps, {axis}_scale)
            {axis}_places = CumSum ({axis}_strides, first_axis)
            {axis}_table = Cast <to = {TensorProto.INT64}> ({axis}_places)
        """
        for axis in ("height", "width")
    ]
    return (
        "".join(tables)
        + """
            rows = Gather <axis = 1> (input, height_table)
            taken = Gather <axis = 2> (rows, width_table)
            resized = Transpose <perm = [0, 3, 1, 2]> (taken)
        """
    )


def _resample(spec: InputSpec) -> str:
    """Return the nodes of two passes in Pillow's order. An image of the right size is not resized.

    Pillow 13 resizes the height first if the height loses more than twice as many pixels as the width
    (`ImagingResampleInner`). A pass that does not change the size changes no value either, so it is not skipped.
    """
    result = f"uint8[batch, 3, {spec.height}, {spec.width}]"
    return f"""
        height_is_right = Equal (height_pixels, height_wanted)
        width_is_right = Equal (width_pixels, width_wanted)
        size_is_right = And (height_is_right, width_is_right)
        resized = If (size_is_right) <
            then_branch = as_it_is () => ({result} same) {{
                same = Transpose <perm = [0, 3, 1, 2]> (input)
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


def _weights(axis: str, spec: InputSpec) -> str:
    """Return the nodes that compute the weights of a pass, uint8 (source size, 3 * size).

    The three parts are the high, middle and low bytes of 22-bit integers. 1.0 is added to each weight so that none is
    negative; the zero point of the high byte subtracts it again.
    """
    return f"""
        {axis}_source = Cast <to = {TensorProto.DOUBLE}> ({axis}_pixels)
        {axis}_scale = Div ({axis}_source, {axis}_target)
        {axis}_stretch = Max ({axis}_scale, one)
        {axis}_inverse = Div (one, {axis}_stretch)
        {axis}_middles = Range (half, {axis}_target, one)
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


def _scale(spec: InputSpec) -> str:
    """Return the nodes from `resized` to `result`, the operations of `cifarx_serve.images.preprocess.normalize`."""
    steps = ["Div ({}, levels)"]
    if spec.value_range != (0.0, 1.0):
        steps += ["Mul ({}, range)", "Add ({}, low)"]
    if any(spec.mean) or any(std != 1.0 for std in spec.std):
        steps += ["Sub ({}, mean)", "Div ({}, std)"]
    names = [*(f"scaled_{number}" for number in range(len(steps))), "result"]
    nodes = [f"{after} = {step.format(before)}" for step, before, after in zip(steps, names, names[1:], strict=False)]
    return f"scaled_0 = Cast <to = {TensorProto.FLOAT}> (resized)\n" + "\n".join(nodes)
