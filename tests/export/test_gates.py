"""The gates: the figures that were promised, and tolerances of one's own."""

import pytest

from cifarx_export.gates import GATES, Gate, gate
from cifarx_serve.errors import UsageError


def test_fp32_is_a_ten_thousandth_and_every_image() -> None:
    assert gate("fp32") == Gate(atol=1e-4, rtol=1e-4, agreement=1.0)


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


def test_no_tolerance_buys_agreement() -> None:
    assert gate("fp32", 100.0, 100.0).agreement == 1.0


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
        GATES["fp32"] = Gate(1.0, 1.0, 0.0)  # type: ignore[index]
    with pytest.raises(AttributeError):
        GATES["fp32"].atol = 1.0  # type: ignore[misc]
