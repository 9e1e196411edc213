"""Loss and accuracy of a model on a whole split."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from cifarx_train.data.on_device import DeviceImages

# Large enough to keep any device busy; the result does not depend on it but for the order of the loss's sum.
_BATCH_SIZE = 500


class Evaluation(NamedTuple):
    """`loss` is the mean cross-entropy, `accuracy` a fraction, over every image of the split."""

    loss: float
    accuracy: float


@torch.inference_mode()
def evaluate(model: nn.Module, data: DeviceImages) -> Evaluation:
    """Put the model in eval mode and judge it on every image of a split."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=data.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=data.labels.device)
    for inputs, labels in data.batches(_BATCH_SIZE):
        logits = model(inputs)
        loss += functional.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return Evaluation(loss.item() / len(data), correct.item() / len(data))
