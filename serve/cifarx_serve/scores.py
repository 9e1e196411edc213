"""Converts the outputs of a model to scores and predicted labels, as the model spec says."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.spec import ModelSpec

DEFAULT_THRESHOLD: Final = 0.5
"""The score from which a label applies, unless the spec has thresholds."""


def class_scores(outputs: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.float64]:
    """Return the score of each class, float64 (N, classes) from 0 to 1.

    The scores of a softmax sum to one, also for two classes with one output. Those of several labels are independent.
    If the spec has a temperature, they are calibrated by it (Guo et al., 2017, arXiv:1706.04599).

    Args:
        outputs: logits or probabilities as the spec says, (N, output_size).
        spec: the model's spec.
    """
    if spec.temperature is None:
        return _uncalibrated_scores(outputs, spec)
    return _uncalibrated_scores(np.divide(outputs, spec.temperature, dtype=np.float64), spec)


def _uncalibrated_scores(outputs: NDArray[np.float32 | np.float64], spec: ModelSpec) -> NDArray[np.float64]:
    """Return the scores at temperature 1, which decide: rounding cannot move a calibrated score over a threshold."""
    if spec.output == "probabilities":
        scores = outputs.astype(np.float64)
    else:
        scores = softmax(outputs) if spec.activation == "softmax" else sigmoid(outputs)
    return np.concatenate([1 - scores, scores], axis=1) if spec.outputs == 1 else scores


def predicted_classes(outputs: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.int64]:
    """Return the best class of each image, int64 (N,).

    It has the highest score, and is the first of several with the same. The second class of two with one output is
    predicted from its threshold on.

    Args:
        outputs: as for `class_scores`.
        spec: the model's spec.
    """
    if spec.outputs == 1:
        return reach_thresholds(_uncalibrated_scores(outputs, spec)[:, 1:], spec)[:, 0].astype(np.int64)
    # Not of the scores, which can be equal for different outputs.
    best: NDArray[np.int64] = outputs.argmax(axis=1)
    return best


def applicable_labels(outputs: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.bool_]:
    """Return whether each label applies to each image, bool (N, classes).

    For a model with several labels per image, these are the labels whose score reaches their threshold, none to all of
    them. For other models it is the predicted class alone. Two models agree on an image if their rows are equal. A
    temperature changes none of this.

    Args:
        outputs: as for `class_scores`.
        spec: the model's spec.
    """
    if spec.multi_label:
        return reach_thresholds(_uncalibrated_scores(outputs, spec), spec)
    only: NDArray[np.bool_] = predicted_classes(outputs, spec)[:, None] == np.arange(len(spec.class_names))
    return only


def thresholds(spec: ModelSpec) -> NDArray[np.float64]:
    """Return the score from which each output of a sigmoid applies, float64 (output_size,)."""
    return np.array(spec.thresholds or (DEFAULT_THRESHOLD,) * spec.output_size)


def reach_thresholds(scores: NDArray[np.float64], spec: ModelSpec) -> NDArray[np.bool_]:
    """Return whether the score of each output of a sigmoid reaches its threshold, bool (N, output_size).

    Scores and thresholds are compared in single precision, as PyTorch compares a tensor with a number.
    """
    return scores.astype(np.float32) >= thresholds(spec).astype(np.float32)


def softmax(logits: NDArray[np.float32 | np.float64]) -> NDArray[np.float64]:
    """Return softmax scores along the last axis, in double precision and without overflow for large logits."""
    highest = np.maximum.reduce(logits, axis=-1, keepdims=True)
    exponentials: NDArray[np.float64] = np.exp(np.subtract(logits, highest, dtype=np.float64))
    exponentials /= np.add.reduce(exponentials, axis=-1, keepdims=True)
    return exponentials


def sigmoid(logits: NDArray[np.float32 | np.float64]) -> NDArray[np.float64]:
    """Return the sigmoid of each logit, in double precision and without overflow for large logits."""
    exponentials = np.exp(-np.abs(logits, dtype=np.float64))
    scores: NDArray[np.float64] = np.where(logits < 0, exponentials, 1) / (1 + exponentials)
    return scores
