"""The optimizers and the learning rate schedule of a recipe."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from cifarx_serve.errors import UsageError
from cifarx_train.optim.muon import Muon
from cifarx_train.recipes import Recipe

ParamGroups: TypeAlias = list[dict[str, Any]]


def lr_factor(recipe: Recipe, step: int, total_steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak.

    The learning rate rises linearly during the warm-up. It then stays constant or decays to zero, linearly or along
    half a cosine (SGDR, Loshchilov and Hutter 2017, without restarts).

    Args:
        recipe: its `schedule` and `warmup_fraction` are used.
        step: the number of the step, from 0.
        total_steps: the number of steps of the run.
    """
    warmup_steps = round(recipe.warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    match recipe.schedule:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "constant":
            return 1.0


class Optimizers:
    """All optimizers of a run. One factor scales the learning rate of every parameter group.

    Attributes:
        optimizers: PyTorch's optimizers, or Muon and SGD.

    Raises:
        UsageError: the recipe uses Muon and the model has no weights that Muon could train.
    """

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self.optimizers: Sequence[Optimizer] = _create_optimizers(module, recipe)
        for group in self._param_groups():
            group["peak"] = float(group["lr"])
            device = group["params"][0].device
            if device.type == "cuda":  # a captured CUDA graph reads the learning rate from device memory
                group["lr"] = torch.tensor(group["peak"], device=device)

    def set_lr(self, factor: float) -> None:
        """Set the learning rate of every parameter group to `factor` times its peak."""
        for group in self._param_groups():
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(group["peak"] * factor)
            else:
                group["lr"] = group["peak"] * factor

    def zero_grad(self) -> None:
        """Reset the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all optimizers as plain types and tensors."""
        return {str(index): optimizer.state_dict() for index, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. The learning rates stay those of the recipe.

        Raises:
            KeyError, ValueError: the state belongs to other optimizers.
        """
        rates = [(group["lr"], group["peak"]) for group in self._param_groups()]
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(states[str(index)])
        for group, (rate, peak) in zip(self._param_groups(), rates, strict=True):
            group["lr"], group["peak"] = rate, peak

    def _param_groups(self) -> ParamGroups:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def _create_optimizers(module: nn.Module, recipe: Recipe) -> list[Optimizer]:
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sgd = partial(SGD, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    match recipe.optimizer:
        case "sgd":
            return [sgd(_decay_groups(trainable, recipe), lr=recipe.learning_rate)]
        case "adamw":
            on_gpu = trainable[0].device.type == "cuda"  # where the step may be captured in a CUDA graph
            return [AdamW(_decay_groups(trainable, recipe), lr=recipe.learning_rate, fused=True, capturable=on_gpu)]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1 and parameter[0].numel() > 1]
    if len(matrices) < 2:
        raise UsageError("muon needs weights to train before the last layer", "use --set optimizer=sgd")
    hidden, head = matrices[:-1], matrices[-1]  # the last matrix turns features into logits
    others = [parameter for parameter in trainable if not any(parameter is matrix for matrix in matrices)]
    groups: ParamGroups = [
        {"params": [head], "lr": recipe.head_lr, "weight_decay": recipe.weight_decay},
        {"params": others, "lr": recipe.bias_lr, "weight_decay": 0.0},
    ]
    sgd_groups = [group for group in groups if group["params"]]
    return [Muon(hidden, recipe.learning_rate, recipe.momentum, recipe.nesterov), sgd(sgd_groups)]


def _decay_groups(trainable: Sequence[nn.Parameter], recipe: Recipe) -> ParamGroups:
    """Group the parameters into weights with decay, and biases and norms (one dimension) without."""
    weights = [parameter for parameter in trainable if parameter.ndim > 1]
    others = [parameter for parameter in trainable if parameter.ndim < 2]
    groups: ParamGroups = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
