"""The graph of a network, for looking at."""

import contextlib
import copy
import io
import sys
import warnings

import torch
from tensorboard.compat.proto.event_pb2 import Event
from torch import nn

from cifarx_serve.spec import InputSpec


def network_graph(module: nn.Module, spec: InputSpec) -> Event | None:
    """What TensorBoard draws of the network, or None where PyTorch cannot trace it.

    The network stays as it was, and so do the random generators: a run is the same to the bit with a graph and
    without.
    """
    if sys.version_info >= (3, 14):  # PyTorch does not support its tracer there
        return None
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        contextlib.redirect_stdout(io.StringIO()),  # where it tells what it cannot trace
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # the tracer is deprecated, and doubts what depends on sizes
        try:
            from torch.utils.tensorboard._pytorch_graph import graph

            drawn, _ = graph(_on_cpu(module).eval(), torch.zeros(1, spec.channels, spec.height, spec.width))
        except Exception:  # whatever a network of any kind, or a future PyTorch, may raise
            return None
    return Event(graph_def=drawn.SerializeToString())


def _on_cpu(module: nn.Module) -> nn.Module:
    """A copy that takes no memory of the device: what `deepcopy` finds in its memo it does not copy itself."""
    memo: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach().to("cpu", copy=True), requires_grad=False)
        for weight in module.parameters()
    }
    memo |= {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in module.buffers()}
    return copy.deepcopy(module, memo)
