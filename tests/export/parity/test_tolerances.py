"""The tolerances: the figures that were promised, and tolerances of one's own."""

import numpy as np
import pytest

from cifarx_export.formats.registry import PRECISIONS
from cifarx_export.parity.tolerances import TOLERANCES, Tolerance, gate
from cifarx_serve.errors import UsageError


def test_fp32_is_a_ten_thousandth_and_every_image() -> None:
    assert gate("fp32") == Tolerance(atol=1e-4, rtol=1e-4, agreement=1.0, accuracy_drop=None)


def test_fp16_is_answers_alone() -> None:
    assert gate("fp16") == Tolerance(atol=None, rtol=None, agreement=0.999, accuracy_drop=None)


def test_int8_has_half_a_point_of_accuracy_to_lose() -> None:
    assert gate("int8") == Tolerance(atol=None, rtol=None, agreement=0.99, accuracy_drop=0.005)


def test_every_precision_has_a_gate() -> None:
    assert set(TOLERANCES) == set(PRECISIONS)


def test_without_a_tolerance_everything_is_inside() -> None:
    expected = np.array([0.0, -3.0, 1e30])
    assert np.isinf(gate("int8").allowed(expected)).all()
    assert not gate("int8").has_tolerance


@pytest.mark.parametrize(("atol", "rtol"), [(0.5, None), (None, 0.5), (0.5, 0.5), (0.0, 0.0)])
def test_a_tolerance_given_to_a_precision_without_one_holds(atol: float | None, rtol: float | None) -> None:
    chosen = gate("fp16", atol, rtol)
    assert chosen.has_tolerance
    np.testing.assert_array_equal(chosen.allowed(np.array([0.0, -2.0])), [(atol or 0), (atol or 0) + (rtol or 0) * 2])


@pytest.mark.parametrize(
    ("atol", "rtol", "expected"),
    [
        (1e-6, None, (1e-6, 1e-4)),
        (None, 0.5, (1e-4, 0.5)),
        (0.0, 0.0, (0.0, 0.0)),
        (3, 2, (3, 2)),
    ],
)
def test_a_tolerance_given_replaces_the_gates_own(
    atol: float | None, rtol: float | None, expected: tuple[float, float]
) -> None:
    chosen = gate("fp32", atol, rtol)
    assert (chosen.atol, chosen.rtol) == expected


@pytest.mark.parametrize("precision", TOLERANCES)
def test_no_tolerance_buys_agreement_or_accuracy(precision: str) -> None:
    assert gate(precision, 100.0, 100.0)[2:] == TOLERANCES[precision][2:]


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["atol", "rtol"])
def test_a_tolerance_that_means_nothing_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        gate("fp32", **{name: value})


def test_a_precision_without_a_gate_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown precision 'fp8'.*fp32"):
        gate("fp8")


def test_the_table_cannot_be_loosened() -> None:
    with pytest.raises(TypeError):
        TOLERANCES["fp32"] = Tolerance(1.0, 1.0, 0.0)  # type: ignore[index]
    with pytest.raises(AttributeError):
        TOLERANCES["fp32"].atol = 1.0  # type: ignore[misc]
