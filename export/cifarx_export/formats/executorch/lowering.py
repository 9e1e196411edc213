"""From a module to the bytes of an ExecuTorch program whose operators XNNPACK runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cifarx_export.formats.quiet import quiet
from cifarx_serve.errors import UsageError

MAX_BATCH_SIZE: Final = 64
"""The number of images that a program has memory for. The backend runs a larger batch in parts."""


def export_module(module: nn.Module, example: Tensor) -> ExportedProgram:
    """Export a module for batches of 1 to `MAX_BATCH_SIZE` images."""
    with _tracing():
        return torch.export.export(module, (example,), dynamic_shapes=({0: Dim("batch", min=1, max=MAX_BATCH_SIZE)},))


class MissingOperatorError(UsageError):
    """Raised when ExecuTorch's runtime does not have an operator of a program."""


def lower(program: ExportedProgram) -> bytes:
    """Return the program as ExecuTorch runs it.

    Raises:
        MissingOperatorError: XNNPACK does not run an operator, and neither does the runtime.
        UsageError: there is no memory for `MAX_BATCH_SIZE` images.
    """
    with _tracing():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.extension.pybindings import _C

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    plan = lowered.executorch_program.execution_plan[0]
    size = plan.values[plan.inputs[0]].val.sizes[0]
    if size != MAX_BATCH_SIZE:
        raise UsageError(
            f"ExecuTorch limits the network to batches of {size} images instead of {MAX_BATCH_SIZE}",
            "use another --format",
        )
    names = [".".join(filter(None, (operator.name, operator.overload))) for operator in plan.operators]
    if missing := [name for name in names if name not in _C._get_operator_names()]:
        raise MissingOperatorError(f"ExecuTorch does not run {', '.join(missing)}", "use another --format")
    return bytes(lowered.buffer)


@contextmanager
def _tracing() -> Iterator[None]:
    """Trace in inference mode, without output.

    PyTorch chooses MKL-DNN and NNPACK by the batch size, and would limit the batch to the sizes with the same choice.
    """
    with quiet(), torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(False):
        yield
