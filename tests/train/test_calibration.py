import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cifarx_serve.scores import softmax
from cifarx_train.calibration import NoTemperature, expected_calibration_error, fit_temperature


def labeled_logits(count: int, scale: float, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits whose softmax at temperature `scale` is the true distribution of the labels."""
    rng = np.random.default_rng(seed)
    exact = rng.normal(0, 2, (count, 5))
    labels = (softmax(exact.astype(np.float32)).cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    return (exact * scale).astype(np.float32), labels


def cross_entropy(logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float) -> float:
    scores = softmax(logits / np.float64(temperature))
    return float(-np.log(scores[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 10.0])
def test_the_temperature_of_overconfident_logits_is_found(scale: float) -> None:
    logits, labels = labeled_logits(20_000, scale)
    assert fit_temperature(logits, labels) == pytest.approx(scale, rel=0.03)


@given(st.integers(0, 100), st.floats(0.3, 6))
def test_no_other_temperature_has_a_smaller_loss(seed: int, scale: float) -> None:
    logits, labels = labeled_logits(200, scale, seed)
    best = fit_temperature(logits, labels)
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert cross_entropy(logits, labels, best) <= cross_entropy(logits, labels, best * factor)


def test_the_temperature_reduces_the_error_on_other_images() -> None:
    temperature = fit_temperature(*labeled_logits(5000, 4.0, seed=1))
    logits, labels = labeled_logits(5000, 4.0, seed=2)
    before = expected_calibration_error(logits, labels)
    after = expected_calibration_error(logits, labels, temperature)
    assert before > 0.1
    assert after < 0.02


def test_the_error_of_a_few_known_scores() -> None:
    """Two bins: two images with a score of 0.8, one of them wrong, and two with 0.6, both right."""
    scores = np.array([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.4, 0.6]])
    logits, labels = np.log(scores).astype(np.float32), np.array([0, 1, 0, 1])
    assert expected_calibration_error(logits, labels) == pytest.approx((2 * 0.3 + 2 * 0.4) / 4)


def test_an_upper_edge_belongs_to_its_bin() -> None:
    """The score of a certain prediction is 1, and that of two equal logits is 0.5."""
    certain = np.array([[1000, 0]], np.float32)
    assert expected_calibration_error(certain, np.array([0])) == 0
    assert expected_calibration_error(certain, np.array([1])) == 1
    assert expected_calibration_error(np.zeros((2, 2), np.float32), np.array([0, 1])) == 0


def test_too_few_images_have_no_temperature() -> None:
    with pytest.raises(NoTemperature, match="there are 99 images, and a temperature needs at least 100"):
        fit_temperature(*labeled_logits(99, 2.0))


def test_logits_without_a_mistake_have_no_temperature() -> None:
    logits, labels = labeled_logits(500, 1.0)
    with pytest.raises(NoTemperature, match=r"still falls at a temperature of 0\.05 \(accuracy 100\.00%\)"):
        fit_temperature(logits, logits.argmax(axis=1))
    with pytest.raises(NoTemperature, match="still falls at a temperature of 20, as for a guess"):
        fit_temperature(1000 * logits, np.roll(labels, 1))
