"""The `ExportedProgram` of `torch.export`, a graph of operators with a dynamic batch size, in a PyTorch 2 archive."""

import io
import warnings
from pathlib import Path
from typing import Final

import torch
from torch.export import Dim, ExportedProgram

from cifarx_export.formats.fp16 import convert_module_to_fp16
from cifarx_export.formats.registry import Artifact, ConversionSource
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.spec import ModelSpec

# Node metadata that says where in the Python code an operator came from: paths and class names. Running ignores it.
_DEBUG_METADATA: Final = ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node", "custom")


class ExportedProgramArtifact(Artifact):
    """An exported program without debug metadata and without pickled objects."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the archive with the spec among its extra files. The same program and spec produce the same bytes."""
        archive = io.BytesIO()  # given a path, PyTorch would name the root folder of the archive after it
        torch.export.save(self._program, archive, extra_files={SPEC_FILE: spec.to_json()})
        path.write_bytes(archive.getbuffer())


def convert_to_exported_program(source: ConversionSource) -> list[ExportedProgramArtifact]:
    """Export the network with a dynamic batch size of at least one. Height and width are fixed. Returns one artifact.

    Raises:
        UsageError: a weight is outside the range of float16.
    """
    module = source.build_module()
    if source.spec.precision == "fp16":
        module = convert_module_to_fp16(module, source.spec.input.layout)
    with warnings.catch_warnings(), torch.no_grad():
        # The parity check covers what the exporter warns about.
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (source.example_input(),), dynamic_shapes=({0: Dim("batch", min=1)},))
    _strip_debug_metadata(program)
    return [ExportedProgramArtifact(program)]


def _strip_debug_metadata(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        for key in _DEBUG_METADATA:
            node.meta.pop(key, None)
    # PyTorch would pickle the example inputs. The setter of `example_inputs` does not accept None.
    program._example_inputs = None
