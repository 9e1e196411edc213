"""Test whether a network's accuracy is better than chance: wrong preprocessing and a wrong class order are not."""

import shlex
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.compare import Reference
from cifarx_export.parity.predictions import best_classes
from cifarx_serve.errors import CheckFailed
from cifarx_serve.progress import Progress
from cifarx_train.binomial import CONFIDENCE, interval, upper_tail

LEVEL: Final = 0.001
"""The significance level: a network that guesses passes with this probability."""


class ChanceTest(NamedTuple):
    """The accuracy of predictions, and whether it could be chance.

    The test is one-sided, exact and binomial: it compares the number of correct predictions with the accuracy that the
    same predictions have in random order, the expected agreement of Cohen (1960, doi:10.1177/001316446002000104). A
    network that always predicts the most frequent class is at chance, however frequent that class is.

    Attributes:
        images: number of images.
        correct: number of correct predictions.
        classes: number of classes of the network.
        chance: accuracy of the same predictions in random order.
        p_value: probability of at least this many correct predictions by chance.
    """

    images: int
    correct: int
    classes: int
    chance: float
    p_value: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.images

    @property
    def at_chance(self) -> bool:
        return self.p_value > LEVEL

    @property
    def is_decisive(self) -> bool:
        """Whether there are enough images for a network without any error to pass."""
        return upper_tail(self.images, self.images, self.chance) <= LEVEL

    def describe(self) -> str:
        """Return the accuracy with its confidence interval, and what chance is, on one line."""
        low, high = interval(self.correct, self.images)
        return (
            f"accuracy {self.accuracy:.2%} of {self.images:,} images ({low:.1%} to {high:.1%} with {CONFIDENCE:.0%} "
            f"confidence), chance is {self.chance:.1%}"
        )


def measure_chance(predictions: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> ChanceTest:
    """Test predictions against labels, both class indices (N,), N at least 1."""
    images, correct = len(labels), int((predictions == labels).sum())
    predicted, actual = (np.bincount(values, minlength=classes) / images for values in (predictions, labels))
    chance = float(predicted @ actual)
    return ChanceTest(images, correct, classes, chance, upper_tail(correct, images, chance))


def require_better_than_chance(
    reference: Reference, name: str, *, trained_here: bool, allowed: bool, progress: Progress
) -> None:
    """Report the accuracy of a network, and refuse it at chance, if the data has labels for its classes.

    The accuracy is that of the test images. Training images that joined them take part in the decision, and it is left
    open where even these are too few.

    Args:
        reference: from `run_reference`.
        name: the file of the network, for messages.
        trained_here: whether `cifarx train` wrote it and its spec is unchanged: then chance is only reported.
        allowed: whether the user allows it.
        progress: called with a line about the accuracy.

    Raises:
        CheckFailed: the accuracy is chance, although neither of the two permits it.
    """
    labels, tested = reference.data.labels, reference.data.test_images
    if labels is None:
        return
    predictions, classes = best_classes(reference.logits, reference.spec), len(reference.spec.class_names)
    if tested:
        progress(f"reference: {measure_chance(predictions[:tested], labels[:tested], classes).describe()}")
    found = measure_chance(predictions, labels, classes)
    if not found.at_chance:
        return
    if not found.is_decisive:
        progress(f"note: {found.images} images are too few to tell whether the accuracy is better than chance")
        return
    problem = f"accuracy {found.accuracy:.1%} on {found.classes} classes is chance"
    if trained_here or allowed:
        progress(f"note: {problem} (one-sided binomial test, p = {found.p_value:.2g})")
        return
    raise CheckFailed(
        problem,
        f"preprocessing or class order is likely wrong: try `cifarx diagnose {shlex.quote(name)}` with labeled images, "
        "or allow it with --allow-chance-accuracy",
    )
