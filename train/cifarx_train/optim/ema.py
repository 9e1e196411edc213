"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import nn


class ModelEma:
    """Exponential moving averages of the parameters and floating-point buffers of a model.

    The decay at step t is min(decay, (1 + t) / (10 + t)), so that the untrained weights are forgotten quickly. This is
    the warm-up of TensorFlow's `ExponentialMovingAverage`.

    Args:
        module: the model that is trained.
        decay: the decay per step after the warm-up.

    Attributes:
        module: a copy of the model in eval mode that holds the averages.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        averages, values = self.module.state_dict(keep_vars=True), module.state_dict(keep_vars=True)
        floats = [name for name, value in values.items() if value.is_floating_point()]
        self._averages, self._values = [averages[name] for name in floats], [values[name] for name in floats]
        counters = [name for name in values if name not in floats]
        self._average_counters = [averages[name] for name in counters]
        self._counters = [values[name] for name in counters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after step number `step`, counted from 1. Does not synchronize with the device."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._values, 1.0 - decay)
        if self._counters:
            torch._foreach_copy_(self._average_counters, self._counters)
