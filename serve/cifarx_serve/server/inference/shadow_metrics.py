"""The metrics of shadows, which exist only if there is a shadow."""

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram

# From 0.1 ms to 10 s, about 1.6 times apart: close enough to interpolate percentiles within a bucket.
SECONDS_BUCKETS: Final = (
    *(0.0001, 0.00016, 0.00025, 0.0004, 0.00063, 0.001, 0.0016, 0.0025, 0.004, 0.0063, 0.01, 0.016, 0.025),
    *(0.04, 0.063, 0.1, 0.16, 0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0, 6.3, 10.0),
)


class ShadowObservation(NamedTuple):
    """What became of a request that was chosen for a shadow.

    Attributes:
        outcome: whether the shadow answered it, had no room for it in its queue, or failed.
        images: the images that it answered.
        agreeing: those for which both models predict the same.
        compute_s: how long the shadow took for them, in seconds.
    """

    outcome: Literal["answered", "dropped", "failed"]
    images: int = 0
    agreeing: int = 0
    compute_s: float = 0.0


class ShadowMetrics:
    """The metrics of all shadows of one process.

    Args:
        registry: contains them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "cifarx_shadow_requests",
            "Requests chosen for the shadow of a model.",
            ["model", "outcome"],
            registry=registry,
        )
        self._images = Counter("cifarx_shadow_images", "Images that the shadow answered.", ["model"], registry=registry)
        self._agreeing = Counter(
            "cifarx_shadow_agreeing_images",
            "Images for which the shadow and the model predict the same.",
            ["model"],
            registry=registry,
        )
        self._compute_seconds = Histogram(
            "cifarx_shadow_compute_seconds",
            "Time that the shadow took for a request.",
            ["model"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )

    def observer(self, model: str) -> Callable[[ShadowObservation], None]:
        """Return a function that counts the observations of the shadow of one model."""
        images, agreeing = self._images.labels(model), self._agreeing.labels(model)
        compute_seconds = self._compute_seconds.labels(model)

        def observe(observation: ShadowObservation) -> None:
            self._requests.labels(model, observation.outcome).inc()
            if observation.outcome == "answered":
                images.inc(observation.images)
                agreeing.inc(observation.agreeing)
                compute_seconds.observe(observation.compute_s)

        return observe
