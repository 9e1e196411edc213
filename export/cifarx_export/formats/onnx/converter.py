"""ONNX by PyTorch's `torch.export`-based exporter: one file, a dynamic batch, the spec inside."""

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Final

import msgspec
import onnx
import torch
from torch import nn

from cifarx_export.formats.registry import Source
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.backends.onnxruntime.model_reader import minimum_onnxruntime
from cifarx_serve.spec import InputSpec, ModelSpec

DEFAULT_OPSET: Final = 18
"""The lowest that the exporter writes without a conversion, so the one that most runtimes can read."""


class OnnxArtifact:
    """A model proto that says nothing of the machine it was made on, and what to say of how it was made."""

    def __init__(self, model: Any, facts: Mapping[str, str]) -> None:
        self._model = model
        self._facts = facts

    def describe(self, spec: ModelSpec) -> ModelSpec:
        opset = next(entry.version for entry in self._model.opset_import if not entry.domain)
        return msgspec.structs.replace(
            spec,
            exporter={**(spec.exporter or {}), **self._facts},
            minimum_onnxruntime=minimum_onnxruntime(self._model.ir_version, opset),
        )

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write one file; the same model, versions and spec give the same bytes."""
        del self._model.metadata_props[:]
        entry = self._model.metadata_props.add()
        entry.key, entry.value = SPEC_KEY, spec.to_json()
        path.write_bytes(self._model.SerializeToString(deterministic=True))


def convert_to_onnx(source: Source) -> OnnxArtifact:
    """Input `input`, float32 (batch, 3, height, width); output `logits`, float32 (batch, classes).

    With the preprocessing embedded the input is uint8 (batch, height, width, 3), of any height and width.
    """
    opset = DEFAULT_OPSET if source.options.opset is None else source.options.opset
    model = _exported(source.module, source.spec.input, opset)
    facts = {"opset": str(opset)}
    if source.spec.precision == "fp16":
        from cifarx_export.formats.onnx.fp16 import to_half_precision

        model, found = to_half_precision(model)
        facts |= found
    if source.spec.precision == "int8":
        from cifarx_export.formats.onnx.int8.search import quantize

        model, found = quantize(model, source)
        facts |= found
    if source.options.embed_preprocessing:
        from cifarx_export.formats.onnx.preprocessing import embed_preprocessing

        model = embed_preprocessing(model, source.spec.input)
    _strip(model)
    _check(model)
    return OnnxArtifact(model, facts)


def _exported(module: nn.Module, spec: InputSpec, opset: int) -> Any:
    """The network as an fp32 model proto."""
    with _quiet():
        program = torch.onnx.export(
            module,
            (example_input(spec),),
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: "batch"},),
            input_names=["input"],
            output_names=["logits"],
            opset_version=opset,
            verify=False,  # it would only log; the proof is ours
        )
    assert program is not None
    return program.model_proto


def example_input(spec: InputSpec) -> torch.Tensor:
    """A batch of two: with one, an exporter may take the batch for a constant."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, spec.channels, spec.height, spec.width, generator=generator)


def _strip(model: Any) -> None:
    """Remove the exporter's notes: source paths, stack traces and names of this machine's files."""
    model.doc_string = ""
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    del model.functions[:]
    for entry in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        entry.doc_string = ""
        del entry.metadata_props[:]


def _check(model: Any) -> None:
    """By way of a file: what is in memory would be copied three times, and weights may take much of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(path, full_check=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its stages and warns of its own insides; what matters it raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
