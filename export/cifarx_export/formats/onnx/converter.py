"""Conversion to ONNX with PyTorch's `torch.export`-based exporter: one file with a dynamic batch size and the spec."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import msgspec
import onnx
import torch
from onnx import ModelProto

from cifarx_export.formats.onnx.int8.search import QuantizationSearch
from cifarx_export.formats.onnx.opset import convert_to_opset, unsupported_type_error
from cifarx_export.formats.onnx.preprocessing import embed_preprocessing
from cifarx_export.formats.quiet import quiet
from cifarx_export.formats.registry import Artifact, ConversionSource
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.backends.onnxruntime.model_reader import minimum_onnxruntime
from cifarx_serve.spec import ModelSpec

DEFAULT_OPSET: Final = 18
"""The lowest opset that the exporter writes without a conversion, so the one that most runtimes can read."""

_Converted: TypeAlias = tuple[ModelProto, dict[str, str]]
"""A model, and the facts about its conversion that its spec records."""


class OnnxArtifact(Artifact):
    """An ONNX model without any information about the machine it was made on.

    Args:
        model: the model.
        facts: facts about the conversion, such as the opset, that the spec records.
    """

    def __init__(self, model: ModelProto, facts: Mapping[str, str]) -> None:
        self._model = model
        self._facts = facts

    def complete_spec(self, spec: ModelSpec) -> ModelSpec:
        """Add the facts about the conversion, and the oldest version of ONNX Runtime that can run the model."""
        opset = next(entry.version for entry in self._model.opset_import if not entry.domain)
        return msgspec.structs.replace(
            spec,
            exporter={**(spec.exporter or {}), **self._facts},
            minimum_onnxruntime=minimum_onnxruntime(self._model.ir_version, opset),
        )

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write one file. The same model, library versions and spec produce the same bytes."""
        del self._model.metadata_props[:]
        entry = self._model.metadata_props.add()
        entry.key, entry.value = SPEC_KEY, spec.to_json()
        path.write_bytes(self._model.SerializeToString(deterministic=True))


def convert_to_onnx(source: ConversionSource) -> Iterator[OnnxArtifact]:
    """Convert the network. Yields one artifact, or for int8 one per candidate of `QuantizationSearch`.

    The input `input` is float32, (batch, *input.shape). The output is float32, (batch, output_size), and is called
    `logits` or `probabilities`, as the spec says. With embedded preprocessing the input is uint8, (batch, height,
    width, channels), of any height and width.

    Raises:
        UsageError, DataError: int8 cannot be calibrated. See `QuantizationSearch`.
    """
    for network, facts in _convert(source):
        embedded = source.options.embed_preprocessing
        model = embed_preprocessing(network, source.spec.input) if embedded else network
        _strip_debug_metadata(model)
        _check_model(model, _opset(source))
        yield OnnxArtifact(model, {"opset": str(_opset(source)), **facts})


def _convert(source: ConversionSource) -> Iterator[_Converted]:
    """Yield the models in the precision of the source, and the facts about the conversion to it."""
    if source.spec.precision == "int8":
        yield from source.compute_once(_start_search).candidates()
    elif source.spec.precision == "fp16":
        from cifarx_export.formats.onnx.fp16 import convert_model_to_fp16  # imports onnx_ir

        yield convert_model_to_fp16(_export_fp32(source))
    else:
        yield _export_fp32(source), {}


def _start_search(source: ConversionSource) -> QuantizationSearch:
    return QuantizationSearch(_export_fp32(source), source)


def _export_fp32(source: ConversionSource) -> ModelProto:
    """Export the network in fp32."""
    with quiet():
        program = torch.onnx.export(
            source.build_module(),
            (source.example_input(),),
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: "batch"},),
            input_names=["input"],
            output_names=[source.spec.output],
            opset_version=max(_opset(source), DEFAULT_OPSET),
            verify=False,  # it would only log a difference; the parity check covers this
        )
    assert program is not None
    model = program.model_proto
    if _opset(source) < DEFAULT_OPSET:
        convert_to_opset(model, _opset(source))
    return model


def _opset(source: ConversionSource) -> int:
    return DEFAULT_OPSET if source.options.opset is None else source.options.opset


def _strip_debug_metadata(model: ModelProto) -> None:
    """Remove the exporter's debug metadata: source paths, stack traces and file names of this machine."""
    model.doc_string = ""
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    del model.functions[:]
    for entry in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        entry.doc_string = ""
        del entry.metadata_props[:]


def _check_model(model: ModelProto, opset: int) -> None:
    """Run the ONNX checker on a file: it would copy a model in memory three times.

    Raises:
        UsageError: an operator does not take a type in an older opset than that of the exporter.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            onnx.checker.check_model(path, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            refused = unsupported_type_error(error, opset) if opset < DEFAULT_OPSET else None
            raise refused or error from error
