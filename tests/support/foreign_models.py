"""Classifiers as other programs write them: ONNX and TorchScript files without a spec, with their own names and types.

The networks classify an image by its dominant color. The logits are ten times the mean red, green and blue.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

CLASSES = ("red", "green", "blue")
SIDE = 8


def write_color_folder(folder: Path, images: int = 334, classes: Sequence[str] = CLASSES) -> Path:
    """Write one training image and `images` test images per class: noise, with a dominant color."""
    random = np.random.default_rng(0)
    for index, name in enumerate(classes):
        for split, count in (("train", 4), ("test", images)):
            class_folder = folder / split / name
            class_folder.mkdir(parents=True)
            pixels = random.integers(0, 160, (count, SIDE, SIDE, 3))
            pixels[..., index % 3] += random.integers(30, 96, (count, 1, 1))
            for number, image in enumerate(pixels.astype(np.uint8)):
                Image.fromarray(image).save(class_folder / f"{number:04}.png")
    return folder


def write_onnx(
    path: Path,
    *,
    names: tuple[str, str] = ("pixel_values", "scores"),
    layout: str = "NCHW",
    batch: int | str | None = "n",
    size: int | str | None = SIDE,
    channels: int | str | None = 3,
    data_type: int = TensorProto.FLOAT,
    activation: str | None = None,
    outputs: int = 3,
    output_rank: int = 2,
    extra: str | None = None,
    opset: int = 17,
    metadata: dict[str, str] | None = None,
    reshape: Sequence[int] | None = None,
    external: bool = False,
) -> Path:
    """Write the network as an ONNX file.

    Args:
        path: the file.
        names: names of the input and the output.
        layout: NCHW or NHWC.
        batch, size, channels: the axes of the input; a name or None for one of variable size.
        data_type: type of the input and the output; the output of uint8 images is float.
        activation: operator at the end, or None.
        outputs: the number of values per image.
        output_rank: 1, 2 or 4 axes of the output.
        extra: name of a second output, the mean colors, or None.
        opset: opset version.
        metadata: the metadata of the file.
        reshape: constant shape of the means before the last layer, or None.
        external: whether the weights are in another file, `weights.bin`.
    """
    real = TensorProto.FLOAT16 if data_type == TensorProto.FLOAT16 else TensorProto.FLOAT
    result_type = TensorProto.DOUBLE if data_type == TensorProto.DOUBLE else real
    axes = [channels, size, size] if layout == "NCHW" else [size, size, channels]
    constants = {
        "weights": _weights(
            channels if isinstance(channels, int) else 3, outputs, helper.tensor_dtype_to_np_dtype(real)
        ),
        "levels": np.array(255, np.float32),
        "shape": np.array(reshape or (), np.int64),
        "flat": np.array([-1], np.int64),
        "square": np.array([-1, outputs, 1, 1], np.int64),
    }
    steps = [
        *_input_steps(data_type, layout),
        ("GlobalAveragePool", [], {}),
        ("Flatten", [], {"axis": 1}) if reshape is None else ("Reshape", ["shape"], {}),
        ("MatMul", ["weights"], {}),
        *([(activation, [], {"axis": 1} if activation == "Softmax" else {})] if activation else []),
        *({1: [("Reshape", ["flat"], {})], 4: [("Reshape", ["square"], {})]}.get(output_rank, [])),
        *([("Cast", [], {"to": result_type})] if result_type != real else []),
    ]
    used = {name for _, more, _ in steps for name in more}
    values = [names[0], *(f"value {number}" for number in range(1, len(steps))), names[1]]
    nodes = [
        helper.make_node(operator, [values[number], *more], [values[number + 1]], name=f"node {number}", **attributes)
        for number, (operator, more, attributes) in enumerate(steps)
    ]
    shape = {1: [batch], 2: [batch, outputs], 4: [batch, outputs, 1, 1]}[output_rank]
    results = [helper.make_tensor_value_info(names[1], result_type, shape)]
    if extra:
        position = next(number for number, step in enumerate(steps) if step[0] in ("Flatten", "Reshape"))
        nodes.append(helper.make_node("Identity", [values[position + 1]], [extra]))
        results.append(helper.make_tensor_value_info(extra, real, [batch, 3]))
    graph = helper.make_graph(
        nodes,
        "colors",
        [helper.make_tensor_value_info(names[0], data_type, [batch, *axes])],
        results,
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    for key, value in (metadata or {}).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    if external:
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    else:
        path.write_bytes(model.SerializeToString())
    return path


Step = tuple[str, list[str], dict[str, Any]]
"""An operator, its constant inputs and its attributes."""


def _input_steps(data_type: int, layout: str) -> list[Step]:
    """Return the steps from the input to float images, (N, channels, height, width)."""
    steps: list[Step] = []
    if data_type in (TensorProto.DOUBLE, TensorProto.UINT8):
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
    if data_type == TensorProto.UINT8:
        steps.append(("Div", ["levels"], {}))
    if layout == "NHWC":
        steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    return steps


def _weights(channels: int, outputs: int, dtype: Any) -> Any:
    return np.array([[10], [-10], [0]], dtype) if outputs == 1 else 10 * np.eye(channels, outputs, dtype=dtype)


class Colors(nn.Module):
    """The network in PyTorch.

    Args:
        returns: `logits`, `probabilities`, `tuple` of both, or `dict` of both.
    """

    def __init__(self, returns: str = "logits") -> None:
        super().__init__()
        self.returns = returns

    def forward(self, images: Tensor) -> Any:
        logits = 10 * images.mean((2, 3))
        probabilities = logits.softmax(1)
        match self.returns:
            case "logits":
                return logits
            case "probabilities":
                return probabilities
            case "tuple":
                return logits, probabilities
            case _:
                return {"logits": logits, "probabilities": probabilities}


class FrozenBatch(Colors):
    """Takes one image only."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).reshape(1, 3)  # type: ignore[no-any-return]


def write_torchscript(
    path: Path, module: nn.Module | None = None, batch_size: int = 2, shape: Sequence[int] = (3, SIDE, SIDE)
) -> Path:
    """Write a module as a TorchScript file, traced with a batch of this size and images of this shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has deprecated the format
        traced = torch.jit.trace((module or Colors()).eval(), torch.zeros(batch_size, *shape), strict=False)
        torch.jit.save(traced, str(path))
    return path
