"""The `ExportedProgram` of `torch.export`, a graph of operators with a dynamic batch size, in a PyTorch 2 archive."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import Dim, ExportedProgram

from cifarx_export.formats.conversion_errors import code_line, reporting_conversion_errors, stack_places
from cifarx_export.formats.quiet import quiet
from cifarx_export.formats.registry import Artifact, ConversionSource
from cifarx_export.formats.traced_module import fp16_checks, module_to_trace
from cifarx_export.parity.checks import Check
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.backends.torch.exported_program_operators import is_allowed
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import ModelSpec

# Node metadata that says where in the Python code an operator came from: paths and class names. Running ignores it.
_DEBUG_METADATA: Final = ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node", "custom")


class ExportedProgramArtifact(Artifact):
    """An exported program without debug metadata and without pickled objects."""

    def __init__(self, program: ExportedProgram, checks: Sequence[Check] = ()) -> None:
        self._program = program
        self.checks = checks

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the archive with the spec among its extra files. The same program and spec produce the same bytes."""
        archive = io.BytesIO()  # given a path, PyTorch would name the root folder of the archive after it
        with quiet():
            torch.export.save(self._program, archive, extra_files={SPEC_FILE: spec.to_json()})
        path.write_bytes(archive.getbuffer())


def convert_to_exported_program(source: ConversionSource) -> list[ExportedProgramArtifact]:
    """Export the network with a dynamic batch size of at least one. Height and width are fixed. Returns one artifact.

    Raises:
        UsageError: a weight is outside the range of float16, the network cannot be exported, or it uses an operator
            that is not allowed in a file.
    """
    program = _inline_contexts(export_program(module_to_trace(source), source.example_input(), "pt2"))
    _require_allowed_operators(program)
    _replace_views(program)
    _strip_debug_metadata(program)
    return [ExportedProgramArtifact(program, fp16_checks(source))]


def _inline_contexts(program: ExportedProgram) -> ExportedProgram:
    """Inline the graphs of `with` blocks of `torch.autocast` and `torch.enable_grad`, whose effect is then explicit."""
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, HigherOrderOperator)]
    wrapped = any(target.name().startswith("wrap_with_") for target in targets)
    return program.run_decompositions({}) if wrapped else program


def _require_allowed_operators(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and not is_allowed(_target_name(node.target)):
            place = code_line(stack_places(node.meta.get("stack_trace"))) or "the network"
            operator = getattr(node.target, "__name__", str(node.target))
            raise UsageError(
                f"{place} uses {operator}, which cifarx does not run from a .pt2 file",
                "use another operation, or another --format",
            )


def _target_name(target: Any) -> str:
    """Return the name of a function as a file states it."""
    return f"torch.ops.{target}" if isinstance(target, OpOverload) else f"{target.__module__}.{target.__name__}"


def export_program(module: nn.Module, example: Tensor, target: str) -> ExportedProgram:
    """Export a module with a dynamic batch size of at least one.

    Args:
        module: the module.
        example: the images to export it with.
        target: what the program is made for, for messages.

    Raises:
        UsageError: the module cannot be exported. The message names the line of its code.
    """
    # The parity check covers what the exporter warns about.
    with reporting_conversion_errors(target, module, example), quiet(), torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))


def _replace_views(program: ExportedProgram) -> None:
    """Replace `view` by `reshape`, which copies a tensor whose strides do not permit a view.

    The exporter leaves out `contiguous` where a tensor is contiguous on the CPU. On a GPU it may not be: the strides of
    `scaled_dot_product_attention` are others there.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    program.graph_module.recompile()


def _strip_debug_metadata(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        for key in _DEBUG_METADATA:
            node.meta.pop(key, None)
    # PyTorch would pickle the example inputs. The setter of `example_inputs` does not accept None.
    program._example_inputs = None
