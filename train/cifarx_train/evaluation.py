"""Loss and accuracy of a model on a whole split."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cifarx_serve.spec import InputSpec
from cifarx_train.data.loaders.base import Loader
from cifarx_train.data.loaders.device import InputTransform
from cifarx_train.distributed import Distributed

# Pixels per batch: large enough to keep any device busy, small enough for the activations of large images. It affects
# the result only through the order of summation of the loss.
_BATCH_PIXELS = 500 * 32 * 32
_MAX_MISTAKES = 25


class Mistake(NamedTuple):
    """A misclassified test image.

    Attributes:
        image_index: the index of the image in the split.
        predicted: the predicted class.
        confidence: the softmax probability of the predicted class.
    """

    image_index: int
    predicted: int
    confidence: float


class Evaluation(NamedTuple):
    """The result of a model on a whole split.

    Attributes:
        loss: the mean cross-entropy over all images.
        accuracy: the fraction of images that are classified correctly.
        confusion_matrix: int64 (classes, classes), the number of images by true class (row) and predicted class.
        mistakes: the misclassified images of this rank with the highest confidence, sorted by it.
    """

    loss: float
    accuracy: float
    confusion_matrix: NDArray[np.int64]
    mistakes: Sequence[Mistake]


class Evaluator:
    """Evaluates models on a split. Every rank evaluates its share, and every image counts once.

    Args:
        images: the images of the split.
        spec: the input of the model.
        num_classes: the number of classes.
        device: the device of the model.
        distributed: the processes that evaluate together.
    """

    def __init__(
        self,
        images: Loader,
        spec: InputSpec,
        num_classes: int,
        device: torch.device,
        distributed: Distributed,
    ) -> None:
        self._images = images
        self._num_classes = num_classes
        self._distributed = distributed
        self._indices = torch.arange(len(images))[distributed.rank :: distributed.world_size]
        self._batches = self._indices.split(max(1, _BATCH_PIXELS // (spec.height * spec.width)))
        self._transform = InputTransform(spec, device)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Set the model to eval mode and evaluate it in fp32 on every image of the split."""
        model.eval()
        losses, cells, mistake_scores, predictions = [], [], [], []
        for images, labels in self._images.batches(self._batches):
            logits = model(self._transform(images))
            losses.append(functional.cross_entropy(logits, labels, reduction="sum"))
            predicted = logits.argmax(1)  # not of the softmax, which may round two logits to the same probability
            confidence = logits.softmax(1).gather(1, predicted[:, None])[:, 0]
            cells.append(labels * self._num_classes + predicted)
            mistake_scores.append(torch.where(predicted == labels, 0.0, confidence))
            predictions.append(predicted)
        loss = torch.stack(losses).cpu().double().sum()  # on the CPU, because MPS has no float64
        self._distributed.all_reduce(loss)
        confusion = torch.bincount(torch.cat(cells), minlength=self._num_classes**2)
        matrix = self._distributed.all_reduce(confusion).view(self._num_classes, self._num_classes).cpu().numpy()
        return Evaluation(
            loss=loss.item() / len(self._images),
            accuracy=int(matrix.trace()) / len(self._images),
            confusion_matrix=matrix,
            mistakes=self._top_mistakes(torch.cat(mistake_scores), torch.cat(predictions)),
        )

    @torch.inference_mode()
    def logits(self, model: nn.Module) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the logits of the images of this rank, float32 (N, classes), and their labels, as `evaluate` does."""
        model.eval()
        parts = [(model(self._transform(images)), labels) for images, labels in self._images.batches(self._batches)]
        logits, labels = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return logits.float().numpy(), labels.numpy()

    def _top_mistakes(self, scores: torch.Tensor, predictions: torch.Tensor) -> list[Mistake]:
        """Return the mistakes with the highest confidence; a score of zero means a correct prediction."""
        top_scores, positions = scores.topk(min(_MAX_MISTAKES, len(scores)))
        return [
            Mistake(int(self._indices[position]), int(predictions[position]), score)
            for score, position in zip(top_scores.tolist(), positions.cpu().tolist(), strict=True)
            if score > 0
        ]
