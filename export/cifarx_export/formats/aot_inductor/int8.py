"""int8 for AOTInductor: a search for the layers that stay in fp32, over a graph of the operators that are compiled.

Weights are int8 with one scale per output channel, and use 7 bits, so that sums of products cannot overflow on CPUs
without dot-product instructions (x86 before VNNI). GPTQ more than makes up for the missing bit. A choice is evaluated
with oneDNN's own operators, so it is rounded as the compiled package rounds it.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from cifarx_export.formats.aot_inductor.graph import (
    constant,
    convolution_arguments,
    nodes_to_calibrate,
    prepare_graph,
    quantizable_layers,
)
from cifarx_export.formats.aot_inductor.quantized_graph import WITHOUT_WEIGHTS, QuantizedWeight, quantize_graph
from cifarx_export.formats.int8.calibration import calibrate
from cifarx_export.formats.int8.fx_layers import count_elements, count_macs, find_layers, run_in_batches
from cifarx_export.formats.int8.gain import check_gain
from cifarx_export.formats.int8.gptq import (
    MAX_IN_FEATURES,
    QUANT_MAX,
    convolution_rows,
    linear_rows,
    quantize_columns,
    round_to_levels,
    rows_per_batch,
)
from cifarx_export.formats.int8.search import MixedPrecision, MixedPrecisionSearch, Network
from cifarx_export.formats.registry import ConversionSource
from cifarx_export.parity.checks import Check

_MAX_BATCH_SIZE: Final = 32

_MAX_VALUES: Final = 2**25
"""Number of float32 values that the observed activations of a batch may have together: 128 MB."""

_SMALLEST_SCALE: Final = 1e-12


class Candidate(NamedTuple):
    """A quantized network.

    Attributes:
        network: a graph of int8 operators.
        facts: facts that its spec records.
        gain: what it has gained over the network in fp32.
    """

    network: GraphModule
    facts: dict[str, str]
    gain: Check


class QuantizationSearch(MixedPrecisionSearch):
    """Quantizes a module to int8, with layers in mixed precision where the agreement requires it.

    Args:
        module: the network in fp32.
        source: provides the training images, and how many of them to calibrate on.

    Raises:
        UsageError, DataError: see `MixedPrecisionSearch`.
    """

    def __init__(self, module: nn.Module, source: ConversionSource) -> None:
        self._fp32_bytes = _weight_bytes(module)
        self._network = prepare_graph(module, source.example_input())
        self._nodes = quantizable_layers(self._network)
        self._macs = count_macs(self._network)
        names = {node.name for node in self._nodes}
        layers = find_layers(self._network, WITHOUT_WEIGHTS)
        layers = [layer for layer in layers if not layer.has_weights or names.issuperset(layer.nodes)]
        super().__init__(source, layers, sum(self._macs.values()))

    def calibrate(self, inputs: NDArray[np.float32]) -> None:
        observed = nodes_to_calibrate(self._network)
        self._ranges = calibrate(
            {name: value.numpy() for name, value in batch.items()} for batch in self._observe(observed, inputs)
        )
        self._progress("int8: quantizing the weights with GPTQ")
        self._weights = self._quantize_weights(inputs)

    def open(self, choice: MixedPrecision | None) -> Network:
        return partial(run_in_batches, self._network if choice is None else self._quantize(choice))

    def candidates(self) -> Iterator[Candidate]:
        """Yield a quantized network for each of `choices`."""
        for choice, agreement in self.choices():
            network = self._quantize(choice)
            kept = {name for layer in choice.fp32_layers for name in layer.nodes}
            in_int8 = sum(self._macs[name] for name in self._weights if name not in kept)
            share = in_int8 / max(1, self._total_macs)
            facts = self.describe(choice, agreement, "7 bits, per channel, rounded by GPTQ", share)
            yield Candidate(network, facts, check_gain(share, self._fp32_bytes, _weight_bytes(network)))

    def _quantize(self, choice: MixedPrecision) -> GraphModule:
        kept = {node for layer in choice.fp32_layers for node in layer.nodes}
        return quantize_graph(self._network, self._weights, self._ranges[choice.method], kept)

    def _observe(self, nodes: Sequence[Node], inputs: NDArray[np.float32]) -> Iterator[Mapping[str, Tensor]]:
        """Yield the values of nodes by name, batch by batch."""
        values_per_image = max(1, sum(count_elements(node) for node in nodes))
        batch_size = max(1, min(_MAX_BATCH_SIZE, _MAX_VALUES // values_per_image))
        recorder = _Recorder(self._network, nodes)
        with torch.no_grad():
            for batch in torch.from_numpy(inputs).split(batch_size):
                recorder.run(batch)
                yield recorder.values

    def _quantize_weights(self, inputs: NDArray[np.float32]) -> dict[str, QuantizedWeight]:
        hessians = self._compute_hessians(inputs)
        results = {}
        for node in self._nodes:
            weight = constant(self._network, node.args[1])
            assert weight is not None
            matrix = weight.reshape(len(weight), -1)
            scales = (matrix.abs().amax(1) / QUANT_MAX).clamp(min=_SMALLEST_SCALE)
            if node.name in hessians:
                levels = quantize_columns(matrix, scales, hessians[node.name])
            else:
                levels = round_to_levels(matrix, scales[:, None])
            results[node.name] = QuantizedWeight(levels.reshape(weight.shape).to(torch.int8), scales)
        return results

    def _compute_hessians(self, inputs: NDArray[np.float32]) -> dict[str, Tensor]:
        """Return the Hessian of each layer whose input rows are known, by the name of its node."""
        nodes = [node for node in self._nodes if _is_supported(node)]
        hessians = {node.name: torch.zeros(()) for node in nodes}
        sources = {node.name: node.all_input_nodes[0] for node in nodes}
        for batch in self._observe(list(dict.fromkeys(sources.values())), inputs):
            for node in nodes:
                activation = batch[sources[node.name].name]
                rows = _input_rows(node, activation, rows_per_batch(len(activation), len(inputs)))
                hessians[node.name] = hessians[node.name] + rows.T @ rows
        return hessians


class _Recorder(Interpreter):
    """Runs a network and keeps the values of some nodes of the last run."""

    def __init__(self, network: GraphModule, nodes: Sequence[Node]) -> None:
        super().__init__(network)
        self._nodes = frozenset(nodes)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            self.values[n.name] = value
        return value


def _is_supported(node: Node) -> bool:
    is_usual = node.target is torch.ops.aten.linear.default or convolution_arguments(node)[6] == 1
    return is_usual and count_elements(node.args[1]) <= MAX_IN_FEATURES  # type: ignore[arg-type]


def _input_rows(node: Node, activation: Tensor, limit: int) -> Tensor:
    if node.target is torch.ops.aten.linear.default:
        return linear_rows(activation, limit)
    _, weight, _, stride, (vertical, horizontal), dilation, _ = convolution_arguments(node)
    pads = (vertical, horizontal, vertical, horizontal)
    return convolution_rows(activation, weight.meta["val"].shape[2:], stride, pads, dilation, limit)


def _weight_bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())
