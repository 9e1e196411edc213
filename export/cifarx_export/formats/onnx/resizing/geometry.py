"""Sizes and positions: to what size an image is resized, what part of it is kept, and how the rest is padded.

For each axis, the nodes define as int64 scalars:

- `{axis}_pixels`: the size of the image,
- `{axis}_wanted`: the size to which the image is resized,
- `{axis}_first` and `{axis}_last`: the part of the resized image that is kept; the crop is centered,
- `{axis}_kept`: the size of this part, which is below the input size of the network only if the image is padded.

All but the first are constants if they do not depend on the image.
"""

from typing import Final

import numpy as np
from onnx import TensorProto

from cifarx_serve.images.preprocess import crop_start, rgb_fill
from cifarx_serve.spec import InputSpec

AXES: Final = ("height", "width")

CONSTANTS: Final = {
    "one_pixel": "int64 one_pixel = {1}",
    "no_pixels": "int64 no_pixels = {0}",
    "two_pixels": "int64 two_pixels = {2}",
    "to_vector": "int64[1] to_vector = {0}",
    "no_padding": "int64[2] no_padding = {0, 0}",
    "spatial_axes": "int64[2] spatial_axes = {2, 3}",
}


def size_constants(spec: InputSpec) -> dict[str, str]:
    """Return the constants that depend on the spec, by name."""
    shorter = spec.resize_to if isinstance(spec.resize_to, int) else spec.height
    constants = {
        "shorter_wanted": f"int64 shorter_wanted = {{{shorter}}}",
        "final_shape": f"int64[4] final_shape = {{-1, {spec.channels}, {spec.height}, {spec.width}}}",
    }
    for axis, size in zip(AXES, (spec.height, spec.width), strict=True):
        constants[f"{axis}_size"] = f"int64 {axis}_size = {{{size}}}"
        constants[f"{axis}_size_exact"] = f"double {axis}_size_exact = {{{size}}}"
    for channel, fill in enumerate(rgb_fill(spec)):
        constants[f"fill_{channel}"] = f"uint8 fill_{channel} = {{{fill}}}"
    return constants | (_constant_sizes(spec) if spec.resize == "stretch" else {})


def _constant_sizes(spec: InputSpec) -> dict[str, str]:
    """Return the sizes and positions of a resize to a size that does not depend on the image."""
    target = spec.resize_to or (spec.height, spec.width)
    assert isinstance(target, tuple), "the spec allows no number here"
    constants: dict[str, str] = {}
    for axis, wanted, size in zip(AXES, target, (spec.height, spec.width), strict=True):
        kept = min(wanted, size)
        first = max(0, crop_start(wanted, size, spec))
        values = {"wanted": wanted, "first": first, "last": first + kept, "kept": kept}
        constants |= {f"{axis}_{name}": f"int64 {axis}_{name} = {{{value}}}" for name, value in values.items()}
    return constants


def is_cropped(spec: InputSpec) -> bool:
    """Return whether the resized image can be larger than the input of the network."""
    if spec.resize == "stretch":
        return isinstance(spec.resize_to, tuple) and (spec.resize_to[0] > spec.height or spec.resize_to[1] > spec.width)
    return spec.resize == "shorter_side"


def is_padded(spec: InputSpec) -> bool:
    """Return whether the resized image can be smaller than the input of the network."""
    if isinstance(spec.resize_to, tuple):
        return spec.resize_to[0] < spec.height or spec.resize_to[1] < spec.width
    return spec.resize == "letterbox" or (spec.resize_to is not None and spec.resize_to < max(spec.height, spec.width))


def sizes(spec: InputSpec) -> str:
    """Return the nodes that define the sizes and positions that are not constants."""
    nodes = """
        height_of_input = Shape <start = 1, end = 2> (input)
        width_of_input = Shape <start = 2, end = 3> (input)
        height_pixels = Squeeze (height_of_input)
        width_pixels = Squeeze (width_of_input)
    """
    if spec.resize == "shorter_side":
        return nodes + _SHORTER_SIDE + "".join(_kept(axis, spec) for axis in AXES)
    if spec.resize == "letterbox":
        return nodes + _LETTERBOX + "".join(_kept(axis, spec) for axis in AXES)
    return nodes


_SHORTER_SIDE: Final = """
    shorter_pixels = Min (height_pixels, width_pixels)
    longer_pixels = Max (height_pixels, width_pixels)
    longer_scaled = Mul (shorter_wanted, longer_pixels)
    longer_wanted = Div (longer_scaled, shorter_pixels)
    is_tall = LessOrEqual (width_pixels, height_pixels)
    height_wanted = Where (is_tall, longer_wanted, shorter_wanted)
    width_wanted = Where (is_tall, shorter_wanted, longer_wanted)
"""

_LETTERBOX: Final = f"""
    height_exact = Cast <to = {TensorProto.DOUBLE}> (height_pixels)
    width_exact = Cast <to = {TensorProto.DOUBLE}> (width_pixels)
    height_factor = Div (height_size_exact, height_exact)
    width_factor = Div (width_size_exact, width_exact)
    factor = Min (height_factor, width_factor)
    height_fitted = Mul (factor, height_exact)
    width_fitted = Mul (factor, width_exact)
    height_rounded = Round (height_fitted)
    width_rounded = Round (width_fitted)
    height_whole = Cast <to = {TensorProto.INT64}> (height_rounded)
    width_whole = Cast <to = {TensorProto.INT64}> (width_rounded)
    height_wanted = Max (height_whole, one_pixel)
    width_wanted = Max (width_whole, one_pixel)
"""


def _kept(axis: str, spec: InputSpec) -> str:
    """Return the nodes that define the part of the resized image that is kept. ONNX's Round rounds halves to even."""
    rounding = "Floor" if spec.crop_offset == "floor" else "Round"
    return f"""
        {axis}_kept = Min ({axis}_wanted, {axis}_size)
        {axis}_excess = Sub ({axis}_wanted, {axis}_size)
        {axis}_excess_exact = Cast <to = {TensorProto.DOUBLE}> ({axis}_excess)
        {axis}_half_excess = Mul ({axis}_excess_exact, half)
        {axis}_half_rounded = {rounding} ({axis}_half_excess)
        {axis}_half_whole = Cast <to = {TensorProto.INT64}> ({axis}_half_rounded)
        {axis}_first = Max ({axis}_half_whole, no_pixels)
        {axis}_last = Add ({axis}_first, {axis}_kept)
    """


def crop(spec: InputSpec, image: str, result: str) -> str:
    """Return the nodes that take the kept part of an image of the size to which images are resized, NCHW."""
    if not is_cropped(spec):
        return f"{result} = Identity ({image})"
    vectors = "".join(_as_vector(f"{axis}_{end}") for end in ("first", "last") for axis in AXES)
    return f"""
        {vectors}
        firsts = Concat <axis = 0> (height_first_vector, width_first_vector)
        lasts = Concat <axis = 0> (height_last_vector, width_last_vector)
        {result} = Slice ({image}, firsts, lasts, spatial_axes)
    """


def pad(spec: InputSpec, image: str, result: str) -> str:
    """Return the nodes that pad the kept part of an image, NCHW, to the input size of the network."""
    if not is_padded(spec):
        return f"{result} = Identity ({image})"
    nodes = "".join(
        f"""
            {axis}_missing = Sub ({axis}_size, {axis}_kept)
            {axis}_before = Div ({axis}_missing, two_pixels)
            {axis}_after = Sub ({axis}_missing, {axis}_before)
            {_as_vector(f"{axis}_before")}
            {_as_vector(f"{axis}_after")}
        """
        for axis in AXES
    )
    return f"""
        {nodes}
        paddings = Concat <axis = 0> (no_padding, height_before_vector, width_before_vector,
                                      no_padding, height_after_vector, width_after_vector)
        {_pad_channels(spec, image)}
        {result} = Reshape (padded, final_shape)
    """


def _pad_channels(spec: InputSpec, image: str) -> str:
    """Return the nodes that pad all channels with one value, or each channel with its own."""
    if len(np.unique(rgb_fill(spec))) == 1:
        return f"padded = Pad ({image}, paddings, fill_0)"
    return f"""
        plane_0, plane_1, plane_2 = Split <axis = 1, num_outputs = 3> ({image})
        padded_0 = Pad (plane_0, paddings, fill_0)
        padded_1 = Pad (plane_1, paddings, fill_1)
        padded_2 = Pad (plane_2, paddings, fill_2)
        padded = Concat <axis = 1> (padded_0, padded_1, padded_2)
    """


def _as_vector(name: str) -> str:
    return f"{name}_vector = Unsqueeze ({name}, to_vector)\n"
