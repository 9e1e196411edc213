"""Resizing, scaling and normalization inside an ONNX model, with the results of `cifarx_serve.images.preprocess`."""

import re
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, parser

from cifarx_export.formats.onnx.resizing import geometry, interpolate, pillow
from cifarx_serve.spec import InputSpec

_PREFIX: Final = "preprocessing/"
"""Prefix of every added name. Names from PyTorch's exporter never contain a slash, whatever the modules are called."""

_CONSTANTS: Final = {
    "levels": "float levels = {255}",
    "reversed_channels": "int64[3] reversed_channels = {2, 1, 0}",
}


def embed_preprocessing(model: onnx.ModelProto, spec: InputSpec) -> onnx.ModelProto:
    """Return a copy of the model with the preprocessing in front.

    Args:
        model: a model whose input is `input`, float32 (batch, *spec.shape), of opset 18 or newer.
        spec: how an image is preprocessed.

    Returns:
        A model whose input `input` is RGB or grayscale images, uint8 (batch, height, width, channels), of any size.
    """
    combined = onnx.ModelProto()
    combined.CopyFrom(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    result = f"float[batch, {', '.join(map(str, spec.shape))}] result"
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
    """Return the resize alone, to compare with Pillow: from `input` to `resized`, uint8 (batch, channels, H, W)."""
    output = f"uint8[batch, {spec.channels}, {spec.height}, {spec.width}] resized"
    return _parse(_resize(spec), output, spec, opset, 10)


def _parse(nodes: str, output: str, spec: InputSpec, opset: int, ir_version: int) -> onnx.ModelProto:
    """Parse nodes in the textual syntax of ONNX.

    A graph gets only the constants that it uses, because ONNX Runtime warns about unused ones.
    """
    constants = (
        geometry.CONSTANTS
        | geometry.size_constants(spec)
        | pillow.CONSTANTS
        | interpolate.CONSTANTS
        | _CONSTANTS
        | _scale_constants(spec)
    )
    used = set(re.findall(r"\w+", nodes))
    return parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>'
        f"preprocessing (uint8[batch, height, width, {spec.channels}] input) => ({output})"
        f"<{', '.join(text for name, text in constants.items() if name in used)}>"
        f"{{ {nodes} }}"
    )


def _resize(spec: InputSpec) -> str:
    """Return the nodes from `input` to `resized`, uint8 (batch, channels, height, width), of which the color is RGB."""
    resample = pillow.resample(spec) if spec.antialias else interpolate.interpolate(spec)
    return geometry.sizes(spec) + resample + geometry.pad(spec, "kept", "resized") + "\n"


def _scale(spec: InputSpec) -> str:
    """Return the nodes from `resized` to `result`, the operations of `cifarx_serve.images.preprocess.normalize`."""
    steps = []
    if spec.color == "BGR":
        steps.append("Gather <axis = 1> ({}, reversed_channels)")
    if spec.layout == "NHWC":
        steps.append("Transpose <perm = [0, 2, 3, 1]> ({})")
    steps += [f"Cast <to = {TensorProto.FLOAT}> ({{}})", "Div ({}, levels)"]
    if spec.value_range != (0.0, 1.0):
        steps += ["Mul ({}, range)", "Add ({}, low)"]
    if any(spec.mean) or any(std != 1.0 for std in spec.std):
        steps += ["Sub ({}, mean)", "Div ({}, std)"]
    names = ["resized", *(f"scaled_{number}" for number in range(1, len(steps))), "result"]
    return "\n".join(
        f"{after} = {step.format(before)}" for step, before, after in zip(steps, names, names[1:], strict=False)
    )


def _scale_constants(spec: InputSpec) -> dict[str, str]:
    """Return the constants of the normalization, which are in single precision, as in `normalize`."""
    low, high = spec.value_range
    channel_shape = f"[1, {spec.channels}, 1, 1]" if spec.layout == "NCHW" else f"[{spec.channels}]"
    return {
        "range": _float_constant("range", "", [high - low]),
        "low": _float_constant("low", "", [low]),
        "mean": _float_constant("mean", channel_shape, spec.mean),
        "std": _float_constant("std", channel_shape, spec.std),
    }


def _float_constant(name: str, shape: str, values: Sequence[float]) -> str:
    return f"float{shape} {name} = {{{', '.join(repr(float(np.float32(value))) for value in values)}}}"
