"""The graph of a model for TensorBoard."""

import contextlib
import copy
import io
import sys
import warnings

import torch
from tensorboard.compat.proto.event_pb2 import Event
from torch import nn

from cifarx_serve.spec import InputSpec


def model_graph(module: nn.Module, spec: InputSpec) -> Event | None:
    """Return the event with the graph of a model, or None if PyTorch cannot trace it.

    The model and the random generators are left unchanged, so a run gives the same results with and without a graph.
    """
    if sys.version_info >= (3, 14):  # not supported by PyTorch's tracer
        return None
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        contextlib.redirect_stdout(io.StringIO()),  # prints the reason if it cannot trace the model
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # the tracer is deprecated and warns about control flow that depends on sizes
        try:
            from torch.utils.tensorboard._pytorch_graph import graph

            graph_def, _ = graph(_copy_to_cpu(module).eval(), torch.zeros(1, *spec.shape))
        except Exception:  # the forward pass of a model may raise anything
            return None
    return Event(graph_def=graph_def.SerializeToString())


def _copy_to_cpu(module: nn.Module) -> nn.Module:
    """Copy a model to the CPU without using device memory: `deepcopy` does not copy what is already in its memo."""
    memo: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach().to("cpu", copy=True), requires_grad=False)
        for weight in module.parameters()
    }
    memo |= {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in module.buffers()}
    return copy.deepcopy(module, memo)
