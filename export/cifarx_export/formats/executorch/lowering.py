"""From a module to the bytes of an ExecuTorch program whose operators XNNPACK runs."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cifarx_export.formats.quiet import quiet
from cifarx_serve.backends.torch.executorch import captured_log, load_runtime, log_reason
from cifarx_serve.backends.torch.executorch_program import METHOD
from cifarx_serve.errors import UsageError

MAX_BATCH_SIZE: Final = 64
"""The number of images that a program has memory for. The backend runs a larger batch in parts."""


class RefusedProgramError(UsageError):
    """Raised when ExecuTorch's runtime does not run a program that its exporter wrote."""


def export_module(module: nn.Module, example: Tensor) -> ExportedProgram:
    """Export a module for batches of 1 to `MAX_BATCH_SIZE` images."""
    with _tracing():
        return torch.export.export(module, (example,), dynamic_shapes=({0: Dim("batch", min=1, max=MAX_BATCH_SIZE)},))


def lower(program: ExportedProgram) -> bytes:
    """Return the program as ExecuTorch runs it.

    Raises:
        RefusedProgramError: the runtime does not run it on one image.
        UsageError: there is no memory for `MAX_BATCH_SIZE` images.
    """
    with _tracing():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    plan = lowered.executorch_program.execution_plan[0]
    size = plan.values[plan.inputs[0]].val.sizes[0]
    if size != MAX_BATCH_SIZE:
        raise UsageError(
            f"ExecuTorch limits the network to batches of {size} images instead of {MAX_BATCH_SIZE}",
            "use another --format",
        )
    content = bytes(lowered.buffer)
    _require_runs(content, program)
    return content


def _require_runs(content: bytes, program: ExportedProgram) -> None:
    """Run a program on one image: only then the runtime reports an operator or a size that it does not support."""
    [name] = program.graph_signature.user_inputs
    [image] = [node.meta["val"] for node in program.graph.nodes if node.name == name]
    runtime = load_runtime()
    with tempfile.TemporaryDirectory() as folder, captured_log() as log:
        path = Path(folder, "program.pte")
        path.write_bytes(content)
        try:
            loaded = runtime._load_program(str(path))
            loaded.load_method(METHOD).call([torch.zeros(1, *image.shape[1:])])
        except RuntimeError as error:
            raise RefusedProgramError(
                f"ExecuTorch does not run the network ({log_reason(log, error)})", "use another --format"
            ) from error


@contextmanager
def _tracing() -> Iterator[None]:
    """Trace in inference mode, without output.

    PyTorch chooses MKL-DNN and NNPACK by the batch size, and would limit the batch to the sizes with the same choice.
    """
    with quiet(), torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(False):
        yield
