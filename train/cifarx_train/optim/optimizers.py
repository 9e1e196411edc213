"""The optimizers and the learning rate schedule of a recipe."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from cifarx_serve.errors import UsageError
from cifarx_train.models.outputs import unwrapped
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

    Args:
        module: the model, on the device.
        recipe: provides the optimizer, its settings and the peaks of the learning rates.
        head: the names of the parameters that `recipe.backbone_lr` is not for.
        capturable: whether a CUDA graph may capture `step`. It then reads the learning rates from device memory.

    Attributes:
        optimizers: PyTorch's optimizers, or Muon and SGD.

    Raises:
        UsageError: the recipe uses Muon and the model has no weights that Muon could train.
    """

    def __init__(
        self, module: nn.Module, recipe: Recipe, *, head: frozenset[str] = frozenset(), capturable: bool = False
    ) -> None:
        self.optimizers: Sequence[Optimizer] = _create_optimizers(module, recipe, head, capturable)
        self._groups: ParamGroups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self._peaks = [float(group["lr"]) for group in self._groups]
        self._factor = 1.0
        self._rates: torch.Tensor | None = None
        if capturable:
            device = self._groups[0]["params"][0].device
            self._device_peaks = torch.tensor(self._peaks, device=device)
            self._rates = self._device_peaks.clone()
            for group, rate in zip(self._groups, self._rates.unbind(), strict=True):
                group["lr"] = rate

    def set_lr(self, factor: float) -> None:
        """Set the learning rate of every parameter group to `factor` times its peak."""
        if factor == self._factor:
            return
        self._factor = factor
        if self._rates is not None:
            torch.mul(self._device_peaks, factor, out=self._rates)
            return
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def zero_grad(self) -> None:
        """Reset the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all optimizers as plain types and tensors."""
        return {str(index): optimizer.state_dict() for index, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, possibly on another device.

        The options of the parameter groups stay those of this run: the recipe determines the hyperparameters, and the
        device determines how a step is computed.

        Raises:
            KeyError, ValueError: the state belongs to other optimizers.
        """
        for index, optimizer in enumerate(self.optimizers):
            saved = states[str(index)]
            options = [{**group} for group in optimizer.param_groups]
            groups = [
                {**own, "params": group["params"]} for own, group in zip(options, saved["param_groups"], strict=True)
            ]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
            _match_memory_formats(optimizer)
            for group, own in zip(optimizer.param_groups, options, strict=True):
                group.update(own)  # with the tensor that `set_lr` writes to, instead of a copy
        self._groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def _match_memory_formats(optimizer: Optimizer) -> None:
    """Give the state of every parameter the memory format of the parameter.

    A run on a GPU may use another format than one on a CPU. Fused optimizers do not support different formats: on a CPU
    they would combine values of different weights.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _create_optimizers(module: nn.Module, recipe: Recipe, head: frozenset[str], capturable: bool) -> list[Optimizer]:
    sgd = partial(SGD, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    match recipe.optimizer:
        case "sgd":
            return [sgd(_groups(module, recipe, head), lr=recipe.learning_rate)]
        case "adamw":
            groups = _groups(module, recipe, head)
            return [AdamW(groups, lr=recipe.learning_rate, fused=True, capturable=capturable)]
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1 and parameter[0].numel() > 1]
    if len(matrices) < 2:
        raise UsageError("muon needs weights to train before the last layer", "use --set optimizer=sgd")
    hidden, last = matrices[:-1], matrices[-1]  # the last matrix turns features into logits
    others = [parameter for parameter in trainable if not any(parameter is matrix for matrix in matrices)]
    sgd_groups: ParamGroups = [{"params": [last], "lr": recipe.head_lr, "weight_decay": recipe.weight_decay}]
    if others:
        sgd_groups.append({"params": others, "lr": recipe.bias_lr, "weight_decay": 0.0})
    return [Muon(hidden, recipe.learning_rate, recipe.momentum, recipe.nesterov), sgd(sgd_groups)]


def _groups(module: nn.Module, recipe: Recipe, head: frozenset[str]) -> ParamGroups:
    """Group the parameters by their decay and, with `backbone_lr`, by their learning rate."""
    trainable = {name: value for name, value in unwrapped(module).named_parameters() if value.requires_grad}
    if recipe.backbone_lr is None:
        return _decay_groups(list(trainable.values()), recipe)
    backbone = _decay_groups([value for name, value in trainable.items() if name not in head], recipe)
    return [
        *_decay_groups([value for name, value in trainable.items() if name in head], recipe),
        *({**group, "lr": recipe.backbone_lr} for group in backbone),
    ]


def _decay_groups(trainable: Sequence[nn.Parameter], recipe: Recipe) -> ParamGroups:
    """Group the parameters into weights with decay, and biases and norms (one dimension) without."""
    weights = [parameter for parameter in trainable if parameter.ndim > 1]
    others = [parameter for parameter in trainable if parameter.ndim < 2]
    groups: ParamGroups = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
