"""The metrics, compared with plain loops over Python floats and with other tools."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from numpy.typing import NDArray

from cifarx_export.parity.metrics import compute_errors, find_flips
from cifarx_export.parity.tolerances import Tolerance

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]

ATOL = 1e-4
FP32 = Tolerance(ATOL, 1e-4, 1.0)
SHAPES = st.tuples(st.integers(1, 12), st.integers(2, 5))
ANY_FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
LOGIT = st.floats(-50, 50, width=32)
# A coarse grid near the tolerance, where ties, flips and forgiven flips are all common.
GRID = st.integers(-4, 4).map(lambda step: 1 + step * 5e-5)
TOLERANCES = st.sampled_from(
    [FP32, Tolerance(0.0, 0.0, 1.0), Tolerance(1e-4, 0.0, 1.0), Tolerance(0.0, 1e-3, 1.0), Tolerance(0.5, 0.5, 1.0)]
)
NON_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])

exhaustive = settings(deadline=None, max_examples=100)


@st.composite
def pairs(draw: Any, elements: st.SearchStrategy[float]) -> Pair:
    shape = draw(SHAPES)
    arrays = numpy_strategies.arrays(np.float32, shape, elements=elements.map(lambda x: float(np.float32(x))))
    return draw(arrays), draw(arrays)


@st.composite
def near_pairs(draw: Any) -> Pair:
    """Pairs with errors about the size of the tolerance: some inside, some outside."""
    reference, steps = draw(pairs(LOGIT))
    return reference, (reference * (1 + steps * np.float32(1e-5))).astype(np.float32)


ALL_PAIRS = st.one_of(pairs(ANY_FINITE), near_pairs(), pairs(GRID))


def flat(pair: Pair) -> list[tuple[float, float]]:
    reference, artifact = pair
    return list(zip(map(float, reference.ravel()), map(float, artifact.ravel()), strict=True))


@exhaustive
@given(ALL_PAIRS, TOLERANCES)
def test_errors_match_plain_loops(pair: Pair, tolerance: Tolerance) -> None:
    errors = [abs(artifact - reference) for reference, artifact in flat(pair)]
    found = compute_errors(*pair, tolerance)
    atol, rtol = tolerance.atol, tolerance.rtol
    assert atol is not None
    assert rtol is not None
    assert found.max_abs == max(errors)
    assert found.mean_abs == pytest.approx(math.fsum(errors) / len(errors), rel=1e-9)
    assert found.outside == sum(
        abs(artifact - reference) > atol + rtol * abs(reference) for reference, artifact in flat(pair)
    )
    assert found.nonfinite == 0


@exhaustive
@given(ALL_PAIRS)
def test_p999_interpolates_between_the_two_errors_around_its_rank(pair: Pair) -> None:
    errors = sorted(abs(artifact - reference) for reference, artifact in flat(pair))
    rank = 0.999 * (len(errors) - 1)
    low, high = errors[math.floor(rank)], errors[math.ceil(rank)]
    assert compute_errors(*pair, FP32).p999_abs == pytest.approx(low + (high - low) * (rank % 1), rel=1e-9)


def test_p999_ignores_one_in_a_thousand() -> None:
    reference = np.zeros((1000, 10), np.float32)
    artifact = reference.copy()
    artifact[:1, :9] = 5
    found = compute_errors(reference, artifact, FP32)
    assert (found.max_abs, found.p999_abs) == (5, 0)
    artifact[1, :9] = 5
    assert compute_errors(reference, artifact, FP32).p999_abs == 5


@exhaustive
@given(ALL_PAIRS)
def test_the_required_tolerance_passes_and_no_smaller_one_does(pair: Pair) -> None:
    required = compute_errors(*pair, FP32).required_tolerance

    def passes(tolerance: float) -> bool:
        return all(
            abs(artifact - reference) <= tolerance + tolerance * abs(reference) for reference, artifact in flat(pair)
        )

    assert passes(required * (1 + 1e-12))
    if required > 0:
        assert not passes(required * (1 - 1e-12))


@exhaustive
@given(near_pairs())
def test_a_pair_passes_exactly_if_the_required_tolerance_is_smaller(pair: Pair) -> None:
    found = compute_errors(*pair, FP32)
    assert found.required_tolerance is not None
    assume(abs(found.required_tolerance - ATOL) > 1e-12)
    assert (found.outside == 0) == (found.required_tolerance < ATOL)


def test_equal_logits_need_no_tolerance() -> None:
    logits = np.linspace(-9, 9, 40, dtype=np.float32).reshape(4, 10)
    assert compute_errors(logits, logits.copy(), Tolerance(0.0, 0.0, 1.0)) == (0, 0, 0, 0, 0, 0)


def test_errors_are_computed_in_float64() -> None:
    reference = np.array([[3e38, 0.0]], np.float32)
    found = compute_errors(reference, -reference, FP32)
    assert found.max_abs == 2 * float(reference[0, 0])  # not representable in float32


@exhaustive
@given(ALL_PAIRS, st.data())
def test_nan_or_inf_on_either_side_is_counted_and_affects_no_other_metric(pair: Pair, data: st.DataObject) -> None:
    sides = [array.copy() for array in pair]
    size = sides[0].size
    places: set[int] = set()
    for side in sides:
        poisoned = data.draw(st.sets(st.integers(0, size - 1), max_size=size))
        for place in poisoned:
            side.flat[place] = data.draw(NON_FINITE)
        places |= poisoned
    assume(places)
    found = compute_errors(sides[0], sides[1], Tolerance(1e9, 1e9, 1.0))
    assert found.nonfinite == len(places)
    if rest := [pair for place, pair in enumerate(flat((sides[0], sides[1]))) if place not in places]:
        assert found.max_abs == max(abs(artifact - reference) for reference, artifact in rest)
        assert math.isfinite(found.required_tolerance)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_if_nothing_is_finite_everything_is_outside(value: float) -> None:
    logits = np.full((3, 4), value, np.float32)
    found = compute_errors(np.zeros((3, 4), np.float32), logits, FP32)
    assert (found.outside, found.nonfinite) == (12, 12)
    assert math.isinf(found.required_tolerance)


def first_of_the_largest(row: list[float]) -> int:
    return row.index(max(row))


@exhaustive
@given(st.one_of(pairs(GRID), pairs(LOGIT), pairs(ANY_FINITE)), TOLERANCES)
def test_flips_match_plain_loops(pair: Pair, tolerance: Tolerance) -> None:
    expected, forgiven = [], []
    for position, (reference, artifact) in enumerate(zip(pair[0].tolist(), pair[1].tolist(), strict=True)):
        predicted, other = first_of_the_largest(reference), first_of_the_largest(artifact)
        if predicted != other:
            expected.append(position)
            forgiven.append(
                reference[predicted] - reference[other] <= tolerance.atol + tolerance.rtol * abs(reference[predicted])
            )
    found = find_flips(*pair, tolerance)
    assert found.positions.tolist() == expected
    assert found.forgiven.tolist() == forgiven


def test_the_same_argmax_is_no_flip() -> None:
    assert find_flips(np.eye(4, dtype=np.float32), 9 * np.eye(4, dtype=np.float32), FP32).positions.size == 0


def test_a_flip_between_equals_is_forgiven() -> None:
    found = find_flips(np.array([[1, 1]], np.float32), np.array([[1, 2]], np.float32), FP32)
    assert found.forgiven.tolist() == [True]


@pytest.mark.parametrize(("margin", "forgiven"), [(0.9e-4, True), (1.1e-4, False)])
def test_the_margin_of_the_reference_decides_on_forgiveness(margin: float, forgiven: bool) -> None:
    near, far = [0, margin], [0, 5.0]
    tolerance = Tolerance(1e-4, 0.0, 1.0)
    found = find_flips(np.array([near], np.float32), np.array([far[::-1]], np.float32), tolerance)
    assert found.forgiven.tolist() == [forgiven]
    # The margin of the artifact does not matter.
    assert find_flips(np.array([far], np.float32), np.array([near[::-1]], np.float32), tolerance).forgiven.tolist() == [
        False
    ]


def test_a_close_second_does_not_forgive_a_third() -> None:
    reference = np.array([[5, 5.00001, -5]], np.float32)
    third = np.array([[0, 0, 1]], np.float32)
    assert find_flips(reference, third, FP32).forgiven.tolist() == [False]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_flip_with_nan_or_inf_in_its_row_is_never_forgiven(side: int, value: float) -> None:
    pair = np.array([[1, 1, 0]], np.float32), np.array([[1, 2, 0]], np.float32)
    assert find_flips(*pair, FP32).forgiven.tolist() == [True]
    pair[side][0, 2] = value
    assert not find_flips(*pair, FP32).forgiven.any()
    both = [array.copy() for array in pair]
    for array in both:
        array[0, 2] = value
    assert not find_flips(both[0], both[1], FP32).forgiven.any()


@exhaustive
@given(pairs(LOGIT))
def test_without_a_bound_nothing_is_outside_and_nothing_is_forgiven(pair: Pair) -> None:
    none = Tolerance(None, None, 0.99)
    assert compute_errors(*pair, none).outside == 0
    assert not find_flips(*pair, none).forgiven.any()


# Comparison with other tools on the same files.


@pytest.mark.slow
@pytest.mark.parametrize("step", [0.0, 1e-5, 1e-3, 0.25])
def test_polygraphy_and_numpy_compute_the_same_errors(step: float, good_onnx: Path) -> None:
    """NVIDIA's Polygraphy runs both files itself and reports the same errors, up to the rounding of float32."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import IterationResult, SimpleCompareFunc

    from tests.support.onnx_faults import edited, entry_with

    pixels = np.random.default_rng(0).random((256, 3, 32, 32), dtype=np.float32)

    def run(path: Path) -> NDArray[np.float32]:
        with OnnxrtRunner(SessionFromOnnx(str(path))) as runner:
            return np.array(runner.infer({"input": pixels})["logits"])

    reference = run(good_onnx)
    artifact = run(edited(good_onnx, [entry_with((4,), lambda value: value + step, "model.8.bias")]))
    errors = compute_errors(reference, artifact, FP32)

    def polygraphy(statistic: str, tolerance: float, quantile: float | None = None) -> Any:
        compare = SimpleCompareFunc(atol=tolerance, rtol=tolerance, check_error_stat=statistic, error_quantile=quantile)
        return compare(*(IterationResult({"logits": side}, runner_name="x") for side in (artifact, reference)))[
            "logits"
        ]

    found = polygraphy("quantile", 1e-4, 0.999)
    assert float(found.max_absdiff) == pytest.approx(errors.max_abs, rel=1e-6, abs=1e-12)
    assert float(found.mean_absdiff) == pytest.approx(errors.mean_abs, rel=1e-5, abs=1e-12)
    assert float(found.quantile_absdiff) == pytest.approx(errors.p999_abs, rel=1e-5, abs=1e-12)
    assert np.isclose(artifact.astype(float), reference.astype(float), 1e-4, 1e-4).all() == (errors.outside == 0)
    if not step:
        assert errors == (0, 0, 0, 0, 0, 0)
        return
    # Its elementwise check needs the absolute or the relative error inside; NumPy and cifarx allow their sum.
    assert not bool(polygraphy("elemwise", errors.required_tolerance * (1 - 1e-4)))
    assert bool(polygraphy("elemwise", 2 * errors.required_tolerance * (1 + 1e-4)))
    for factor, inside in ((1 - 1e-9, False), (1 + 1e-9, True)):
        tolerance = errors.required_tolerance * factor
        assert np.isclose(artifact.astype(float), reference.astype(float), tolerance, tolerance).all() == inside
