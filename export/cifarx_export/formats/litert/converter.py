"""LiteRT files for one image, made with litert-torch in a process of its own."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cifarx_export.formats.conversion_errors import reporting_conversion_errors
from cifarx_export.formats.int8.gain import CHECK_NAME, MIN_GAIN
from cifarx_export.formats.int8.refused import skip_refused
from cifarx_export.formats.int8.search import CALIBRATION_IMAGES, require_calibration_images
from cifarx_export.formats.quiet import quiet
from cifarx_export.formats.registry import ConversionSource
from cifarx_export.formats.sealed_artifact import SealedArtifact
from cifarx_export.formats.traced_module import module_to_trace
from cifarx_export.parity.checks import Check
from cifarx_serve.backends.litert.graph import UnsafeGraphError, check_graph, operator_names
from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import ModelSpec

_CONVERTER: Final = "litert_torch"
_INSTALL: Final = 'in an environment of its own: pip install "cifarx[train,litert]" litert-torch'

_DEPTHWISE: Final = "DEPTHWISE_CONV_2D"

_Quantized = tuple[bytes, Mapping[str, str]]
"""A model, and the facts about it that the spec records."""


class RefusedModelError(UsageError):
    """Raised when litert-torch or its quantizer wrote a model that the backend does not open."""


class LiteRtArtifact(SealedArtifact):
    """A LiteRT model, a FlatBuffer."""

    def complete_spec(self, spec: ModelSpec) -> ModelSpec:
        """Add the facts about the conversion, and that the channels are the last axis of the input."""
        complete = super().complete_spec(spec)
        return msgspec.structs.replace(complete, input=msgspec.structs.replace(complete.input, layout="NHWC"))


class ChannelsLast(nn.Module):
    """A network of images whose channels are the first axis, for images whose channels are the last one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.network(images.permute(0, 3, 1, 2))
        return outputs


def convert_to_litert(source: ConversionSource) -> Iterator[LiteRtArtifact]:
    """Convert the network for one image, float32 (1, height, width, channels). Yields one artifact, or three for int8.

    In int8, the weights have one scale per channel. The ranges of the activations are those of each image, with one of
    two ways to scale the weights; or they are fixed. Fixed ranges are a little faster and disagree with the network
    about twice as often, so they are tried last. They come first if the network has depthwise convolutions, for which
    LiteRT has no fast kernel with the ranges of each image.

    A candidate of int8 that the backend does not open is left out.

    Raises:
        UsageError: litert-torch is not installed or cannot convert the network, or the network has an operator that is
            not allowed in a file, or the number of calibration images is below 1.
        DataError: int8 has no training images for fixed ranges.
    """
    require_calibration_images(source)
    if importlib.util.find_spec(_CONVERTER) is None:
        raise UsageError("litert-torch is not installed, which --format litert needs", _INSTALL)
    facts = {name: version(name) for name in ("litert-torch", "ai-edge-litert")}
    model = _convert(source)
    if source.spec.precision != "int8":
        yield LiteRtArtifact(model, facts)
        return
    dynamic = [partial(_quantize, source, model, weights) for weights in ("minmax", "OCTAV")]
    static = partial(_quantize_static, source, model)
    attempts = [static, *dynamic] if _DEPTHWISE in operator_names(model) else [*dynamic, static]
    for quantized, choice in skip_refused(attempts, RefusedModelError, source.progress):
        yield LiteRtArtifact(quantized, {**facts, **choice}, [_check_gain(quantized, model)])


def _convert(source: ConversionSource) -> bytes:
    module, images = module_to_trace(source), source.example_input()[:1]
    channels_last = module if source.spec.input.layout == "NHWC" else ChannelsLast(module).eval()
    example = images if channels_last is module else images.permute(0, 2, 3, 1).contiguous()
    with tempfile.TemporaryDirectory() as folder:
        program, model = Path(folder) / "program.pt2", Path(folder) / "model.tflite"
        with reporting_conversion_errors("LiteRT", module, images), quiet(), torch.no_grad():
            torch.export.save(torch.export.export(channels_last, (example,)), program)
        _run("convert_program", program, model, source.spec.output)
        return _read_safe_model(model)


def _quantize_static(source: ConversionSource, model: bytes) -> _Quantized:
    requested = source.options.calibration_images
    images = source.load_training_images(CALIBRATION_IMAGES if requested is None else requested)
    if not len(images):
        raise DataError("the dataset has no training images", "int8 needs some for the ranges of the activations")
    source.progress(f"int8: calibrating on {len(images)} training images")
    size = msgspec.structs.replace(source.spec.input, layout="NHWC")
    return _quantize(source, model, "minmax", normalize(images, size))


def _quantize(
    source: ConversionSource, model: bytes, weights: str, images: NDArray[np.float32] | None = None
) -> _Quantized:
    """Quantize a model, with fixed ranges if there are images to find them on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original, quantized, calibration = (folder / file for file in ("model.tflite", "int8.tflite", "images.npy"))
        original.write_bytes(model)
        if images is not None:
            np.save(calibration, images)
        given = [] if images is None else [calibration]
        _run("quantize_model", original, quantized, source.spec.output, weights, *given)
        content = _read_safe_model(quantized)
    ranges = "ranges of each image" if images is None else f"ranges fixed: minmax, {len(images)} training images"
    facts = {"activations": f"8 bits, {ranges}", "weights": f"8 bits, per channel, {weights}"}
    if images is None and _DEPTHWISE in operator_names(model):
        facts["fp32 layers"] = "depthwise convolutions"
    return content, facts


def _run(program: str, *arguments: str | Path) -> None:
    """Run a program of this package.

    Raises:
        UsageError: it failed. The message has the last line that it wrote, which is that of the exception.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"{__package__}.{program}", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), f"status {done.returncode}")
        raise UsageError(f"LiteRT cannot convert the network ({reason})", "use --format onnx")


def _read_safe_model(path: Path) -> bytes:
    """Return a model that the backend will open.

    Raises:
        RefusedModelError: it has an operator that is not allowed in a file, or is damaged.
    """
    content = path.read_bytes()
    try:
        check_graph(content)
    except UnsafeGraphError as error:
        raise RefusedModelError(
            f"the LiteRT model of this network is not one that cifarx runs from a file ({error})", "use --format onnx"
        ) from error
    return content


def _check_gain(quantized: bytes, original: bytes) -> Check:
    found = f"model of {len(quantized) / 1e6:.2f} MB instead of {len(original) / 1e6:.2f} MB"
    passed = len(quantized) <= (1 - MIN_GAIN) * len(original)
    return Check(CHECK_NAME, passed, found if passed else f"{found}: use --precision fp32")
