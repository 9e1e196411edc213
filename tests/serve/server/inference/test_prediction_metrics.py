"""Predictions in the metrics: counted later, but completely."""

import asyncio
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_serve.server.inference import prediction_metrics
from cifarx_serve.server.inference.batcher import BatchEvent
from cifarx_serve.server.inference.metrics import Metrics
from tests.serve.server.inference.test_metrics import parse
from tests.support.asgi_client import AsgiClient, run_with_client
from tests.support.color_model import SPEC, write_onnx

LOGITS = np.array([[9, 0, 0], [0, 0.1, 0], [9, 0, 0]], np.float32)


def event(*outputs: NDArray[np.float32]) -> BatchEvent:
    return BatchEvent(1, 0, (0.0,), 0.0, 0, list(outputs))


async def count(metrics: Metrics, *batches: NDArray[np.float32]) -> None:
    observe = metrics.prediction_observer("colors", SPEC)
    for batch in batches:
        observe(event(batch))


def test_predictions_are_counted_by_class_and_score() -> None:
    async def test() -> None:
        metrics = Metrics()
        await count(metrics, LOGITS, LOGITS[:1])
        assert ("cifarx_predictions_total", "red", "colors") not in parse(metrics.render())
        metrics.flush()
        values = parse(metrics.render())
        assert values["cifarx_predictions_total", "red", "colors"] == 3
        assert values["cifarx_predictions_total", "green", "colors"] == 1
        assert ("cifarx_predictions_total", "blue", "colors") not in values
        assert values["cifarx_prediction_score_bucket", "colors", "0.3"] == 0
        assert values["cifarx_prediction_score_bucket", "colors", "0.4"] == 1
        assert values["cifarx_prediction_score_bucket", "colors", "1.0"] == 4
        assert values["cifarx_prediction_score_count", "colors"] == 4
        assert values["cifarx_prediction_score_sum", "colors"] == pytest.approx(3 * 0.99975 + 0.356, abs=1e-3)

    asyncio.run(test())


def test_predictions_are_counted_although_nobody_reads_them() -> None:
    async def test() -> None:
        metrics = Metrics()
        await count(metrics, LOGITS)
        end = time.monotonic() + 30
        while ("cifarx_predictions_total", "red", "colors") not in parse(metrics.render()):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)

    asyncio.run(test())


def test_many_outputs_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_metrics, "_MAX_NUMBERS", 20)

    async def test() -> None:
        metrics = Metrics()
        await count(metrics, LOGITS, LOGITS)
        assert ("cifarx_predictions_total", "red", "colors") not in parse(metrics.render())
        await count(metrics, LOGITS, LOGITS, LOGITS)
        assert parse(metrics.render())["cifarx_predictions_total", "red", "colors"] == 10

    asyncio.run(test())


def test_requests_of_every_kind_are_counted(tmp_path: Path) -> None:
    body = msgspec.json.encode(
        {"inputs": [{"name": "input", "datatype": "UINT8", "shape": [2, 4, 6, 3], "data": [255, 0, 0] * 48}]}
    )

    async def test(client: AsgiClient) -> None:
        for _ in range(3):
            assert (await client.post("/v2/models/colors/infer", body)).status == 200
        page = (await client.get("/metrics")).body
        assert parse(page)["cifarx_predictions_total", "red", "colors"] == 6

    run_with_client(test, write_onnx(tmp_path / "colors.onnx"))
