"""Conversion to ONNX with PyTorch's `torch.export`-based exporter: one file with a dynamic batch size and the spec."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import onnx
import torch
from onnx import ModelProto

from cifarx_export.formats.conversion_errors import reporting_conversion_errors
from cifarx_export.formats.onnx.half_precision import MAX_IMAGES, check_half_precision
from cifarx_export.formats.onnx.int8.inference import open_session
from cifarx_export.formats.onnx.int8.search import QuantizationSearch
from cifarx_export.formats.onnx.opset import convert_to_opset, unsupported_type_error
from cifarx_export.formats.onnx.preprocessing import embed_preprocessing
from cifarx_export.formats.quiet import quiet
from cifarx_export.formats.registry import (
    MIN_EMBEDDING_OPSET,
    MIN_INT8_OPSET,
    Artifact,
    ConversionSource,
)
from cifarx_export.parity.checks import Check
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.backends.onnxruntime.model_reader import minimum_onnxruntime
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import ModelSpec

DEFAULT_OPSET: Final = 18
"""The lowest opset that the exporter writes without a conversion, so the one that most runtimes can read."""


class _Converted(NamedTuple):
    """A model, the facts about its conversion that its spec records, and what the conversion found about it."""

    model: ModelProto
    facts: Mapping[str, str] = {}
    checks: Sequence[Check] = ()


class OnnxArtifact(Artifact):
    """An ONNX model without any information about the machine it was made on.

    Args:
        model: the model.
        facts: facts about the conversion, such as the opset, that the spec records.
        checks: what the conversion found about the model.
    """

    def __init__(self, model: ModelProto, facts: Mapping[str, str], checks: Sequence[Check] = ()) -> None:
        self.model = model
        self.facts = facts
        self.checks = checks

    def complete_spec(self, spec: ModelSpec) -> ModelSpec:
        """Add the facts about the conversion, and the oldest version of ONNX Runtime that can run the model."""
        return msgspec.structs.replace(
            super().complete_spec(spec),
            minimum_onnxruntime=minimum_onnxruntime(self.model.ir_version, model_opset(self.model)),
        )

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write one file. The same model, library versions and spec produce the same bytes."""
        del self.model.metadata_props[:]
        entry = self.model.metadata_props.add()
        entry.key, entry.value = SPEC_KEY, spec.to_json()
        path.write_bytes(self.model.SerializeToString(deterministic=True))


def model_opset(model: ModelProto) -> int:
    """Return the version of ONNX's own operators that a model uses."""
    version: int = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return version


def convert_to_onnx(source: ConversionSource) -> Iterator[OnnxArtifact]:
    """Convert the network. Yields one artifact, or for int8 one per candidate of `QuantizationSearch`.

    The input `input` is float32, (batch, *input.shape). The output is float32, (batch, output_size), and is called
    `logits` or `probabilities`, as the spec says. With embedded preprocessing the input is uint8, (batch, height,
    width, channels), of any height and width.

    Raises:
        UsageError: the network cannot be converted, or not to this opset; or an option of int8 cannot be followed.
        DataError: int8 cannot be calibrated. See `QuantizationSearch`.
    """
    for network, facts, checks in _convert(source):
        model = network
        if source.options.embed_preprocessing:
            require_opset(network, "--embed-preprocessing", MIN_EMBEDDING_OPSET)
            model = embed_preprocessing(network, source.spec.input)
        _strip_debug_metadata(model)
        _check_model(model, _opset(source))
        yield OnnxArtifact(model, {"opset": str(model_opset(model)), **facts}, checks)


def _convert(source: ConversionSource) -> Iterator[_Converted]:
    """Yield the models in the precision of the source."""
    if source.spec.precision == "int8":
        search = source.compute_once(_start_search)
        for model, facts in search.candidates():
            gain = search.check_gain(model)
            yield _Converted(model, facts, [gain])
            if not gain.passed:
                return  # later candidates have more layers in fp32
    elif source.spec.precision == "fp16":
        yield source.compute_once(_convert_to_fp16)
    else:
        yield _Converted(_export_fp32(source))


def _start_search(source: ConversionSource) -> QuantizationSearch:
    model = _export_fp32(source)
    require_opset(model, "int8", MIN_INT8_OPSET)
    return QuantizationSearch(model, source)


def _convert_to_fp16(source: ConversionSource) -> _Converted:
    from cifarx_export.formats.onnx.fp16 import convert_model_to_fp16, lift_constants  # imports onnx_ir

    model = lift_constants(_export_fp32(source))
    exact = open_session(model)
    converted, facts = convert_model_to_fp16(model)
    return _Converted(converted, facts, simulate(converted, exact, source))


def simulate(model: ModelProto, exact: Any, source: ConversionSource) -> list[Check]:
    """Check a model of the source in half precision, which the CPU may compute in float32.

    Args:
        model: as for `check_half_precision`.
        exact: the session of the model in float32.
        source: the network.
    """
    source.progress(f"{source.spec.precision}: simulating it, because a CPU may compute it in float32")
    inputs = source.test_inputs(MAX_IMAGES)
    batches = ((batch, exact.run(None, {"input": batch})[0]) for batch in inputs)
    return check_half_precision(model, source.spec.precision, batches, source.spec)


def _export_fp32(source: ConversionSource) -> ModelProto:
    """Export the network in fp32, or load it if it is an ONNX file already."""
    if source.load_onnx is not None:
        return source.load_onnx()
    module, example = source.build_module(), source.example_input()
    with reporting_conversion_errors("ONNX", module, example), quiet():
        program = torch.onnx.export(
            module,
            (example,),
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


def require_opset(model: ModelProto, feature: str, needed: int) -> None:
    """Check the opset of a model. An adopted one has that of its author; any other was checked before.

    Raises:
        UsageError: it is too low.
    """
    if (opset := model_opset(model)) < needed:
        raise UsageError(
            f"{feature} needs opset {needed}, and the model has {opset}",
            "export the original with a newer opset, and adopt it again",
        )


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
