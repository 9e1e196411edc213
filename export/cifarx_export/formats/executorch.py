"""ExecuTorch programs, for phones and embedded systems: the network lowered to XNNPACK, in one file with its spec."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cifarx_export.formats.conversion_errors import reporting_conversion_errors
from cifarx_export.formats.quiet import quiet
from cifarx_export.formats.registry import Artifact, ConversionSource
from cifarx_export.formats.traced_module import module_to_trace
from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.files.trailing_document import append_document
from cifarx_serve.spec import ModelSpec

MAX_BATCH_SIZE: Final = 64
"""The number of images that a program has memory for. The backend runs a larger batch in parts."""


class ExecuTorchArtifact(Artifact):
    """A program for ExecuTorch's runtime.

    Args:
        program: the content of the file.
        facts: facts about the conversion that the spec records.
    """

    def __init__(self, program: bytes, facts: dict[str, str]) -> None:
        self._program = program
        self._facts = facts

    def complete_spec(self, spec: ModelSpec) -> ModelSpec:
        """Add the facts about the conversion."""
        return msgspec.structs.replace(spec, exporter={**(spec.exporter or {}), **self._facts})

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the program, the spec and a checksum. The same model, library versions and spec give the same bytes."""
        path.write_bytes(self._program)
        append_document(path, spec.to_json().encode())
        write_checksum(path)


def convert_to_executorch(source: ConversionSource) -> Iterator[ExecuTorchArtifact]:
    """Lower the network to XNNPACK, for batches of 1 to `MAX_BATCH_SIZE` images. Yields one artifact.

    Raises:
        UsageError: ExecuTorch is not installed, or it cannot run the network.
    """
    _require_library()
    module, example = module_to_trace(source), source.example_input()
    with reporting_conversion_errors("ExecuTorch", module, example):
        yield _lower(_export(module, example))


def _require_library() -> None:
    try:
        with quiet():
            import executorch.exir  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError("ExecuTorch is not installed", 'pip install "cifarx[executorch]"') from error


def _export(module: nn.Module, example: Tensor) -> ExportedProgram:
    # PyTorch chooses these libraries by the batch size, and so would limit the batch to the sizes of the same choice.
    with quiet(), torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(False):
        return torch.export.export(module, (example,), dynamic_shapes=({0: Dim("batch", min=1, max=MAX_BATCH_SIZE)},))


def _lower(program: ExportedProgram) -> ExecuTorchArtifact:
    from executorch import version
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with quiet(), torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(False):
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    return ExecuTorchArtifact(bytes(lowered.buffer), {"executorch": version.__version__})
