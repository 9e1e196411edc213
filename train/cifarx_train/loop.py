"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cifarx_serve.errors import CheckFailed
from cifarx_serve.spec import InputSpec
from cifarx_train.callbacks.base import LOG_EVERY_N_STEPS, Callback, StepReport
from cifarx_train.checkpoints.rng_state import get_rng_states, set_rng_states
from cifarx_train.class_balance import balanced_order
from cifarx_train.cuda_graph import GraphedStep, can_capture
from cifarx_train.data.augmentation import Augmentation
from cifarx_train.data.loaders.base import Loader
from cifarx_train.data.loaders.device import InputTransform
from cifarx_train.data.mixing import Targets, select_targets
from cifarx_train.distillation import Teacher
from cifarx_train.distributed import Distributed
from cifarx_train.freezing import freeze
from cifarx_train.loss import Loss
from cifarx_train.models.layers.batchnorm import raise_batchnorm_momentum
from cifarx_train.models.layers.full_window_conv import convert_full_window_convs
from cifarx_train.optim.ema import ModelEma
from cifarx_train.optim.optimizers import Optimizers, lr_factor
from cifarx_train.recipes import Recipe

StateDict: TypeAlias = dict[str, Any]

_AUTOCAST_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EpochResult(NamedTuple):
    """The result of training for one epoch, before evaluation.

    Attributes:
        epoch: the number of the epoch, from 0.
        step: the number of steps completed so far.
        loss: the training loss of the last batch.
        images_per_s: the training throughput.
        complete: False if the run was stopped before the last step of the epoch.
    """

    epoch: int
    step: int
    loss: float
    images_per_s: float
    complete: bool


class TrainingLoop:
    """Trains a model on a dataset according to a recipe, one epoch at a time.

    Args:
        module: the model, on the device.
        images: the training images.
        spec: the input of the model.
        recipe: the recipe.
        device: the device to train on.
        seed: the seed of the shuffling.
        distributed: the processes that train together.
        head: the keys of the parameters that `recipe.backbone_lr` is not for.
        teacher: the teacher of a distillation, or None.
        class_weights: what the loss of an image of each class is multiplied by, float32 (classes,), or None.

    Attributes:
        module: the model that is trained.
        epoch: the current or next epoch, from 0.
        epoch_step: the number of steps completed within that epoch.
        step: the number of steps completed in the run.
        steps_per_epoch: the number of steps of an epoch.
        total_steps: the number of steps of the run.
        elapsed_s: the training time in seconds, including the time before a resume.
        last_checkpoint: the last saved checkpoint, for the error message when training diverges.
    """

    def __init__(
        self,
        module: nn.Module,
        images: Loader,
        spec: InputSpec,
        recipe: Recipe,
        *,
        device: torch.device,
        seed: int = 0,
        distributed: Distributed = Distributed(),  # noqa: B008 - immutable
        head: frozenset[str] = frozenset(),
        teacher: Teacher | None = None,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        # On a CPU, convolutions are faster with channels-last activations and slower with channels-last weights.
        on_cpu = device.type == "cpu"
        if on_cpu:
            convert_full_window_convs(module)
        elif recipe.channels_last:
            module = module.to(memory_format=torch.channels_last)
        self.module = module
        self.epoch = self.epoch_step = self.step = 0
        self.elapsed_s = 0.0
        self.last_checkpoint = ""
        self._images, self._recipe, self._distributed, self._device = images, recipe, distributed, device
        self._step_images = recipe.batch_size * recipe.accumulate
        batches = split_into_batches(torch.empty(len(images)), self._step_images)
        self.steps_per_epoch = len(batches)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        raise_batchnorm_momentum(module, self.total_steps)
        self._frozen_layers = freeze(module, recipe.freeze)
        self._augment = Augmentation(recipe, spec, device)
        self._loss = Loss(recipe, teacher, class_weights)
        self._transform = InputTransform(spec, device, channels_last=on_cpu or bool(recipe.channels_last))
        captured = can_capture(device, recipe, distributed) and (teacher is None or teacher.runs_on_device)
        self._optimizers = Optimizers(module, recipe, head=head, capturable=captured)
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._ema = ModelEma(module, recipe.ema_decay) if recipe.ema_decay is not None else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self._replica = replica = distributed.data_parallel(module)
        self._forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(replica) if recipe.compile else replica
        self._grad_norm_in_step = captured or recipe.max_grad_norm is not None
        self._train_step: Callable[..., torch.Tensor] = self._eager_step
        if captured:
            self._train_step = GraphedStep(self._eager_step, device, len(batches[0]))
        self._shuffle_generator = torch.Generator().manual_seed(seed)
        self._shuffle_state = self._shuffle_generator.get_state()

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and saved: the weight average if the recipe uses one."""
        return self._ema.module if self._ema else self.module

    def train_epochs(
        self, callback: Callback, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[EpochResult]:
        """Train, and yield after each epoch so that the model can be evaluated and saved.

        Args:
            callback: receives `on_step_end` and `on_log`.
            should_stop: called after every step. Training stops after the step for which it returns True.

        Raises:
            CheckFailed: the loss is not finite.
        """
        while self.epoch < self._recipe.epochs:
            self.module.train()
            for layer in self._frozen_layers:
                layer.eval()
            started, first = time.perf_counter(), self.epoch_step
            self._shuffle_generator.set_state(self._shuffle_state)  # repeats the order when resumed within an epoch
            order = self._epoch_order()
            batches = split_into_batches(order, self._step_images)[first:]
            loss, stopped = self._train_batches(batches, callback, should_stop)
            seconds = time.perf_counter() - started
            self.elapsed_s += seconds
            epoch, num_images = self.epoch, sum(map(len, batches[: self.epoch_step - first]))
            if complete := self.epoch_step == self.steps_per_epoch:
                self.epoch, self.epoch_step = epoch + 1, 0
                self._shuffle_state = self._shuffle_generator.get_state()
            yield EpochResult(epoch, self.step, loss, num_images / seconds, complete)
            if stopped:
                return

    def _epoch_order(self) -> torch.Tensor:
        if self._recipe.sampler == "balanced":
            return balanced_order(self._images.labels.cpu(), self._shuffle_generator)
        return torch.randperm(len(self._images), generator=self._shuffle_generator)

    def _train_batches(
        self, order: list[torch.Tensor], callback: Callback, should_stop: Callable[[], bool]
    ) -> tuple[float, bool]:
        """Train on batches of image indices. Return the loss of the last step and whether `should_stop` ended it."""
        logged_at = time.perf_counter()
        metrics, stopped = torch.zeros(2), False
        shards = [self._distributed.shard(batch) for batch in order]
        for batch, shard, inputs in zip(order, shards, self._images.inputs(shards), strict=True):
            factor = lr_factor(self._recipe, self.step, self.total_steps)
            self._optimizers.set_lr(factor)
            if self._distributed.world_size == 1:
                metrics = self._train_step(*inputs)
            else:
                metrics = self._eager_step(*inputs, loss_weight=self._loss_weight(len(shard), len(batch)))
            self.step += 1
            self.epoch_step += 1
            if self._ema:
                self._ema.update(self.step)
            callback.on_step_end(self.step)
            if self.step % LOG_EVERY_N_STEPS == 0:
                loss, grad_norm = self._read_metrics(metrics)
                now = time.perf_counter()
                images_per_s = LOG_EVERY_N_STEPS * self._step_images / (now - logged_at)
                logged_at = now
                lr = factor * self._recipe.learning_rate
                callback.on_log(StepReport(self.step, loss, lr, grad_norm, images_per_s))
            if stopped := should_stop():
                break
        return self._read_metrics(metrics)[0], stopped

    def _loss_weight(self, local_size: int, batch_size: int) -> float:
        """Return the factor that turns DDP's mean over ranks into the mean over all images of the batch."""
        return local_size * self._distributed.world_size / self._distributed.total_images(batch_size)

    def _eager_step(self, *inputs: torch.Tensor, loss_weight: float = 1.0) -> torch.Tensor:
        """Train on the images of one step.

        Args:
            inputs: the batch, as the loader's `inputs` yields it.
            loss_weight: see `_loss_weight`.

        Returns:
            float32 (2,) on the device: the loss, and the gradient norm if it is computed within the step.
        """
        recipe = self._recipe
        self._optimizers.zero_grad()
        images, labels = self._images.batch(*inputs)
        images, targets = self._augment.mix(self._augment(images), labels)
        loss = self._backward(images, targets, loss_weight)
        for optimizer in self._optimizers.optimizers:
            self._scaler.unscale_(optimizer)
        grad_norm = self._grad_norm() if self._grad_norm_in_step else torch.zeros_like(loss)
        if recipe.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._trainable, recipe.max_grad_norm, grad_norm)
        for optimizer in self._optimizers.optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        return torch.stack((loss.detach().float(), grad_norm))

    def _backward(self, images: torch.Tensor, targets: Targets, loss_weight: float) -> torch.Tensor:
        """Compute the gradients of the mean loss over all images, in as many passes as the recipe says.

        Returns:
            The loss, times `loss_weight`.
        """
        if self._recipe.accumulate == 1:
            loss = self._compute_loss(images, targets)
            if self._distributed.world_size > 1:
                loss = loss * loss_weight
            self._scaler.scale(loss).backward()
            return loss
        total = torch.zeros((), device=self._device)
        parts = split_evenly(len(images), self._parts(len(images)))
        for number, part in enumerate(parts, start=1):
            weight = loss_weight * (part.stop - part.start) / len(images)
            # The last pass averages the gradients over the processes.
            with nullcontext() if number == len(parts) else self._without_averaging():
                loss = self._compute_loss(images[part], select_targets(targets, part)) * weight
                self._scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _parts(self, count: int) -> int:
        """Return in how many passes this process computes the gradients of `count` images."""
        per_pass = max(1, self._recipe.batch_size // self._distributed.world_size)
        # BatchNorm cannot train on one image.
        return max(1, min(math.ceil(count / per_pass), count if per_pass == 1 else count // 2))

    def _without_averaging(self) -> AbstractContextManager[None]:
        replica = self._replica
        return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()

    def _compute_loss(self, images: torch.Tensor, targets: Targets) -> torch.Tensor:
        network_input = self._transform(images)
        dtype, enabled = _AUTOCAST_DTYPES[self._recipe.precision], self._recipe.precision != "fp32"
        with torch.autocast(self._device.type, dtype, enabled=enabled):
            return self._loss(self._forward(network_input), targets, images)

    def _grad_norm(self) -> torch.Tensor:
        return nn.utils.get_total_norm([weight.grad for weight in self._trainable if weight.grad is not None])

    def _read_metrics(self, metrics: torch.Tensor) -> tuple[float, float]:
        """Return the loss and gradient norm of a step, averaged over the ranks. Synchronizes with the device.

        Raises:
            CheckFailed: the loss is not finite.
        """
        mean = self._distributed.all_reduce(metrics.clone()) / self._distributed.world_size
        loss, grad_norm = mean.tolist()
        if not self._grad_norm_in_step:  # without clipping, the step leaves the gradients unchanged
            grad_norm = self._grad_norm().item()
        return require_finite_loss(loss, self.step, self.last_checkpoint), grad_norm

    def state_dict(self) -> StateDict:
        """Return the training state as plain types and tensors.

        Together with the weights of `eval_model` it resumes the run bit for bit.
        """
        return {
            "epoch": self.epoch,
            "done": self.epoch_step,
            "step": self.step,
            "seconds": self.elapsed_s,
            "optimizer": self._optimizers.state_dict(),
            "scaler": self._scaler.state_dict(),
            "weights": self.module.state_dict() if self._ema else {},
            "shuffle": self._shuffle_state,
            "random": get_rng_states(self._device, self._distributed),
        }

    def load_state_dict(self, state: StateDict, weights: StateDict) -> None:
        """Resume from a checkpoint.

        Args:
            state: what `state_dict` returned.
            weights: the state dict of `eval_model`.

        Raises:
            KeyError, ValueError, RuntimeError: the checkpoint belongs to another recipe or model.
        """
        self.module.load_state_dict(state["weights"] or weights)
        if self._ema:
            self._ema.module.load_state_dict(weights)
        self.epoch, self.epoch_step, self.step = state["epoch"], state["done"], state["step"]
        self.elapsed_s = state["seconds"]
        self._optimizers.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._shuffle_generator.set_state(state["shuffle"])
        self._shuffle_state = state["shuffle"]
        set_rng_states(state["random"], self._device, self._distributed)


def split_into_batches(order: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """Split the order of an epoch, int64 (N,), into batches.

    A single remaining image is added to the batch before it, because BatchNorm cannot train on one image.
    """
    batches = list(order.split(batch_size))
    if batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def split_evenly(count: int, parts: int) -> list[slice]:
    """Return consecutive slices of `count` items, whose lengths differ by at most one."""
    limits = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(limits)]


def require_finite_loss(loss: float, step: int, last_checkpoint: str) -> float:
    """Return the loss if it is finite.

    Raises:
        CheckFailed: the loss is not finite. The message names the last checkpoint.
    """
    if not math.isfinite(loss):
        saved = f"{last_checkpoint} is the last good checkpoint" if last_checkpoint else "no checkpoint was saved"
        raise CheckFailed(
            f"training diverged: the loss is {loss} at step {step}", f"use a lower --lr or max_grad_norm; {saved}"
        )
    return loss
