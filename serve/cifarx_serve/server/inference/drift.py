"""How far the predictions of the last minutes are from those for the test images of the parity check."""

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from cifarx_serve.prediction_counts import SCORE_BOUNDS, population_stability_index
from cifarx_serve.server.inference.prediction_metrics import PREDICTIONS, SCORES
from cifarx_serve.spec import ModelSpec

WINDOW_S: Final = 600.0
SNAPSHOT_INTERVAL_S: Final = 60.0
"""The index is that of the last 10 to 11 minutes; until a worker has run for so long, since the start of the server."""

MIN_IMAGES: Final = 100
"""With fewer images, chance alone makes the index large: it is about the number of bins divided by that of images."""


class _Baseline(NamedTuple):
    """The rates for the test images, in the order of the classes and of the bins."""

    class_names: tuple[str, ...]
    classes: NDArray[np.float64]
    scores: NDArray[np.float64]


class _Counts(NamedTuple):
    """The counts of one model, since the start of the server."""

    class_names: tuple[str, ...]
    classes: NDArray[np.float64]
    scores: NDArray[np.float64]


class _Snapshot(NamedTuple):
    taken_at: float
    counts: dict[str, _Counts]


class DriftMonitor:
    """Compares the predictions of all workers with the baselines of the models. Use it in one thread at a time."""

    def __init__(self) -> None:
        self._baselines: dict[str, _Baseline] = {}
        self._snapshots: deque[_Snapshot] = deque()

    @property
    def is_active(self) -> bool:
        """Whether any model has a baseline."""
        return bool(self._baselines)

    @property
    def is_due(self) -> bool:
        """Whether `observe` should be called although nobody reads the metrics."""
        return self.is_active and (
            not self._snapshots or time.monotonic() - self._snapshots[-1].taken_at >= SNAPSHOT_INTERVAL_S
        )

    def set_model(self, model: str, spec: ModelSpec) -> None:
        """Compare a model with the parity report of its spec, if that has the rates of its predictions."""
        parity = spec.parity
        self._baselines.pop(model, None)
        if parity is None or parity.class_rates is None or parity.score_rates is None:
            return
        if (len(parity.class_rates), len(parity.score_rates)) != (len(spec.class_names), len(SCORE_BOUNDS)):
            return  # of other classes, or of a later version with other bins
        classes, scores = np.array(parity.class_rates), np.array(parity.score_rates)
        if classes.sum() > 0 and scores.sum() > 0:
            self._baselines[model] = _Baseline(spec.class_names, classes, scores)

    def observe(self, families: Iterable[Metric]) -> GaugeMetricFamily:
        """Return the index of each model that has a baseline and enough images.

        Args:
            families: the metrics of all workers now.
        """
        baselines = dict(self._baselines)  # a model can be loaded meanwhile, in the event loop
        now, counts = time.monotonic(), _count(families, baselines)
        start = self._start_of_window(now)
        gauge = GaugeMetricFamily(
            "cifarx_input_drift_psi",
            "Population stability index of the predictions of the last minutes, compared with those for test images.",
            labels=["model", "of"],
        )
        for model, baseline in baselines.items():
            found = counts[model]
            earlier = start.get(model)
            if earlier is not None and earlier.class_names == found.class_names:  # a reload can change the classes
                found = _Counts(found.class_names, found.classes - earlier.classes, found.scores - earlier.scores)
            if found.scores.sum() < MIN_IMAGES or not found.classes.sum():
                continue
            gauge.add_metric([model, "classes"], population_stability_index(baseline.classes, found.classes))
            gauge.add_metric([model, "scores"], population_stability_index(baseline.scores, found.scores))
        if not self._snapshots or now - self._snapshots[-1].taken_at >= SNAPSHOT_INTERVAL_S:
            self._snapshots.append(_Snapshot(now, counts))
        return gauge

    def _start_of_window(self, now: float) -> dict[str, _Counts]:
        """Return the counts at the start of the window, and forget earlier ones; none if the window is not full."""
        while len(self._snapshots) > 1 and now - self._snapshots[1].taken_at >= WINDOW_S:
            self._snapshots.popleft()
        is_full = bool(self._snapshots) and now - self._snapshots[0].taken_at >= WINDOW_S
        return self._snapshots[0].counts if is_full else {}


def _count(families: Iterable[Metric], baselines: Mapping[str, _Baseline]) -> dict[str, _Counts]:
    """Return the predictions of the models since the start of the server."""
    classes: defaultdict[tuple[str, str], float] = defaultdict(float)
    at_most: defaultdict[tuple[str, float], float] = defaultdict(float)
    for family in families:
        for sample in family.samples:
            if sample.name == f"{PREDICTIONS}_total":
                classes[sample.labels["model"], sample.labels["class"]] += sample.value
            elif sample.name == f"{SCORES}_bucket":
                at_most[sample.labels["model"], float(sample.labels["le"])] += sample.value
    return {
        model: _Counts(
            baseline.class_names,
            np.array([classes[model, name] for name in baseline.class_names]),
            np.diff([at_most[model, bound] for bound in SCORE_BOUNDS], prepend=0.0),
        )
        for model, baseline in baselines.items()
    }
