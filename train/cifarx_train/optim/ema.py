"""An exponential moving average of a network's weights."""

import copy

import torch
from torch import nn


class Ema:
    """Averages of a module's parameters and floating-point buffers.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the first weights, which mean nothing, are forgotten
    at once (the warm-up of TensorFlow's ExponentialMovingAverage).

    Attributes:
        module: a copy of the network that holds the averages; what is eval_model and saved.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        averages, values = self.module.state_dict(keep_vars=True), module.state_dict(keep_vars=True)
        floats = [name for name, value in values.items() if value.is_floating_point()]
        self._averages, self._values = [averages[name] for name in floats], [values[name] for name in floats]
        self._counts = [(averages[name], values[name]) for name in values if name not in floats]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, from 1; nothing waits for the device."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._values, 1.0 - decay)
        for average, value in self._counts:
            average.copy_(value)
