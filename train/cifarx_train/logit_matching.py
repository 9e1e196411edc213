"""Logit matching: a changed network learns to answer as the original one does.

The original network is the teacher: the loss is the squared difference of the student's logits from its own, relative
to their variance (Ba and Caruana 2014, arXiv:1312.6184), so it needs no labels.
"""

import math
import time
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cifarx_serve.errors import UsageError
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.progress import Progress
from cifarx_serve.spec import InputSpec

BATCH_SIZE: Final = 64

STEPS_PER_REPORT: Final = 50


def random_batches(images: NDArray[np.uint8], spec: InputSpec) -> Iterator[Tensor]:
    """Return an endless iterator over random batches of images, normalized: float32 (64, channels, height, width).

    Raises:
        UsageError: there are no images.
    """
    if not len(images):
        raise UsageError("there are no training images to fine-tune on", "give a dataset with a train split")
    return _draw_batches(images, spec)


def _draw_batches(images: NDArray[np.uint8], spec: InputSpec) -> Iterator[Tensor]:
    random = np.random.default_rng(0)
    while True:
        yield torch.from_numpy(normalize(images[random.integers(0, len(images), BATCH_SIZE)], spec))


def match_logits(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterator[Tensor],
    *,
    learning_rate: float,
    steps: int,
    seconds: float,
    name: str,
    progress: Progress,
) -> list[float]:
    """Train a network, and return the loss of each step.

    The optimizer is Adam. The learning rate falls to zero along half a cosine.

    Args:
        student: the network to train. Its modules stay in the mode that they are in.
        teacher: the network that it learns from.
        batches: inputs of both.
        learning_rate: the first learning rate.
        steps: largest number of steps.
        seconds: time after which no other step begins; at least one is made.
        name: what it is for, at the start of lines of progress.
        progress: called with a line of text every few steps.
    """
    started = time.monotonic()
    optimizer = torch.optim.Adam(student.parameters(), learning_rate)
    losses: list[float] = []
    while (spent := max(len(losses) / steps, (time.monotonic() - started) / seconds)) < 1 or not losses:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * min(spent, 1)))
        batch = next(batches)
        with torch.no_grad():
            expected = teacher(batch)
        loss = functional.mse_loss(student(batch), expected) / expected.var().clamp_min(1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % STEPS_PER_REPORT == 0:
            progress(f"{name}: fine-tuning, step {len(losses)}: difference {recent_mean(losses):.2e}")
    return losses


def recent_mean(losses: list[float]) -> float:
    """Return the mean of the last losses."""
    return float(np.mean(losses[-STEPS_PER_REPORT:]))
