"""The population stability index of live predictions, on a clock that the test moves."""

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest

from cifarx_serve.prediction_counts import population_stability_index
from cifarx_serve.server.inference.batcher import BatchEvent
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.spec import ModelSpec
from tests.serve.server.inference.test_metrics import parse
from tests.support.color_model import SPEC
from tests.support.parity_summary import SUMMARY

CLASS_RATES = (0.5, 0.25, 0.25)
SCORE_RATES = (0.0,) * 9 + (1.0,)


def with_rates(**fields: Any) -> ModelSpec:
    rates = {"class_rates": CLASS_RATES, "score_rates": SCORE_RATES, **fields}
    return msgspec.structs.replace(SPEC, parity=msgspec.structs.replace(SUMMARY, **rates))


class Live:
    """Metrics of a model with a baseline, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spec: ModelSpec) -> None:
        self.now = 1000.0
        monkeypatch.setattr("cifarx_serve.server.inference.drift.time.monotonic", lambda: self.now)
        self.metrics = Metrics()
        self._observe = self.metrics.prediction_observer("colors", spec)

    def predict(self, red: int, green: int, blue: int, scale: float = 20.0) -> None:
        outputs = scale * np.eye(3, dtype=np.float32).repeat([red, green, blue], axis=0)
        self._observe(BatchEvent(len(outputs), 0, (0.0,), 0.0, 0, [outputs]))
        self.metrics.flush()

    def index(self) -> dict[str, float]:
        values = parse(self.metrics.render())
        return {key[2]: value for key, value in values.items() if key[0] == "cifarx_input_drift_psi"}


def run(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec, test: Any) -> None:
    async def within_loop() -> None:
        test(Live(monkeypatch, spec))

    asyncio.run(within_loop())


def test_predictions_like_those_of_the_test_images_have_an_index_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(live: Live) -> None:
        live.predict(50, 25, 25)
        assert live.index() == {"classes": pytest.approx(0, abs=1e-6), "scores": pytest.approx(0, abs=1e-6)}

    run(monkeypatch, with_rates(), test)


def test_other_classes_and_scores_raise_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(live: Live) -> None:
        live.predict(25, 25, 50)
        expected = population_stability_index(np.array(CLASS_RATES), np.array([0.25, 0.25, 0.5]))
        assert live.index()["classes"] == pytest.approx(expected)
        assert expected > 0.3
        assert live.index()["scores"] == pytest.approx(0, abs=1e-6)
        live.predict(50, 50, 0, scale=0.01)
        assert live.index()["scores"] > 1

    run(monkeypatch, with_rates(), test)


def test_few_images_have_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(live: Live) -> None:
        live.predict(99, 0, 0)
        assert live.index() == {}
        live.predict(1, 0, 0)
        assert live.index()["classes"] > 0.3

    run(monkeypatch, with_rates(), test)


def test_the_index_is_that_of_the_last_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(live: Live) -> None:
        assert live.metrics.is_drift_due
        live.metrics.observe_drift()
        live.predict(300, 0, 0)
        for _ in range(30):  # half an hour of other images
            live.now += 60
            assert live.metrics.is_drift_due
            live.metrics.observe_drift()
            assert not live.metrics.is_drift_due
            live.predict(20, 10, 10)
        assert live.index()["classes"] == pytest.approx(0, abs=1e-6)
        live.now += 60
        live.predict(0, 0, 200)
        assert live.index()["classes"] > 0.2
        for _ in range(11):
            live.now += 60
            live.metrics.observe_drift()
        assert live.index() == {}, "there were no images in the last minutes"

    run(monkeypatch, with_rates(), test)


def test_a_reload_may_change_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions of the old classes are not compared with those of the new ones."""
    four = msgspec.structs.replace(with_rates(class_rates=(0.25,) * 4), class_names=(*SPEC.class_names, "brown"))

    def test(live: Live) -> None:
        for _ in range(12):  # a full window
            live.predict(50, 25, 25)
            live.metrics.observe_drift()
            live.now += 60
        assert live.index()["classes"] == pytest.approx(0, abs=1e-6)
        live.metrics.prediction_observer("colors", four)
        assert live.index()["classes"] > 1, "nothing was predicted as brown"

    run(monkeypatch, with_rates(), test)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        msgspec.structs.replace(SPEC, parity=SUMMARY),
        with_rates(class_rates=(0.5, 0.5)),
        with_rates(score_rates=(1.0,)),
        with_rates(class_rates=(0.0, 0.0, 0.0)),
    ],
    ids=["no report", "of an earlier version", "other classes", "other bins", "no labels"],
)
def test_a_model_without_rates_has_no_index(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec) -> None:
    def test(live: Live) -> None:
        live.predict(500, 0, 0)
        assert not live.metrics.is_drift_due
        assert live.index() == {}

    run(monkeypatch, spec, test)
