"""ExportedProgram, what `torch.export` makes of a network: a graph of operators with a dynamic batch, as `.pt2`."""

import io
import warnings
from pathlib import Path
from typing import Final

import torch
from torch.export import Dim, ExportedProgram

from cifarx_export.formats.fp16 import half_precision
from cifarx_export.formats.onnx.converter import example_input
from cifarx_export.formats.registry import Source
from cifarx_serve.backends.torch.exported_program_archive import SPEC_FILE
from cifarx_serve.spec import ModelSpec

# Where in its Python each operator came from: paths, and names of our classes, which running does not need.
_NOTES: Final = ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node", "custom")


class ExportedProgramArtifact:
    """A program that says nothing of the machine it was made on, and has nothing that loading would unpickle."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program

    def describe(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the archive with the spec among its extra files; the same program and spec give the same bytes."""
        # To memory: given a path, PyTorch names the archive's folder after it.
        archive = io.BytesIO()
        torch.export.save(self._program, archive, extra_files={SPEC_FILE: spec.to_json()})
        path.write_bytes(archive.getbuffer())


def convert_to_exported_program(source: Source) -> ExportedProgramArtifact:
    """Export with a dynamic batch of one or more; the other sizes are fixed.

    Raises:
        UsageError: a weight that float16 cannot hold.
    """
    module = half_precision(source.module) if source.spec.precision == "fp16" else source.module
    with warnings.catch_warnings(), torch.no_grad():
        # What the exporter suspects the proof finds out.
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module, (example_input(source.spec.input),), dynamic_shapes=({0: Dim("batch", min=1)},)
        )
    _strip(program)
    return ExportedProgramArtifact(program)


def _strip(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        for note in _NOTES:
            node.meta.pop(note, None)
    program._example_inputs = None  # the setter takes inputs alone; PyTorch would pickle them
