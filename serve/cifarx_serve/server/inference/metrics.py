"""Prometheus metrics of a server. Any worker's page shows the metrics of all workers."""

import os
import threading
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from cifarx_serve.server.inference.batcher import BatchEvent
from cifarx_serve.server.inference.drift import DriftMonitor
from cifarx_serve.server.inference.multiprocess_metrics import BufferedValues
from cifarx_serve.server.inference.prediction_metrics import PredictionMetrics
from cifarx_serve.server.inference.shadow_metrics import SECONDS_BUCKETS, ShadowMetrics, ShadowObservation
from cifarx_serve.server.settings import PROMETHEUS_MULTIPROC_DIR
from cifarx_serve.spec import ModelSpec

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_IMAGES_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one process, shared with other processes if the variable `PROMETHEUS_MULTIPROC_DIR` is set.

    Args:
        worker: the number of this process. No other process that runs at the same time may have it.
    """

    def __init__(self, worker: int = 0) -> None:
        self._shared = BufferedValues(worker) if PROMETHEUS_MULTIPROC_DIR in os.environ else None
        if self._shared:
            values.ValueClass = self._shared.value_class
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter("cifarx_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._request_seconds = Histogram(
            "cifarx_request_seconds",
            "Time from the head of a request to its response.",
            ["route"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._queue_seconds = Histogram(
            "cifarx_queue_seconds",
            "Time that a request was queued for the model.",
            ["model"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._compute_seconds = Histogram(
            "cifarx_compute_seconds",
            "Time that the model took for a batch.",
            ["model"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._batch_images = Histogram(
            "cifarx_batch_images", "Images per batch.", ["model"], buckets=_IMAGES_BUCKETS, registry=registry
        )
        self._queue_images = Gauge(
            "cifarx_queue_images", "Images in the queue.", ["model"], registry=registry, multiprocess_mode="livesum"
        )
        self._model_seconds = Counter(
            "cifarx_model_request_seconds",
            "Time that requests spent in the queue and in the model.",
            ["model"],
            registry=registry,
        )
        self._unanswered = Counter(
            "cifarx_batch_failures", "Requests of batches that got no result.", ["model"], registry=registry
        )
        self._failures = Counter(
            "cifarx_model_failures", "Requests for a model that failed.", ["model"], registry=registry
        )
        self._failure_seconds = Counter(
            "cifarx_model_failure_seconds",
            "Time from the arrival of a request for a model to its failure.",
            ["model"],
            registry=registry,
        )
        self._errors = Counter("cifarx_errors", "Requests answered with an error.", ["cause"], registry=registry)
        self._predictions = PredictionMetrics(registry)
        self._drift = DriftMonitor()
        self._drift_lock = threading.Lock()
        self._shadow: ShadowMetrics | None = None
        self._by_route: dict[tuple[str, int | str], tuple[Counter, Histogram]] = {}

    def observe_request(self, route: str, status: int | str, seconds: float, cause: str | None) -> None:
        """Count a request that was answered; `cause` is that of an error response.

        Over gRPC, `route` is the full name of the method, and `status` the name of the status code.
        """
        requests, request_seconds = self._of_route(route, status)
        requests.inc()
        request_seconds.observe(seconds)
        if cause is not None:
            self._errors.labels(cause).inc()

    def _of_route(self, route: str, status: int | str) -> tuple[Counter, Histogram]:
        """Cache the metrics per route and status: `labels()` is slow, and there are few route templates."""
        if (route, status) not in self._by_route:
            self._by_route[route, status] = (
                self._requests.labels(route, status),
                self._request_seconds.labels(route),
            )
        return self._by_route[route, status]

    def batch_observer(self, model: str) -> Callable[[BatchEvent], None]:
        """Return a function that counts the batches of one model, for `Batcher`'s `on_batch`."""
        queue_seconds, compute_seconds = self._queue_seconds.labels(model), self._compute_seconds.labels(model)
        batch_images, queue_images = self._batch_images.labels(model), self._queue_images.labels(model)
        model_seconds, unanswered = self._model_seconds.labels(model), self._unanswered.labels(model)

        def observe(event: BatchEvent) -> None:
            batch_images.observe(event.images)
            compute_seconds.observe(event.compute_s)
            queue_images.set(event.queued_images)
            for seconds in event.queue_s:
                queue_seconds.observe(seconds)
            model_seconds.inc(sum(event.queue_s) + event.compute_s * len(event.queue_s))
            if event.failed:
                unanswered.inc(event.failed)

        return observe

    def failure_observer(self, model: str) -> Callable[[float], None]:
        """Return a function that counts a failed request for a model, and the seconds since it arrived."""
        failures, failure_seconds = self._failures.labels(model), self._failure_seconds.labels(model)

        def observe(seconds: float) -> None:
            failures.inc()
            failure_seconds.inc(seconds)

        return observe

    def prediction_observer(self, model: str, spec: ModelSpec) -> Callable[[BatchEvent], None]:
        """Return a function that counts the predictions of one version of a model, for `Batcher`'s `on_batch`."""
        counter = self._predictions.counter(model, spec)
        with self._drift_lock:
            self._drift.set_model(model, spec)

        def observe(event: BatchEvent) -> None:
            for outputs in event.outputs:
                counter.add(outputs)

        return observe

    def shadow_observer(self, model: str) -> Callable[[ShadowObservation], None]:
        """Return a function that counts what becomes of the requests that the shadow of one model answers."""
        if self._shadow is None:
            self._shadow = ShadowMetrics(self._registry)
        return self._shadow.observer(model)

    def flush(self) -> None:
        """Make everything counted so far visible to other processes now. Call it in the thread that counts."""
        self._predictions.count()
        if self._shared:
            self._shared.flush()

    def all_processes(self) -> CollectorRegistry:
        """Return the metrics of all processes, as far as they have been flushed."""
        if not self._shared:
            return self._registry
        all_processes = CollectorRegistry()
        MultiProcessCollector(all_processes)
        return all_processes

    def render(self) -> bytes:
        """Return the metrics of all processes in Prometheus's text format, as far as they have been flushed."""
        if not self._drift.is_active:
            return generate_latest(self.all_processes())
        families = list(self.all_processes().collect())
        with self._drift_lock:
            families.append(self._drift.observe(families))
        return generate_latest(_Collected(families))

    @property
    def is_drift_due(self) -> bool:
        """Whether `observe_drift` should be called, because nobody has read the metrics for a while."""
        return self._drift.is_due

    def observe_drift(self) -> None:
        """Remember the counts of all processes, from which the drift of the next minutes is measured."""
        with self._drift_lock:
            self._drift.observe(self.all_processes().collect())


class _Collected(Collector):
    """Metrics that have been collected."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
