"""int8 for XNNPACK: quantization of a PyTorch graph ("PT2E" of torchao), static or dynamic.

Weights are int8 with one scale per output channel. Static activations are int8 with one scale per tensor, from training
images. Dynamic ones get a scale for each image when the program runs; what comes out of a layer is float32, which costs
some speed and keeps the agreement. A static layer is evaluated with `FakeQuantize`, which rounds in float32 as XNNPACK
does in integers.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from cifarx_export.formats.executorch.lowering import export_module
from cifarx_export.formats.int8.calibration import Ranges, calibrate
from cifarx_export.formats.int8.fx_layers import WITH_WEIGHTS, count_macs, find_layers, run, run_in_batches
from cifarx_export.formats.int8.search import AGREEMENT_TARGETS, MixedPrecision, MixedPrecisionSearch, Network
from cifarx_export.formats.quiet import quiet
from cifarx_export.formats.registry import ConversionSource

_CALIBRATION_BATCH_SIZE: Final = 32

_SMALLEST_SCALE: Final = 2**-12
"""The smallest scale of XNNPACK's own quantizer."""

_WEIGHTS: Final = "8 bits, per channel"

_WITHOUT_WEIGHTS: Final = frozenset({"add", "mul", "cat", "adaptive_avg_pool2d"})
"""The operators without weights that XNNPACK computes in int8, by the names of their overload packets."""


class Candidate(NamedTuple):
    """A quantized network.

    Attributes:
        program: the network with quantized weights, and the rounding of its activations as operators.
        facts: facts that its spec records.
        int8_share: the share of the multiplications that run in int8, from 0 to 1.
    """

    program: ExportedProgram
    facts: dict[str, str]
    int8_share: float


class XnnpackQuantizationSearch(MixedPrecisionSearch):
    """Quantizes a module to int8, with layers in mixed precision where the agreement requires it.

    Args:
        module: the network in fp32.
        source: provides the training images, and how many of them to calibrate on.

    Raises:
        UsageError, DataError: see `MixedPrecisionSearch`.
    """

    def __init__(self, module: nn.Module, source: ConversionSource) -> None:
        self._example = source.example_input()
        program = export_module(module, self._example)
        self._graph: GraphModule = program.module(check_guards=False)
        self._macs = count_macs(self._graph)
        super().__init__(source, find_layers(self._graph, _WITHOUT_WEIGHTS), sum(self._macs.values()))

    def calibrate(self, inputs: NDArray[np.float32]) -> None:
        prepared = self._prepare((), _static_configuration())
        activations = _activation_quantizers(prepared)
        for quantizer in _quantizers(prepared):
            quantizer.disable_fake_quant()
        values: dict[str, NDArray[np.float32]] = {}
        for name, quantizer in activations.items():
            quantizer.register_forward_pre_hook(_recorder(values, name))

        def batches() -> Iterator[Mapping[str, NDArray[np.float32]]]:
            for start in range(0, len(inputs), _CALIBRATION_BATCH_SIZE):
                run(prepared, inputs[start : start + _CALIBRATION_BATCH_SIZE])
                yield values

        self._ranges = calibrate(batches())

    def open(self, choice: MixedPrecision | None) -> Network:
        return partial(run_in_batches, self._graph if choice is None else self._quantize(choice))

    def candidates(self) -> Iterator[Candidate]:
        """Yield quantized networks, the fastest first.

        That is static with all layers in int8, if it agrees with fp32 on the images to compare on; then dynamic; then
        static with layers in fp32, as `choices` finds them.
        """
        static, agreement = self.all_in_int8()
        if agreement >= AGREEMENT_TARGETS[0]:
            yield self._static(static, agreement)
        yield self._dynamic()
        for choice, agreement in self.choices():
            if choice != static:
                yield self._static(choice, agreement)

    def _static(self, choice: MixedPrecision, agreement: float) -> Candidate:
        kept = {node for layer in choice.fp32_layers for node in layer.nodes}
        in_int8 = sum(macs for name, macs in self._macs.items() if name not in kept) / max(1, self._total_macs)
        facts = self.describe(choice, agreement, _WEIGHTS, in_int8)
        return self._convert(self._quantize(choice), facts, in_int8)

    def _dynamic(self) -> Candidate:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config

        self._progress("int8: activations with a scale for each image")
        prepared = self._prepare((), get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
        run(prepared, self._example.numpy())  # the weights are observed
        observed = {node.name for node in prepared.graph.nodes if _has_observed_weight(node)}
        kept = [name for name in self._macs if name not in observed]
        in_int8 = sum(self._macs[name] for name in observed & self._macs.keys()) / max(1, self._total_macs)
        facts = {
            "calibration": "none: a scale for each image",
            "weights": _WEIGHTS,
            "fp32 layers": ", ".join(kept) or "none",
            "in int8": f"{in_int8:.0%} of the multiplications",
        }
        return self._convert(prepared, facts, in_int8)

    def _convert(self, prepared: GraphModule, facts: dict[str, str], int8_share: float) -> Candidate:
        with quiet():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

            converted = convert_pt2e(prepared)
        return Candidate(export_module(converted, self._example), facts, int8_share)

    def _quantize(self, choice: MixedPrecision) -> GraphModule:
        """Return the network with all layers but those in fp32 rounded, with the ranges of a method."""
        kept = {node for layer in choice.fp32_layers for node in layer.nodes}
        prepared = self._prepare(kept, _static_configuration())
        run(prepared, self._example.numpy())  # the weights are observed
        activations = _activation_quantizers(prepared)
        for quantizer, (low, high) in _ranges_of(activations, self._ranges[choice.method]).items():
            quantizer.activation_post_process.min_val = torch.tensor(low)
            quantizer.activation_post_process.max_val = torch.tensor(high)
        for quantizer in _quantizers(prepared):
            quantizer.disable_observer()
            scale, zero_point = quantizer.calculate_qparams()
            quantizer.scale.resize_(scale.shape).copy_(scale)
            quantizer.zero_point.resize_(zero_point.shape).copy_(zero_point)
        return prepared

    def _prepare(self, kept: Collection[str], configuration: Any) -> GraphModule:
        """Return a copy of the network with an observer at each weight and activation, except at nodes in fp32."""
        with quiet():
            from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
            from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

            quantizer = XNNPACKQuantizer().set_global(configuration)
            quantizer.set_filter_function(lambda node: node.name not in kept)
            prepared: GraphModule = prepare_pt2e(copy.deepcopy(self._graph), quantizer)
        return prepared


def _static_configuration() -> Any:
    """Return a `QuantizationConfig` of XNNPACK with `FakeQuantize` for observers."""
    from torchao.quantization.pt2e import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MinMaxObserver, eps=_SMALLEST_SCALE),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=PerChannelMinMaxObserver, eps=_SMALLEST_SCALE),
    )
    return QuantizationConfig(activation, activation, weight, None, False)


def _has_observed_weight(node: Node) -> bool:
    """Return whether the quantizer has taken a layer: it may leave some out."""
    return node.target in WITH_WEIGHTS and isinstance(node.args[1], Node) and node.args[1].op == "call_module"


def _recorder(values: dict[str, NDArray[np.float32]], name: str) -> Any:
    def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        values[name] = arguments[0].numpy()

    return record


def _quantizers(prepared: GraphModule) -> list[Any]:
    from torchao.quantization.pt2e import FakeQuantize

    return [module for module in prepared.modules() if isinstance(module, FakeQuantize)]


def _activation_quantizers(prepared: GraphModule) -> dict[str, Any]:
    """Return the `FakeQuantize` of each activation, by the name of its node. Several nodes can share one."""
    quantizers = set(_quantizers(prepared))
    calls = [node for node in prepared.graph.nodes if node.op == "call_module"]
    return {
        node.args[0].name: prepared.get_submodule(node.target)
        for node in calls
        if node.args[0].op != "get_attr" and prepared.get_submodule(node.target) in quantizers
    }


def _ranges_of(quantizers: Mapping[str, Any], ranges: Ranges) -> dict[Any, tuple[float, float]]:
    """Return the range of each quantizer: that of all activations that share it."""
    found: dict[Any, tuple[float, float]] = {}
    for name, quantizer in quantizers.items():
        low, high = (float(bound) for bound in ranges[name])
        before = found.get(quantizer, (low, high))
        found[quantizer] = min(low, before[0]), max(high, before[1])
    return found
