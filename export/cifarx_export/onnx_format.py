"""ONNX by PyTorch's `torch.export`-based exporter: one file, a dynamic batch, the spec inside."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import nn

from cifarx_export.formats import ExportOptions, require_opset
from cifarx_serve.backends.onnxruntime_backend import SPEC_KEY
from cifarx_serve.spec import InputSpec, ModelSpec

DEFAULT_OPSET: Final = 18
"""The lowest that the exporter writes without a conversion, so the one that most runtimes can read."""


class OnnxArtifact:
    """A model proto that says nothing of the machine it was made on."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write one file; the same model, versions and spec give the same bytes."""
        del self._model.metadata_props[:]
        entry = self._model.metadata_props.add()
        entry.key, entry.value = SPEC_KEY, spec.to_json()
        path.write_bytes(self._model.SerializeToString(deterministic=True))


def convert_to_onnx(module: nn.Module, spec: ModelSpec, options: ExportOptions) -> OnnxArtifact:
    """Input `input`, float32 (batch, 3, height, width); output `logits`, float32 (batch, classes).

    Raises:
        UsageError: an opset that is not supported.
    """
    opset = DEFAULT_OPSET if options.opset is None else options.opset
    require_opset(opset)
    with _quiet():
        program = torch.onnx.export(
            module,
            (example_input(spec.input),),
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: "batch"},),
            input_names=["input"],
            output_names=["logits"],
            opset_version=opset,
            verify=False,  # it would only log; the proof is ours
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    return OnnxArtifact(model)


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
