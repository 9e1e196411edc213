"""The loss of a training step: the cross-entropy with the labels, and with what a teacher answers."""

from torch import Tensor
from torch.nn import functional

from cifarx_train.data.mixing import MixedLabels, Targets
from cifarx_train.distillation import Teacher
from cifarx_train.recipes import Recipe


class Loss:
    """Computes the mean loss of a batch.

    Args:
        recipe: provides `label_smoothing` and what concerns distillation.
        teacher: the teacher of a distillation, or None.
        class_weights: what the cross-entropy of an image of each class is multiplied by, float32 (classes,), or None.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher | None = None, class_weights: Tensor | None = None) -> None:
        self._recipe, self._teacher, self._class_weights = recipe, teacher, class_weights

    def __call__(self, logits: Tensor, targets: Targets, images: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: (N, classes).
            targets: what the images show.
            images: the images that the logits are for, uint8 (N, height, width, channels).
        """
        loss = self._cross_entropy(logits, targets)
        if self._teacher is None:
            return loss
        weight, temperature = self._recipe.distillation_weight, self._recipe.distillation_temperature
        assert weight is not None, "the recipe of a distillation is complete"
        assert temperature is not None, "the recipe of a distillation is complete"
        distilled = distillation_loss(logits, self._teacher.logits(images), temperature)
        return (1.0 - weight) * loss + weight * distilled

    def _cross_entropy(self, logits: Tensor, targets: Targets) -> Tensor:
        smoothing = self._recipe.label_smoothing
        if not isinstance(targets, MixedLabels):
            if self._class_weights is None:
                return functional.cross_entropy(logits, targets, label_smoothing=smoothing)
            return self._image_losses(logits, targets).mean()
        first, second = (self._image_losses(logits, labels) for labels in (targets.first, targets.second))
        return (targets.weight * first + (1.0 - targets.weight) * second).mean()

    def _image_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted loss of each image, (N,).

        PyTorch would divide their sum by that of the weights, which differs between batches and processes.
        """
        smoothing = self._recipe.label_smoothing
        losses = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return losses if self._class_weights is None else losses * self._class_weights[labels]


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the model's probabilities from the teacher's, at a temperature.

    It is multiplied by the square of the temperature, so that its gradient does not shrink with it: Hinton et al. 2015,
    "Distilling the knowledge in a neural network".

    Args:
        logits, teacher_logits: (N, classes).
        temperature: what both are divided by.
    """
    student = functional.log_softmax(logits.float() / temperature, 1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, 1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
