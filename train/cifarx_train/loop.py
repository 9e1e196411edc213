"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from cifarx_serve.errors import CheckFailed
from cifarx_serve.spec import InputSpec
from cifarx_train.callbacks.base import LOG_EVERY, Callback, StepReport
from cifarx_train.checkpoints.rng_state import random_states, set_random_states
from cifarx_train.cuda_graph import GraphedStep
from cifarx_train.data.augmentation import Augmentation
from cifarx_train.data.loaders.device import DeviceImages, ToInput
from cifarx_train.data.loaders.streaming import StreamedImages
from cifarx_train.distributed import Distributed
from cifarx_train.models.layers.batchnorm import settle_norms
from cifarx_train.models.layers.full_window_conv import skip_padding
from cifarx_train.optim.ema import Ema
from cifarx_train.optim.optimizers import Optimizers
from cifarx_train.optim.schedule import lr_factor
from cifarx_train.recipes import Recipe

State: TypeAlias = dict[str, Any]

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EpochEnd(NamedTuple):
    """An epoch trained, not yet eval_model: its number from 0, the steps done so far, the loss of its last batch.

    `whole` is false where the run was stopped before the epoch's last step.
    """

    epoch: int
    step: int
    loss: float
    images_per_s: float
    whole: bool


class Loop:
    """Trains a network on a data set by a recipe, an epoch at a time.

    Attributes:
        module: the network that is trained.
        epoch: the epoch that is trained or comes next, from 0.
        done: the steps of it that are done.
        step: the steps of the run that are done.
        epoch_steps, steps: of an epoch, and of the whole run.
        seconds: of training, over all the processes that took part in the run one after another.
        good: what to call the last checkpoint that was saved, for the error that ends a run.
    """

    def __init__(
        self,
        module: nn.Module,
        images: DeviceImages | StreamedImages,
        spec: InputSpec,
        recipe: Recipe,
        *,
        device: torch.device,
        seed: int = 0,
        ranks: Distributed = Distributed(),  # noqa: B008 - immutable
    ) -> None:
        on_cpu = device.type == "cpu"  # where convolutions gain by the activations' layout and lose by the weights'
        if on_cpu:
            skip_padding(module)
        elif recipe.channels_last:
            module = module.to(memory_format=torch.channels_last)
        self.module = module
        self.epoch = self.done = self.step = 0
        self.seconds = 0.0
        self.good = ""
        self._images, self._recipe, self._ranks, self._device = images, recipe, ranks, device
        self.epoch_steps = len(epoch_batches(torch.empty(len(images)), recipe.batch_size))
        self.steps = recipe.epochs * self.epoch_steps
        settle_norms(module, self.steps)
        self._augment = Augmentation(recipe, spec, device)
        self._to_input = ToInput(spec, device, channels_last=recipe.channels_last or on_cpu)
        self._optimizers = Optimizers(module, recipe)
        self._weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._ema = Ema(module, recipe.ema) if recipe.ema is not None else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        replica = ranks.replicate(module)
        self._forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(replica) if recipe.compile else replica
        self._train_on: Callable[..., torch.Tensor] = self._train_eagerly
        graphed = device.type == "cuda" and ranks.size == 1 and recipe.precision != "fp16"  # its scaler asks the host
        self._norm_in_step = graphed or recipe.max_grad_norm is not None
        if graphed:
            self._train_on = GraphedStep(self._train_eagerly, device)
        self._shuffle = torch.Generator().manual_seed(seed)
        self._shuffle_state = self._shuffle.get_state()

    @property
    def eval_model(self) -> nn.Module:
        """The network that counts: the average of the weights where the recipe has one."""
        return self._ema.module if self._ema else self.module

    def epochs(self, callback: Callback, stop: Callable[[], bool] = lambda: False) -> Iterator[EpochEnd]:
        """Train, and pause after each epoch to let it be eval_model and saved.

        Args:
            callback: told of every step.
            stop: asked after every step; when it says so the epoch that is being trained is the last.

        Raises:
            CheckFailed: the loss is no longer a finite number.
        """
        while self.epoch < self._recipe.epochs:
            self.module.train()
            started, first = time.perf_counter(), self.done
            self._shuffle.set_state(self._shuffle_state)  # also where an epoch goes on after a stop
            shuffled = torch.randperm(len(self._images), generator=self._shuffle)
            order = epoch_batches(shuffled, self._recipe.batch_size)[first:]
            loss, stopped = self._epoch(order, callback, stop)
            seconds = time.perf_counter() - started
            self.seconds += seconds
            epoch, trained = self.epoch, sum(map(len, order[: self.done - first]))
            if whole := self.done == self.epoch_steps:
                self.epoch, self.done = epoch + 1, 0
                self._shuffle_state = self._shuffle.get_state()
            yield EpochEnd(epoch, self.step, loss, trained / seconds, whole)
            if stopped:
                return

    def _epoch(self, order: list[torch.Tensor], callback: Callback, stop: Callable[[], bool]) -> tuple[float, bool]:
        """The steps of an epoch that `order` still has: the loss of the last one, and whether the run was stopped."""
        logged = time.perf_counter()
        result, stopped = torch.zeros(2), False
        batches = self._images.batches([self._ranks.share(batch) for batch in order])
        for batch, (images, labels) in zip(order, batches, strict=True):
            factor = lr_factor(self._recipe, self.step, self.steps)
            self._optimizers.set_rate(factor)
            if self._ranks.size == 1:
                result = self._train_on(images, labels)
            else:
                result = self._train_on(images, labels, len(labels) * self._ranks.size / self._ranks.shared(len(batch)))
            self.step += 1
            self.done += 1
            if self._ema:
                self._ema.update(self.step)
            callback.on_step(self.step)
            if self.step % LOG_EVERY == 0:
                loss, norm = self._read(result)
                now = time.perf_counter()
                speed, logged = LOG_EVERY * self._recipe.batch_size / (now - logged), now
                callback.on_log(StepReport(self.step, loss, factor * self._recipe.learning_rate, norm, speed))
            if stopped := stop():
                break
        return self._read(result)[0], stopped

    def _train_eagerly(self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """One step on the device: float32 (2,), the loss and, where the step needs it, the norm of its gradient.

        `weight` makes the mean over the ranks' images, which DDP averages the gradients of, the mean over all images.
        """
        recipe = self._recipe
        self._optimizers.zero_grad()
        inputs = self._to_input(self._augment(images))
        with torch.autocast(self._device.type, _AUTOCAST[recipe.precision], enabled=recipe.precision != "fp32"):
            loss = functional.cross_entropy(self._forward(inputs), labels, label_smoothing=recipe.label_smoothing)
        if self._ranks.size > 1:
            loss = loss * weight
        self._scaler.scale(loss).backward()
        for optimizer in self._optimizers.members:
            self._scaler.unscale_(optimizer)
        norm = self._gradient_norm() if self._norm_in_step else torch.zeros_like(loss)
        if recipe.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._weights, recipe.max_grad_norm, norm)
        for optimizer in self._optimizers.members:
            self._scaler.step(optimizer)
        self._scaler.update()
        return torch.stack((loss.detach().float(), norm))

    def _gradient_norm(self) -> torch.Tensor:
        return nn.utils.get_total_norm([weight.grad for weight in self._weights if weight.grad is not None])

    def _read(self, result: torch.Tensor) -> tuple[float, float]:
        """The loss and gradient norm of a step, over all ranks: the host waits for the device here.

        Raises:
            CheckFailed: the loss is no longer a finite number.
        """
        loss, norm = (self._ranks.total(result.clone()) / self._ranks.size).tolist()
        if not self._norm_in_step:  # a step that clips nothing leaves the gradient as it was
            norm = self._gradient_norm().item()
        return require_finite(loss, self.step, self.good), norm

    def state(self) -> State:
        """What a bit-exact continuation needs beside the eval_model weights, as plain types and tensors."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            "step": self.step,
            "seconds": self.seconds,
            "optimizer": self._optimizers.state_dict(),
            "scaler": self._scaler.state_dict(),
            "weights": self.module.state_dict() if self._ema else {},
            "shuffle": self._shuffle_state,
            "random": random_states(self._device, self._ranks),
        }

    def restore(self, weights: State, state: State) -> None:
        """Continue from a checkpoint's eval_model weights and what `state` gave.

        Raises:
            KeyError, ValueError, RuntimeError: they are of another recipe or network.
        """
        self.module.load_state_dict(state["weights"] or weights)
        if self._ema:
            self._ema.module.load_state_dict(weights)
        self.epoch, self.done, self.step = state["epoch"], state["done"], state["step"]
        self.seconds = state["seconds"]
        self._optimizers.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._shuffle.set_state(state["shuffle"])
        self._shuffle_state = state["shuffle"]
        set_random_states(state["random"], self._device, self._ranks)


def epoch_batches(order: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """An epoch's order cut into batches; a last image alone joins the batch before: BatchNorm cannot train on one."""
    batches = list(order.split(batch_size))
    if batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def require_finite(loss: float, step: int, good: str) -> float:
    """The loss itself; raises CheckFailed, which names the last good checkpoint, where it is no finite number."""
    if not math.isfinite(loss):
        kept = f"{good} is the last good checkpoint" if good else "nothing was saved yet"
        raise CheckFailed(
            f"training diverged: the loss is {loss} at step {step}", f"use a lower --lr or max_grad_norm; {kept}"
        )
    return loss
