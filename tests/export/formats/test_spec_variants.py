"""Every format of networks with another color, layout, size or output than the built-in ones."""

from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from cifarx_export.formats.registry import FORMATS, NO_OPTIONS, ConversionSource, ExportOptions
from cifarx_serve.backends.base import TensorInfo
from cifarx_serve.backends.registry import backend_class, model_file
from cifarx_serve.devices import Device
from cifarx_serve.images.preprocess import model_input, normalize
from cifarx_serve.progress import silent
from cifarx_serve.spec import InputSpec, ModelSpec, Precision
from tests.support.litert_model import requires_litert_torch
from tests.support.web import requires_web

CPU = Device("cpu")
RGB = InputSpec(height=12, width=20)
CLASSES = tuple("abcde")

SPECS = {
    "grayscale": ModelSpec(
        model="grayscale",
        class_names=CLASSES,
        input=InputSpec(height=12, width=20, channels=1, color="L", mean=(0.13,), std=(0.31,)),
    ),
    "BGR": ModelSpec(
        model="bgr",
        class_names=CLASSES,
        input=InputSpec(height=20, width=12, color="BGR", value_range=(0, 255), mean=(104, 117, 123)),
    ),
    "NHWC": ModelSpec(model="nhwc", class_names=CLASSES, input=InputSpec(height=12, width=20, layout="NHWC")),
    "several labels": ModelSpec(
        model="labels", class_names=CLASSES, input=RGB, activation="sigmoid", thresholds=(0.2, 0.5, 0.5, 0.5, 0.9)
    ),
    "one logit": ModelSpec(model="one", class_names=("no", "yes"), input=RGB, activation="sigmoid", outputs=1),
    "probabilities": ModelSpec(model="softmax", class_names=CLASSES, input=RGB, output="probabilities"),
}


class Network(nn.Module):
    """A small network for any input and output."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.channels_last = spec.input.layout == "NHWC"
        self.conv = nn.Conv2d(spec.input.channels, 8, 3)
        self.head = nn.Linear(8, spec.output_size)
        self.probabilities = spec.output == "probabilities"

    def forward(self, images: Tensor) -> Tensor:
        if self.channels_last:
            images = images.permute(0, 3, 1, 2)
        logits: Tensor = self.head(torch.relu(self.conv(images)).mean((2, 3)))
        return logits.softmax(1) if self.probabilities else logits


def network(spec: ModelSpec) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(spec).eval()


def images(count: int, spec: ModelSpec) -> np.ndarray:
    shape = (count, spec.input.height, spec.input.width, spec.input.channels)
    colors = np.random.default_rng(0).integers(0, 256, (count, 1, 1, spec.input.channels))
    return np.broadcast_to(colors, shape).astype(np.uint8)


def convert(name: str, spec: ModelSpec, path: Path, options: ExportOptions = NO_OPTIONS) -> tuple[Path, ModelSpec]:
    """Convert the network, and return the file with its spec."""
    source = ConversionSource(lambda: network(spec), spec, options, lambda count: images(min(count, 64), spec), silent)
    artifact = next(iter(FORMATS[name].convert(source)))
    complete = artifact.complete_spec(spec)
    if FORMATS[name].directory_suffix:
        path.mkdir()
    artifact.save(path, complete)
    return model_file(path), complete


def expected_outputs(pixels: np.ndarray, spec: ModelSpec) -> np.ndarray:
    with torch.no_grad():
        return cast("np.ndarray", network(spec)(torch.from_numpy(normalize(pixels, spec.input))).numpy())


COMPILED = ("grayscale", "NHWC", "one logit")
"""Specs with other shapes and another layout. The code that is compiled does not depend on the rest of a spec."""


@pytest.mark.parametrize("label", SPECS)
@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("onnx", "fp32", 1e-5),
        ("openvino", "fp32", 1e-5),
        pytest.param("openvino", "bf16", 5e-2, marks=pytest.mark.slow),
        ("torchscript", "fp32", 1e-5),
        ("pt2", "fp16", 2e-2),
        pytest.param("onnx", "fp16", 2e-2, marks=pytest.mark.slow),
        pytest.param("onnx", "int8", 0.2, marks=pytest.mark.slow),
        pytest.param("triton", "fp32", 1e-5, marks=pytest.mark.slow),
        pytest.param("web", "fp32", 1e-5, marks=[pytest.mark.slow, requires_web]),
        pytest.param("litert", "fp32", 1e-5, marks=[pytest.mark.slow, requires_litert_torch]),
        pytest.param("litert", "int8", 0.1, marks=[pytest.mark.slow, requires_litert_torch]),
        pytest.param("torchscript", "fp16", 2e-2, marks=pytest.mark.slow),
        pytest.param("pt2", "fp32", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_outputs_match_the_network(label: str, name: str, precision: Precision, tolerance: float) -> None:
    compare_outputs(label, name, precision, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("label", COMPILED)
def test_outputs_of_compiled_code_match_the_network(label: str) -> None:
    """Compiling takes a quarter of a minute."""
    compare_outputs(label, "aotinductor", "fp32", 1e-5)


def compare_outputs(label: str, name: str, precision: Precision, tolerance: float) -> None:
    """Convert the network, and compare the names, shapes and values of its outputs."""
    spec = msgspec.structs.replace(SPECS[label], precision=precision, exporter={"format": name})
    path, complete = convert(name, spec, Path(f"net{FORMATS[name].suffix}"))
    pixels = images(5, spec)
    with backend_class(FORMATS[name].backend)(path, CPU) as backend:
        assert backend.spec == complete
        infos = backend.tensor_infos()
        outputs = backend.run(model_input(pixels, complete))
    if infos:
        of_any_size = TensorInfo("input", "uint8", ("batch", "height", "width", spec.input.channels))
        assert infos == (
            of_any_size
            if complete.embedded_preprocessing
            else TensorInfo("input", "float32", ("batch", *complete.input.shape)),
            TensorInfo(spec.output, "float32", ("batch", spec.output_size)),
        )
    expected = expected_outputs(pixels, spec)
    assert (outputs.dtype, outputs.shape) == (np.float32, (5, spec.output_size))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("label", SPECS)
@pytest.mark.parametrize(
    "resizing",
    [
        {"resize": "letterbox", "fill": 114},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"resize_to": (24, 30)}, marks=pytest.mark.slow),
    ],
)
def test_embedded_preprocessing_gives_the_same_outputs(label: str, resizing: dict[str, Any]) -> None:
    size = msgspec.structs.replace(SPECS[label].input, **resizing)
    spec = msgspec.structs.replace(SPECS[label], input=size, embedded_preprocessing=True)
    path, _ = convert("onnx", spec, Path("net.onnx"), ExportOptions(embed_preprocessing=True))
    pixels = images(5, spec)
    with backend_class("onnxruntime")(path, CPU) as backend:
        assert backend.tensor_infos()[0] == TensorInfo("input", "uint8", ("batch", "height", "width", pixels.shape[3]))
        outputs = backend.run(model_input(pixels, spec))
    np.testing.assert_allclose(outputs, expected_outputs(pixels, spec), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_an_int8_file_agrees_on_sets_of_labels() -> None:
    """The agreement is that of all labels, not only of the best."""
    spec = msgspec.structs.replace(SPECS["several labels"], precision="int8")
    _, complete = convert("onnx", spec, Path("net.onnx"))
    assert complete.exporter is not None
    assert "%" in complete.exporter["held-out agreement"]
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load("net.onnx").graph.node)
