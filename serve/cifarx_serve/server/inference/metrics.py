"""What a server counts, for Prometheus: every worker's figures in one page, whichever worker is asked."""

import os
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from cifarx_serve.server.inference.batcher import Batch
from cifarx_serve.server.inference.multiprocess_metrics import SharedFigures
from cifarx_serve.server.settings import SHARED_FIGURES

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# From a tenth of a millisecond to ten seconds, about 1.6 times apart: a percentile between two is a fair guess.
_SECONDS: Final = (
    *(0.0001, 0.00016, 0.00025, 0.0004, 0.00063, 0.001, 0.0016, 0.0025, 0.004, 0.0063, 0.01, 0.016, 0.025),
    *(0.04, 0.063, 0.1, 0.16, 0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0, 6.3, 10.0),
)
_IMAGES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The figures of one process; those of all where `SHARED_FIGURES` is set."""

    def __init__(self) -> None:
        self._shared = SharedFigures() if SHARED_FIGURES in os.environ else None
        if self._shared:
            values.ValueClass = self._shared.value_class
        own = CollectorRegistry()
        self._registry = own
        self._requests = Counter("cifarx_requests", "Requests answered.", ["route", "status"], registry=own)
        self._seconds = Histogram(
            "cifarx_request_seconds", "From a request's head to its answer.", ["route"], buckets=_SECONDS, registry=own
        )
        self._queued = Histogram(
            "cifarx_queue_seconds", "A request's wait for the model.", ["model"], buckets=_SECONDS, registry=own
        )
        self._computed = Histogram(
            "cifarx_compute_seconds", "A call of the model.", ["model"], buckets=_SECONDS, registry=own
        )
        self._batch = Histogram(
            "cifarx_batch_images", "Images of a call of the model.", ["model"], buckets=_IMAGES, registry=own
        )
        self._waiting = Gauge(
            "cifarx_queue_images", "Images that wait.", ["model"], registry=own, multiprocess_mode="livesum"
        )
        self._routes: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._errors = Counter("cifarx_errors", "Requests answered with an error.", ["cause"], registry=own)

    def request(self, route: str, status: int, seconds: float, cause: str | None) -> None:
        """A request was answered; `cause` where it was with an error."""
        answered, took = self._of_route(route, status)
        answered.inc()
        took.observe(seconds)
        if cause is not None:
            self._errors.labels(cause).inc()

    def _of_route(self, route: str, status: int) -> tuple[Counter, Histogram]:
        """Kept, because the library looks for labels slowly; routes are templates, so there are few."""
        if (route, status) not in self._routes:
            self._routes[route, status] = self._requests.labels(route, status), self._seconds.labels(route)
        return self._routes[route, status]

    def of_model(self, name: str) -> Callable[[Batch], None]:
        """What counts the calls of one model."""
        queued, computed = self._queued.labels(name), self._computed.labels(name)
        images, waiting = self._batch.labels(name), self._waiting.labels(name)

        def told(batch: Batch) -> None:
            images.observe(batch.images)
            computed.observe(batch.computed_s)
            waiting.set(batch.left)
            for seconds in batch.queued_s:
                queued.observe(seconds)

        return told

    def write(self) -> None:
        """Let other processes see now what was counted here, and not a little later; in the thread that counts."""
        if self._shared:
            self._shared.write()

    def page(self) -> bytes:
        """Prometheus's text format; of other processes, and of this one where it shares, what was written."""
        if not self._shared:
            return generate_latest(self._registry)
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody)
        return generate_latest(everybody)
