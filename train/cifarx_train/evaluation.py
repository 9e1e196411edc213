"""Loss and accuracy of a model on a whole split."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cifarx_serve.spec import InputSpec
from cifarx_train.data.loaders.device import DeviceImages, ToInput
from cifarx_train.data.loaders.streaming import StreamedImages
from cifarx_train.distributed import Distributed

# Pixels a batch: large enough to keep any device busy, small enough for the activations of large images. The result
# does not depend on it but for the order of the loss's sum.
_BATCH_PIXELS = 500 * 32 * 32
_MISTAKES = 25


class Mistake(NamedTuple):
    """A test image (its position in the split) that the model takes for another class, and how sure it is of it."""

    position: int
    predicted: int
    score: float


class Evaluation(NamedTuple):
    """What a model does on a whole split.

    Attributes:
        loss: the mean cross-entropy over every image.
        accuracy: a fraction, over every image.
        confusion: int64 (classes, classes), images by true and by predicted class.
        mistakes: those that the model is surest of, the surest first; of this rank's share of the images.
    """

    loss: float
    accuracy: float
    confusion: NDArray[np.int64]
    mistakes: Sequence[Mistake]


class Evaluator:
    """Evaluates a model on a split; each rank takes its share, and no image counts twice."""

    def __init__(
        self,
        images: DeviceImages | StreamedImages,
        spec: InputSpec,
        classes: int,
        device: torch.device,
        ranks: Distributed,
    ) -> None:
        self._images = images
        self._classes = classes
        self._device = device
        self._ranks = ranks
        self._positions = torch.arange(len(images))[ranks.rank :: ranks.size]
        self._order = self._positions.split(max(1, _BATCH_PIXELS // (spec.height * spec.width)))
        self._prepare = ToInput(spec, device)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Put the model in eval mode and judge it, in fp32, on every image of the split."""
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        confusion = torch.zeros(self._classes * self._classes, dtype=torch.int64, device=self._device)
        wrong, predicted = [], []
        for images, labels in self._images.batches(self._order):
            logits = model(self._prepare(images))
            loss += functional.cross_entropy(logits, labels, reduction="sum")
            index = logits.argmax(1)  # not of the softmax, which may round two logits to one score
            score = logits.softmax(1).gather(1, index[:, None])[:, 0]
            confusion += torch.bincount(labels * self._classes + index, minlength=len(confusion))
            wrong.append(torch.where(index == labels, 0.0, score))
            predicted.append(index)
        self._ranks.total(loss)
        counts = self._ranks.total(confusion).view(self._classes, self._classes).cpu().numpy()
        return Evaluation(
            loss=loss.item() / len(self._images),
            accuracy=int(counts.trace()) / len(self._images),
            confusion=counts,
            mistakes=self._surest(torch.cat(wrong), torch.cat(predicted)),
        )

    def _surest(self, wrong: torch.Tensor, predicted: torch.Tensor) -> list[Mistake]:
        scores, places = wrong.topk(min(_MISTAKES, len(wrong)))
        return [
            Mistake(int(self._positions[place]), int(predicted[place]), score)
            for score, place in zip(scores.tolist(), places.cpu().tolist(), strict=True)
            if score > 0
        ]
