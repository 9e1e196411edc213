"""A classifier in an ONNX file of another program: any names, layout, types and opset, weights in other files."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from cifarx_export.adoption.class_names import find_class_names
from cifarx_export.adoption.foreign_file import ForeignFile, StatedInput, StatedOutput
from cifarx_export.adoption.onnx_functions import inline_functions
from cifarx_export.adoption.onnx_graph import (
    Interface,
    connect,
    dimensions,
    final_operator,
    free_batch_size,
    graph_inputs,
    uses_float16,
    uses_integers,
)
from cifarx_export.adoption.onnx_weights import load_onnx_model
from cifarx_export.formats.onnx.converter import OnnxArtifact
from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.onnxruntime.model_reader import read_model_info
from cifarx_serve.backends.onnxruntime.session import CPU, create_session
from cifarx_serve.errors import ModelFileError, UsageError, error_message
from cifarx_serve.spec import Activation, InputSpec, Layout, ModelSpec, Precision
from cifarx_train.models.options import SpecOverrides

_INPUT_TYPES: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8)

_DTYPES: Final[dict[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}

_LAYOUTS: Final[tuple[Layout, ...]] = ("NCHW", "NHWC")

_MIN_IR_VERSION: Final = 4
"""From this version on, weights are not inputs."""

_ACTIVATIONS: Final[dict[str, Activation]] = {"Softmax": "softmax", "Sigmoid": "sigmoid"}


class OnnxFile(ForeignFile):
    """An ONNX file without a spec.

    Args:
        path: the file.
        folder: a temporary folder for a copy that contains all weights.

    Raises:
        ModelFileError: the file is damaged, not safe to open, or does not have one image as its only input.
    """

    kind = "onnx"

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._model = inline_functions(load_onnx_model(path), path)
        copied = folder / "original.onnx"
        copied.write_bytes(self._model.SerializeToString())
        try:
            read_model_info(copied)  # refuses what must not be opened
            self._session: Any = create_session(copied, CPU)
        except ModelFileError as error:
            raise ModelFileError(error.problem.replace(str(copied), str(path)), "give another file") from error
        self._input = self._only_input()

    @property
    def precision(self) -> Precision:
        if uses_integers(self._model.graph):
            return "int8"
        return "fp16" if uses_float16(self._model.graph) else "fp32"

    @property
    def batch_size(self) -> int | None:
        return self._dims()[0]

    def describe(self, overrides: SpecOverrides) -> ModelSpec:
        size = self.input_spec(self._stated_input(overrides), overrides)
        return self.complete_spec(size, self._find_output(size, overrides), overrides)

    def open_original(self, spec: ModelSpec) -> Backend:
        return OriginalOnnx(self._session, spec, self._output_name(spec))

    def connected(self, spec: ModelSpec) -> OnnxArtifact:
        return self._connect(copy.deepcopy(self._model), spec, self.batch_size)

    def adopted(self, spec: ModelSpec) -> OnnxArtifact:
        model = copy.deepcopy(self._model)
        if self.batch_size is not None:
            free_batch_size(model, self.batch_size)
        return self._connect(model, spec, None)

    def _connect(self, model: ModelProto, spec: ModelSpec, batch_size: int | None) -> OnnxArtifact:
        data_type = self._input.type.tensor_type.elem_type
        interface = Interface(data_type, self._output_name(spec), spec.output, spec.output_size, batch_size)
        connected = connect(model, interface)
        connected.ir_version = max(connected.ir_version, _MIN_IR_VERSION)
        return OnnxArtifact(connected, {})

    def _only_input(self) -> ValueInfoProto:
        inputs = graph_inputs(self._model.graph)
        if len(inputs) != 1:
            names = ", ".join(info.name for info in inputs)
            raise ModelFileError(f"{self.path} has {len(inputs)} inputs ({names})", "give a classifier of images")
        shape, data_type = dimensions(inputs[0]), inputs[0].type.tensor_type.elem_type
        if shape is None or len(shape) != 4 or data_type not in _INPUT_TYPES:
            found = f"{_type_name(data_type)} ({', '.join(map(_axis, shape or ()))})"
            raise ModelFileError(
                f"the input {inputs[0].name} of {self.path} is {found}",
                "give a classifier of images with four axes, (N, channels, height, width) or (N, height, width, "
                "channels)",
            )
        return inputs[0]

    def _dims(self) -> tuple[int | None, ...]:
        dims = dimensions(self._input)
        assert dims is not None, "checked by _only_input"
        return dims

    def _stated_input(self, overrides: SpecOverrides) -> StatedInput:
        """Return what the shape of the input says. Three channels, or one, are the second axis or the last one."""
        _, *axes = self._dims()
        given: dict[str, Any] = dict(overrides.fields.get("input", {}))
        layout: Layout | None = given.get("layout")
        if layout is None:
            layout = self._layout(axes, given)
        channels, height, width = axes if layout == "NCHW" else (axes[2], axes[0], axes[1])
        if channels not in (1, 3, None):
            raise ModelFileError(f"{self.path} takes images of {channels} channels", "only 1 and 3 are supported")
        pixels = self._input.type.tensor_type.elem_type == TensorProto.UINT8
        return StatedInput(layout, channels, height, width, pixels)

    def _layout(self, axes: Sequence[int | None], given: dict[str, Any]) -> Layout:
        first, last = axes[0] in (1, 3), axes[2] in (1, 3)
        if first != last:
            return "NCHW" if first else "NHWC"
        fitting = [layout for layout in _LAYOUTS if self._runs_as(layout, axes, given)] if None in axes else []
        if len(fitting) == 1:
            return fitting[0]
        shape = ", ".join(map(_axis, self._dims()))
        if not first and None not in (axes[0], axes[2]):
            raise ModelFileError(
                f"the input of {self.path} is ({shape})", "give a classifier of images with 1 or 3 channels"
            )
        if None in axes and "height" not in given:
            raise UsageError(
                f"the input of {self.path} is ({shape}), which does not say the size of its images",
                "state it with --image-size",
            )
        raise UsageError(
            f"the input of {self.path} is ({shape}), which does not say which axis the channels are",
            'state it with layout = "NCHW" or "NHWC" in the input table of --spec FILE',
        )

    def _runs_as(self, layout: Layout, axes: Sequence[int | None], given: dict[str, Any]) -> bool:
        """Return whether the model runs on an image of the stated size in a layout."""
        size, channels = (given.get("height"), given.get("width")), 1 if given.get("color") == "L" else 3
        wanted = (channels, *size) if layout == "NCHW" else (*size, channels)
        if None in size or any(axis not in (None, wanted[number]) for number, axis in enumerate(axes)):
            return False
        try:
            self._run(wanted)
        except ModelFileError:
            return False
        return True

    def _run(self, shape: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """Return all outputs for a black batch of images of a shape."""
        names = [output.name for output in self._session.get_outputs()]
        batch = np.zeros((self.batch_size or 1, *shape), _dtype(self._input))
        try:
            return dict(zip(names, self._session.run(names, {self._input.name: batch}), strict=True))
        except Exception as error:  # the library's exceptions have no common base class
            raise ModelFileError(
                f"{self.path} does not run on {batch.dtype} {batch.shape} ({error_message(error)})",
                "state the size of its images with --image-size"
                if None in self._dims()[1:]
                else "export it again: it does not run with the shape that it states",
            ) from error

    def _find_output(self, size: InputSpec, overrides: SpecOverrides) -> StatedOutput:
        """Run the model, and find the output that returns the classes: the one that is stated, or the only one."""
        found = {name: _values_per_image(value, self.batch_size or 1) for name, value in self._run(size.shape).items()}
        stated = dict(overrides.fields.get("source", {})).get("output")
        if stated is not None and stated not in found:
            raise UsageError(f"{self.path} has no output {stated!r}", f"choose from {', '.join(found)}")
        names = [name for name, values in found.items() if values] if stated is None else [str(stated)]
        if len(names) > 1 and (wanted := overrides.fields.get("class_names")):
            names = [name for name in names if found[name] == len(wanted)] or names
        if len(names) != 1 or not found[names[0]]:
            described = ", ".join(f"{output.name} {tuple(output.shape)}" for output in self._session.get_outputs())
            raise UsageError(
                f"{self.path} has {len(found)} outputs ({described}), of which {len(names)} could be the classes",
                "state the one of shape (N, classes) as output in the source table of --spec FILE",
            )
        last = final_operator(self._model.graph, names[0])
        activation = _activation(last)
        metadata = {entry.key: entry.value for entry in self._model.metadata_props}
        count = found[names[0]]
        assert count is not None, "checked above"
        return StatedOutput(
            names[0] if len(found) > 1 else None, count, activation, find_class_names(metadata, max(count, 2))
        )

    def _output_name(self, spec: ModelSpec) -> str:
        chosen = spec.source.output if spec.source else None
        return self._session.get_outputs()[0].name if chosen is None else str(chosen)


class OriginalOnnx(Backend):
    """Runs an ONNX file as another program would: with its own names, types, shapes and batch size.

    Args:
        session: an `onnxruntime.InferenceSession`.
        spec: the spec, which says how images become its input.
        output: the output that returns the classes.
    """

    name = "onnxruntime"

    def __init__(self, session: Any, spec: ModelSpec, output: str) -> None:
        self.spec = spec
        self.provider = session.get_providers()[0]
        self._session = session
        self._output = output
        (self._input,) = session.get_inputs()
        size = self._input.shape[0]
        self._batch_size = size if isinstance(size, int) else None

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        raise ModelFileError(f"{path} contains no model spec", "adopt it with `cifarx adopt`")

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        size = self._batch_size or len(batch)
        parts = [self._run_fixed(batch[start : start + size], size) for start in range(0, len(batch), size)]
        return np.concatenate(parts).astype(np.float32, copy=False)

    def _run_fixed(self, images: NDArray[Any], size: int) -> NDArray[Any]:
        """Run a batch, which is filled up with its last image to the only size that the file takes."""
        filled = np.concatenate([images, *[images[-1:]] * (size - len(images))])
        if self._input.type == "tensor(uint8)":
            filled = filled.round()
        outputs = self._session.run([self._output], {self._input.name: filled.astype(_DTYPES[self._input.type])})[0]
        values: NDArray[Any] = outputs.reshape(size, -1)[: len(images)]
        return values

    def close(self) -> None:
        self._session = None


def _activation(last: onnx.NodeProto | None) -> Activation | None:
    """Return the activation that a network ends with. A softmax is over the classes, which are the last axis."""
    if last is None or last.domain not in ("", "ai.onnx"):
        return None
    axis = next((attribute.i for attribute in last.attribute if attribute.name == "axis"), -1)
    return _ACTIVATIONS.get(last.op_type) if axis in (-1, 1) else None


def _values_per_image(output: NDArray[Any], batch_size: int) -> int | None:
    """Return the number of values per image of an output (N, values), with or without axes of size 1; or None."""
    shape = output.shape
    if not np.issubdtype(output.dtype, np.floating) or not shape or shape[0] != batch_size:
        return None
    large = [size for size in shape[1:] if size != 1]
    return None if len(large) > 1 else int(np.prod(shape[1:], dtype=np.int64))


def _dtype(info: ValueInfoProto) -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)


def _type_name(data_type: int) -> str:
    return TensorProto.DataType.Name(data_type).lower() if data_type else "of an unknown type"


def _axis(size: int | None) -> str:
    return "?" if size is None else str(size)
