"""From a recipe to optimizers over a network's parameters."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from cifarx_serve.errors import UsageError
from cifarx_train.optim.muon import Muon
from cifarx_train.recipes import Recipe

Groups: TypeAlias = list[dict[str, Any]]


class Optimizers:
    """The optimizers of a run as one; every group's rate is its own peak times one factor.

    Attributes:
        members: PyTorch's optimizers, or Muon.
    """

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self.members: Sequence[Optimizer] = _members(module, recipe)
        for group in self._groups():
            group["peak"] = float(group["lr"])
            device = group["params"][0].device
            if device.type == "cuda":  # a captured graph reads the rate from the device
                group["lr"] = torch.tensor(group["peak"], device=device)

    def set_rate(self, factor: float) -> None:
        """The rate of the next step, as a share of the peak."""
        for group in self._groups():
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(group["peak"] * factor)
            else:
                group["lr"] = group["peak"] * factor

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for member in self.members:
            member.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """What a continuation needs, as plain types and tensors."""
        return {str(position): member.state_dict() for position, member in enumerate(self.members)}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; the rates stay those of the recipe."""
        rates = [(group["lr"], group["peak"]) for group in self._groups()]
        for position, member in enumerate(self.members):
            member.load_state_dict(states[str(position)])
        for group, (rate, peak) in zip(self._groups(), rates, strict=True):
            group["lr"], group["peak"] = rate, peak

    def _groups(self) -> Groups:
        return [group for member in self.members for group in member.param_groups]


def _members(module: nn.Module, recipe: Recipe) -> list[Optimizer]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    sgd = partial(SGD, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    match recipe.optimizer:
        case "sgd":
            return [sgd(_decayed(trained, recipe), lr=recipe.learning_rate)]
        case "adamw":
            on_gpu = trained[0].device.type == "cuda"  # where the step may be captured in a graph
            return [AdamW(_decayed(trained, recipe), lr=recipe.learning_rate, fused=True, capturable=on_gpu)]
    matrices = [parameter for parameter in trained if parameter.ndim > 1 and parameter[0].numel() > 1]
    if len(matrices) < 2:
        raise UsageError("muon found no weights to train below the last layer", "use --set optimizer=sgd")
    filters, head = matrices[:-1], matrices[-1]  # the last weights turn features into logits
    others = [parameter for parameter in trained if not any(parameter is matrix for matrix in matrices)]
    groups: Groups = [
        {"params": [head], "lr": recipe.head_lr, "weight_decay": recipe.weight_decay},
        {"params": others, "lr": recipe.bias_lr, "weight_decay": 0.0},
    ]
    plain = sgd([group for group in groups if group["params"]])
    return [Muon(filters, recipe.learning_rate, recipe.momentum, recipe.nesterov), plain]


def _decayed(trained: Sequence[nn.Parameter], recipe: Recipe) -> Groups:
    """Weights with the recipe's decay; biases and norms, which have one dimension, without."""
    weights = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups: Groups = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
