"""The search on a network that makes planned mistakes."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from cifarx_export.formats.int8 import search
from cifarx_export.formats.int8.search import Layer, MixedPrecision, MixedPrecisionSearch, Network
from cifarx_export.formats.registry import ConversionSource, ExportOptions
from cifarx_serve.spec import InputSpec, ModelSpec

IMAGES = 1000
LAYERS = [Layer(f"layer{number}", (f"layer{number}",), 0.1) for number in range(6)]
SPEC = ModelSpec(
    model="planned",
    class_names=tuple("abcdefghij"),
    input=InputSpec(height=1, width=2, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)),
)


def numbered_images(count: int) -> NDArray[np.uint8]:
    """Return images whose first pixel states their number."""
    images = np.zeros((count, 1, 2, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(count), 256)
    return images


class PlannedSearch(MixedPrecisionSearch):
    """The predictions of a choice differ from those in fp32 on a planned number of images, in a row.

    Args:
        mistakes: the number by the number of layers in fp32.
    """

    def __init__(self, mistakes: Mapping[int, int], lines: list[str] | None = None) -> None:
        self.mistakes = mistakes
        self.compared: dict[MixedPrecision, int] = {}
        progress = ([] if lines is None else lines).append
        options = ExportOptions(calibration_images=10)
        super().__init__(ConversionSource(nn.Identity, SPEC, options, numbered_images, progress), LAYERS, 1)

    def calibrate(self, inputs: NDArray[np.float32]) -> None:
        assert len(inputs) == 10

    def open(self, choice: MixedPrecision | None) -> Network:
        def run(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
            numbers = (inputs[:, 0, 0, 0] * 256 + inputs[:, 1, 0, 0]).round().astype(np.int64)
            outputs = np.eye(10, dtype=np.float32)[numbers % 10]
            if choice is None:
                return outputs
            self.compared[choice] = self.compared.get(choice, 0) + len(inputs)
            # the order of all images but those of calibration, turned so that each choice has mistakes elsewhere
            held_out = np.setdiff1d(np.arange(IMAGES + 10), self._calibrated)
            start = zlib.crc32(repr(choice).encode()) % IMAGES
            wrong = np.roll(held_out, start)[: self.mistakes[len(choice.fp32_layers)]]
            outputs[np.isin(numbers, wrong)] = np.eye(10, dtype=np.float32)[(numbers[np.isin(numbers, wrong)] + 1) % 10]
            return outputs

        return run

    @property
    def _calibrated(self) -> NDArray[np.int64]:
        return np.linspace(0, IMAGES + 9, 10).round().astype(np.int64)


@contextmanager
def stages_of(images: int) -> Iterator[None]:
    with (
        patch.object(search, "_STAGE_IMAGES", images),
        patch.object(search, "_HELD_OUT_IMAGES", (IMAGES, IMAGES)),
        patch.object(search, "_SENSITIVITY_IMAGES", (20, 20)),
    ):
        yield


def test_a_hopeless_choice_is_compared_on_few_images() -> None:
    with stages_of(50):
        hopeless = PlannedSearch({0: 600, 1: 500, 2: 400, 3: 5, 4: 0, 5: 0, 6: 0})
        choice, agreement = next(hopeless.choices())
    assert len(choice.fp32_layers) == 3
    assert agreement == 0.995
    assert hopeless.compared[choice] == IMAGES
    assert {count for one, count in hopeless.compared.items() if len(one.fp32_layers) < 3} == {50}


def test_without_a_choice_that_reaches_the_target_the_best_is_compared_on_all_images() -> None:
    with stages_of(50):
        hopeless = PlannedSearch({0: 600, 1: 500, 2: 400, 3: 350, 4: 300, 5: 200, 6: 0})
        choices = list(hopeless.choices())
    assert [(len(choice.fp32_layers), agreement) for choice, agreement in choices] == [(5, 0.8)]
    assert hopeless.compared[choices[0][0]] >= IMAGES


@settings(max_examples=30, deadline=None)
@given(
    mistakes=st.lists(st.integers(0, 40) | st.integers(0, IMAGES), min_size=7, max_size=7),
    stage=st.sampled_from([7, 50, 333]),
    target=st.sampled_from(search.AGREEMENT_TARGETS),
)
def test_stages_change_no_choice_that_reaches_its_target(mistakes: list[int], stage: int, target: float) -> None:
    plan = dict(enumerate(sorted(mistakes, reverse=True)))
    with stages_of(IMAGES):
        expected = PlannedSearch(plan).find(target)
    with stages_of(stage):
        found = PlannedSearch(plan).find(target)
    assert found.is_complete
    assert (found.score.agreement >= target) == (expected.score.agreement >= target)
    if expected.score.agreement >= target:
        assert len(found.choice.fp32_layers) == len(expected.choice.fp32_layers)
        assert found.score.agreement == expected.score.agreement


def test_measuring_sensitivities_reports_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr("cifarx_export.formats.int8.search.time.monotonic", lambda: float(next(clock)))
    with stages_of(50):
        next(PlannedSearch({0: 600, 1: 5, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0}, lines).choices())
    assert "int8: measured the sensitivity of 3 of 6 layers" in lines
