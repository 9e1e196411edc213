import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from cifarx_train.classification_metrics import ClassMetrics, class_metrics, macro_average, worst_first

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def matrix_of(answers: list[tuple[int, int]]) -> NDArray[np.int64]:
    matrix = np.zeros((4, 4), np.int64)
    for true, predicted in answers:
        matrix[true, predicted] += 1
    return matrix


@given(pairs)
def test_the_metrics_are_those_of_their_definitions(answers: list[tuple[int, int]]) -> None:
    for label, metrics in enumerate(class_metrics(matrix_of(answers), "abcd")):
        hits = sum(true == predicted == label for true, predicted in answers)
        of_class = sum(true == label for true, _ in answers)
        as_class = sum(predicted == label for _, predicted in answers)
        precision = hits / as_class if as_class else 0
        assert (metrics.name, metrics.support) == ("abcd"[label], of_class)
        assert metrics.precision == pytest.approx(precision)
        if not of_class:
            assert metrics.recall is metrics.f1 is None
            continue
        recall = hits / of_class
        assert metrics.recall == pytest.approx(recall)
        assert metrics.f1 == pytest.approx(2 * precision * recall / (precision + recall) if hits else 0)


@given(pairs)
def test_the_macro_average_is_over_the_classes_that_have_images(answers: list[tuple[int, int]]) -> None:
    metrics = class_metrics(matrix_of(answers), "abcd")
    measured = [each for each in metrics if each.support]
    average = macro_average(metrics)
    assert average.precision == pytest.approx(np.mean([each.precision for each in measured]))
    assert average.recall == pytest.approx(np.mean([each.recall or 0.0 for each in measured]))
    assert average.f1 == pytest.approx(np.mean([each.f1 or 0.0 for each in measured]))


def test_there_is_no_average_without_images() -> None:
    metrics = class_metrics(np.zeros((2, 2), np.int64), "ab")
    assert np.isnan(macro_average(metrics)).all()
    assert worst_first(metrics) == []


@given(arrays.arrays(np.int64, (3, 3), elements=st.integers(0, 9)))
def test_the_support_adds_up(matrix: NDArray[np.int64]) -> None:
    assert sum(each.support for each in class_metrics(matrix, "abc")) == matrix.sum()


def test_the_worst_class_has_the_lowest_f1() -> None:
    """A class that is predicted for everything has a recall of 1, and is not the best one."""
    metrics = class_metrics(np.array([[5, 5, 0], [0, 10, 0], [0, 9, 1]]), ["a", "b", "c"])
    assert [each.name for each in worst_first(metrics)] == ["c", "b", "a"]
    assert worst_first(metrics)[0] == ClassMetrics("c", 1.0, 0.1, pytest.approx(2 / 11), 10)  # type: ignore[arg-type]
