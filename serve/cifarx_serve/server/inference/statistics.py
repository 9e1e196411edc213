"""What each model has done since the server was started, as the statistics extension of Triton's protocol reports it.

Source: extension_statistics.md of triton-inference-server/server.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model import ServedModel

_PREFIX: Final = "cifarx_"


class Duration(msgspec.Struct, frozen=True):
    """How often something happened, and how long it took in total, in nanoseconds."""

    count: int
    ns: int


class InferenceDurations(msgspec.Struct, frozen=True):
    """The durations of requests.

    `queue` and `compute_infer` are the parts of the requests that ran. Images are decoded and outputs encoded outside
    of the model, so `compute_input` and `compute_output` are zero.
    """

    success: Duration
    fail: Duration
    queue: Duration
    compute_infer: Duration
    compute_input: Duration = Duration(0, 0)
    compute_output: Duration = Duration(0, 0)
    cache_hit: Duration = Duration(0, 0)
    cache_miss: Duration = Duration(0, 0)


class ModelStatistics(msgspec.Struct, frozen=True):
    """The statistics of one version of a model, over all workers.

    `inference_count` is the number of images that the model has run, and `execution_count` that of its batches.
    """

    name: str
    version: str
    inference_count: int
    execution_count: int
    inference_stats: InferenceDurations


async def read_statistics(metrics: Metrics, models: Sequence[ServedModel]) -> list[ModelStatistics]:
    """Return the statistics of models. The metrics of all workers are read in a thread."""
    metrics.flush()
    return await asyncio.to_thread(_read, metrics, models)


def _read(metrics: Metrics, models: Sequence[ServedModel]) -> list[ModelStatistics]:
    totals: defaultdict[tuple[str, str], float] = defaultdict(float)
    for family in metrics.all_processes().collect():
        for sample in family.samples:
            if "model" in sample.labels:
                totals[sample.name.removeprefix(_PREFIX), sample.labels["model"]] += sample.value
    return [_statistics(model, totals) for model in models]


def _statistics(model: ServedModel, totals: Mapping[tuple[str, str], float]) -> ModelStatistics:
    def total(name: str) -> float:
        return totals[name, model.key]

    ran, in_model_s = total("queue_seconds_count"), total("model_request_seconds_total")
    queue_s = total("queue_seconds_sum")
    return ModelStatistics(
        model.name,
        model.protocol_version,
        int(total("batch_images_sum")),
        int(total("compute_seconds_count")),
        InferenceDurations(
            success=_duration(ran - total("batch_failures_total"), in_model_s),
            fail=_duration(total("model_failures_total"), total("model_failure_seconds_total")),
            queue=_duration(ran, queue_s),
            compute_infer=_duration(ran, max(0.0, in_model_s - queue_s)),
        ),
    )


def _duration(count: float, seconds: float) -> Duration:
    return Duration(int(count), round(seconds * 1e9))
