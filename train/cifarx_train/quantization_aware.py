"""Quantization-aware fine-tuning: a network learns to answer as before although its numbers are rounded.

The rounding is that of int8 in ONNX, as `cifarx export` does it: the weights of each output channel have one scale and
7 bits; the input of the network, the output of each layer with its normalization and ReLU, and residual sums are uint8,
in ranges from training images. Rounding has no gradient, so that of the identity takes its place within
the range (Jacob et al. 2018, arXiv:1712.05877). The network is its own teacher.
"""

import copy
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cifarx_serve.errors import UsageError
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import InputSpec
from cifarx_train.logit_matching import match_logits, random_batches, recent_mean

LEARNING_RATE: Final = 5e-5
STEPS: Final = 1000
SECONDS: Final = 90.0

_CALIBRATION_BATCHES: Final = 8

_WEIGHT_LEVELS: Final = 64
"""Weights are rounded to this many levels on either side of zero, as ONNX Runtime does with `reduce_range`."""

_ACTIVATION_LEVELS: Final = 255

_CUT_OFF: Final = 5e-5
"""The part of the values beyond either end of a range. The conversion tries this range, and wider ones."""

_MAX_SAMPLES: Final = 2**17
"""The number of values of a batch that a range is found from."""

_aten = torch.ops.aten
_LAYERS: Final = (_aten.conv2d.default, _aten.conv2d.padding, _aten.linear.default)
_ADDITIONS: Final = (_aten.add.Tensor, _aten.add_.Tensor)
_FUSED: Final = (
    _aten.batch_norm.default,
    *(_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default),
)
"""Operators that a conversion fuses with the layer before, so that only their output is rounded."""


class FineTuned(NamedTuple):
    """The result of a fine-tuning.

    Attributes:
        weights: the state dict of the network. The weights are rounded, so that int8 holds them exactly.
        steps: the number of steps.
        before, after: the mean squared difference of the logits from those of the original network, relative to their
            variance, before the first step and over the last steps.
    """

    weights: dict[str, Tensor]
    steps: int
    before: float
    after: float


class _RoundedWeight(nn.Module):
    """Rounds a weight to int8 with one scale per output channel, the first axis."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / _WEIGHT_LEVELS
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -_WEIGHT_LEVELS, _WEIGHT_LEVELS)


class _RoundedActivation(nn.Module):
    """Rounds an activation to uint8. While it observes, it passes values through and finds their range instead."""

    def __init__(self) -> None:
        super().__init__()
        self.observes = True
        self._low = self._high = 0.0

    def forward(self, values: Tensor) -> Tensor:
        if self.observes:
            flat = values.flatten()
            sample = flat[:: 1 + len(flat) // _MAX_SAMPLES].numpy()
            low, high = np.quantile(sample, [_CUT_OFF, 1 - _CUT_OFF])
            self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
            return values
        scale = max((self._high - self._low) / _ACTIVATION_LEVELS, torch.finfo(torch.float32).tiny)
        zero = min(max(round(-self._low / scale), 0), _ACTIVATION_LEVELS)
        return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, _ACTIVATION_LEVELS)


def fine_tune_for_int8(
    module: nn.Module,
    images: NDArray[np.uint8],
    spec: InputSpec,
    *,
    steps: int = STEPS,
    seconds: float = SECONDS,
    progress: Progress = silent,
) -> FineTuned:
    """Fine-tune a copy of a network so that it keeps its answers in int8.

    Args:
        module: the network, on the CPU. Batch normalization and dropout stay in eval mode.
        images: training images at the network's input size, uint8 (N, height, width, channels).
        spec: the input of the network.
        steps: largest number of steps of 64 images.
        seconds: time after which no other step begins.
        progress: called with a line of text every few steps.

    Raises:
        UsageError: the network cannot be traced, has no layer that can be rounded, or there are no images.
    """
    batches = random_batches(images, spec)
    teacher = module.eval()
    student = _trace(teacher, next(batches))
    weights, activations = _insert_rounding(student)
    with torch.no_grad():
        for _ in range(_CALIBRATION_BATCHES):
            student(next(batches))
    for activation in activations:
        activation.observes = False
    losses = match_logits(
        student,
        teacher,
        batches,
        learning_rate=LEARNING_RATE,
        steps=steps,
        seconds=seconds,
        name="int8",
        progress=progress,
    )
    return FineTuned(_rounded_state(teacher, student, weights), len(losses), losses[0], recent_mean(losses))


def _trace(module: nn.Module, example: Tensor) -> GraphModule:
    """Return a copy of a network as a graph whose parameters have the same names.

    Raises:
        UsageError: the network cannot be traced.
    """
    try:
        return torch.export.export(copy.deepcopy(module), (example,)).module()
    except Exception as error:  # the errors of tracing have no common base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"the network cannot be traced to fine-tune it ({reason})", "use another precision") from error


def _insert_rounding(network: GraphModule) -> tuple[list[str], list[_RoundedActivation]]:
    """Round weights and activations of a network. Returns the names of the weights, and the rounding of activations.

    Raises:
        UsageError: no layer has weights of its own.
    """
    graph, ends = network.graph, _rounded_outputs(network)
    weights = {node: weight for node in graph.nodes if (weight := _weight(node)) is not None}
    if not weights:
        raise UsageError("the network has no layer that can be fine-tuned for int8", "use another precision")
    for layer, weight in weights.items():
        with graph.inserting_before(layer):
            layer.update_arg(1, _call(network, _RoundedWeight(), weight))
    activations = []
    for end in ends:
        activations.append(_RoundedActivation())
        users = list(end.users)
        with graph.inserting_after(end):
            rounded = _call(network, activations[-1], end)
        for user in users:
            user.replace_input_with(end, rounded)
    network.recompile()
    return [str(weight.target) for weight in weights.values()], activations


def _weight(node: Node) -> Node | None:
    """Return the weight of a layer if it is one of its own, and not computed."""
    weight = node.args[1] if node.target in _LAYERS else None
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


def _rounded_outputs(network: GraphModule) -> list[Node]:
    """Return the nodes whose output is rounded: the input, layers and sums of their outputs, but not the logits."""
    ends: dict[Node, None] = {}
    for node in network.graph.nodes:
        if node.op == "placeholder":
            ends[node] = None
        elif _weight(node) or (node.target in _ADDITIONS and any(source in ends for source in node.args)):
            ends[_fused_output(node)] = None
    return [end for end in ends if end.users and not any(user.op == "output" for user in end.users)]


def _fused_output(node: Node) -> Node:
    """Return the last of the operators after a node that are fused with it."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target in _FUSED:
        node = user
    return node


def _call(network: GraphModule, module: nn.Module, argument: Node) -> Node:
    name = f"rounding_{sum(1 for _ in network.children())}"
    network.add_submodule(name, module)
    return network.graph.call_module(name, (argument,))


@torch.no_grad()
def _rounded_state(original: nn.Module, student: GraphModule, rounded: list[str]) -> dict[str, Tensor]:
    """Return the state dict of the original network with the weights of the student, rounded as in training."""
    trained, rounding = student.state_dict(), _RoundedWeight()
    return {
        name: rounding(trained[name]) if name in rounded else trained.get(name, value).clone()
        for name, value in original.state_dict().items()
    }
