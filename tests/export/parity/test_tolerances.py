"""The tolerances: the documented values, and user-defined ones."""

import numpy as np
import pytest

from cifarx_export.formats.registry import PRECISIONS
from cifarx_export.parity.tolerances import TOLERANCES, Tolerance, get_tolerance
from cifarx_serve.errors import UsageError


def test_fp32_allows_1e_4_and_no_flips() -> None:
    assert get_tolerance("fp32") == Tolerance(atol=1e-4, rtol=1e-4, agreement=1.0, accuracy_drop=None)


def test_bf16_bounds_agreement_and_accuracy() -> None:
    assert get_tolerance("bf16") == Tolerance(atol=None, rtol=None, agreement=0.995, accuracy_drop=0.005)


def test_fp16_bounds_agreement_only() -> None:
    assert get_tolerance("fp16") == Tolerance(atol=None, rtol=None, agreement=0.999, accuracy_drop=None)


def test_int8_may_lose_half_a_point_of_accuracy() -> None:
    assert get_tolerance("int8") == Tolerance(atol=None, rtol=None, agreement=0.99, accuracy_drop=0.005)


def test_every_precision_has_a_tolerance() -> None:
    assert set(TOLERANCES) == set(PRECISIONS)


def test_without_a_bound_every_error_is_allowed() -> None:
    expected = np.array([0.0, -3.0, 1e30])
    assert np.isinf(get_tolerance("int8").allowed_error(expected)).all()
    assert not get_tolerance("int8").bounds_logits


@pytest.mark.parametrize(("atol", "rtol"), [(0.5, None), (None, 0.5), (0.5, 0.5), (0.0, 0.0)])
def test_atol_and_rtol_bound_a_precision_without_a_default(atol: float | None, rtol: float | None) -> None:
    tolerance = get_tolerance("fp16", atol, rtol)
    assert tolerance.bounds_logits
    np.testing.assert_array_equal(
        tolerance.allowed_error(np.array([0.0, -2.0])), [(atol or 0), (atol or 0) + (rtol or 0) * 2]
    )


@pytest.mark.parametrize(
    ("atol", "rtol", "expected"),
    [
        (1e-6, None, (1e-6, 1e-4)),
        (None, 0.5, (1e-4, 0.5)),
        (0.0, 0.0, (0.0, 0.0)),
        (3, 2, (3, 2)),
    ],
)
def test_atol_and_rtol_replace_the_defaults(
    atol: float | None, rtol: float | None, expected: tuple[float, float]
) -> None:
    tolerance = get_tolerance("fp32", atol, rtol)
    assert (tolerance.atol, tolerance.rtol) == expected


@pytest.mark.parametrize("precision", TOLERANCES)
def test_atol_and_rtol_do_not_change_agreement_or_accuracy(precision: str) -> None:
    assert get_tolerance(precision, 100.0, 100.0)[2:] == TOLERANCES[precision][2:]


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["atol", "rtol"])
def test_an_invalid_tolerance_is_rejected(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        get_tolerance("fp32", atol=value if name == "atol" else None, rtol=value if name == "rtol" else None)


def test_an_unknown_precision_is_rejected() -> None:
    with pytest.raises(UsageError, match=r"unknown precision 'fp8'.*fp32"):
        get_tolerance("fp8")


def test_the_table_cannot_be_loosened() -> None:
    with pytest.raises(TypeError):
        TOLERANCES["fp32"] = Tolerance(1.0, 1.0, 0.0)  # type: ignore[index]
    with pytest.raises(AttributeError):
        TOLERANCES["fp32"].atol = 1.0  # type: ignore[misc]
