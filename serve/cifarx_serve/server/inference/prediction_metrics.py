"""The metrics of predictions: their classes and scores, counted for many batches at a time."""

import asyncio
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram

from cifarx_serve.prediction_counts import SCORE_BOUNDS, count_predictions
from cifarx_serve.spec import ModelSpec

PREDICTIONS: Final = "cifarx_predictions"
SCORES: Final = "cifarx_prediction_score"

_COUNT_INTERVAL_S: Final = 0.1
_MAX_NUMBERS: Final = 1 << 16
"""When this many outputs wait to be counted, they are counted at once, to limit the memory."""


class PredictionMetrics:
    """The metrics of the predictions of all models of one process.

    Args:
        registry: contains them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._predictions = Counter(PREDICTIONS, "Images by predicted class.", ["model", "class"], registry=registry)
        self._scores = _BulkHistogram(
            SCORES, "Scores of the predicted classes.", ["model"], buckets=SCORE_BOUNDS, registry=registry
        )
        self._counters: dict[str, PredictionCounter] = {}

    def counter(self, model: str, spec: ModelSpec) -> "PredictionCounter":
        """Return what counts the predictions of a model. It replaces that of an earlier version."""
        if earlier := self._counters.get(model):
            earlier.count()
        counter = PredictionCounter(
            spec, lambda name: self._predictions.labels(model, name), self._scores.labels(model)
        )
        self._counters[model] = counter
        return counter

    def count(self) -> None:
        """Count all predictions that wait. Call it in the thread of the event loop."""
        for counter in self._counters.values():
            counter.count()


class PredictionCounter:
    """Counts the predictions of one version of a model. Use it in one event loop.

    The outputs of batches are collected and counted ten times a second, because counting those of a hundred batches
    takes as long as those of one: a twentieth of the time of a small model.

    Args:
        spec: the spec of the model.
        class_counter: returns the counter of a class.
        scores: the histogram of the scores.
    """

    def __init__(self, spec: ModelSpec, class_counter: Callable[[str], Counter], scores: "_BulkHistogram") -> None:
        self._spec = spec
        self._class_counter = class_counter
        self._counters: dict[int, Counter] = {}
        self._scores = scores
        self._outputs: list[NDArray[np.float32]] = []
        self._numbers = 0

    def add(self, outputs: NDArray[np.float32]) -> None:
        """Count the predictions of a batch soon, (N, output_size)."""
        if not self._outputs:
            asyncio.get_running_loop().call_later(_COUNT_INTERVAL_S, self.count)
        self._outputs.append(outputs)
        self._numbers += outputs.size
        if self._numbers > _MAX_NUMBERS:
            self.count()

    def count(self) -> None:
        """Count the predictions that wait."""
        if not self._outputs:
            return
        outputs, self._outputs, self._numbers = self._outputs, [], 0
        counts = count_predictions(np.concatenate(outputs), self._spec)
        for index in np.flatnonzero(counts.classes).tolist():
            if index not in self._counters:
                self._counters[index] = self._class_counter(self._spec.class_names[index])
            self._counters[index].inc(int(counts.classes[index]))
        self._scores.observe_many(counts.scores, counts.score_sum)


class _BulkHistogram(Histogram):
    """A histogram to which many observations can be added at once."""

    def observe_many(self, counts: NDArray[np.int64], total: float) -> None:
        """Add observations.

        Args:
            counts: how many there are in each bucket, without the last one, which has no bound.
            total: the sum of their values.
        """
        self._sum.inc(total)
        for bucket, count in zip(self._buckets, counts.tolist(), strict=False):
            if count:
                bucket.inc(count)
