"""Compare what two models predict for the same images: one class, or a set of labels."""

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.scores import applicable_labels, predicted_classes, thresholds
from cifarx_serve.spec import ModelSpec


def best_classes(outputs: NDArray[np.float32], spec: ModelSpec | None) -> NDArray[np.int64]:
    """Return the predicted class of each image, (N,).

    Args:
        outputs: what the model returns, (N, output size).
        spec: how its outputs become predictions; None for the class with the largest output.
    """
    if spec is None:
        best: NDArray[np.int64] = outputs.argmax(axis=1)
        return best
    return predicted_classes(outputs, spec)


def predictions_differ(
    reference: NDArray[np.float32], artifact: NDArray[np.float32], spec: ModelSpec | None
) -> NDArray[np.bool_]:
    """Return for each image, (N,), whether two models predict another class, or another set of labels.

    Args:
        reference, artifact: what the models return, (N, output size).
        spec: as for `best_classes`.
    """
    if spec is None or not spec.multi_label:
        differ: NDArray[np.bool_] = best_classes(reference, spec) != best_classes(artifact, spec)
        return differ
    labels = applicable_labels(reference, spec) != applicable_labels(artifact, spec)
    any_label: NDArray[np.bool_] = np.logical_or.reduce(labels, axis=1)
    return any_label


def decision_boundaries(spec: ModelSpec) -> NDArray[np.float64]:
    """Return the output from which each label of a sigmoid applies, float64 (output size,).

    The sigmoid increases, so a score of at least t is a logit of at least log(t / (1 - t)).
    """
    scores = thresholds(spec)
    if spec.output == "probabilities":
        return scores
    with np.errstate(divide="ignore"):  # a threshold of 0 or 1
        return np.log(scores) - np.log1p(-scores)
