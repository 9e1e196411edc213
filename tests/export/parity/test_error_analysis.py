"""The error analysis: histogram, agreement by class, disagreements and worst images."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from cifarx_export.parity import error_analysis
from cifarx_export.parity.error_analysis import (
    BINS_PER_DECADE,
    HIGHEST_EXPONENT,
    LOWEST_EXPONENT,
    MAX_DISAGREEMENTS,
    MAX_WORST_IMAGES,
    ClassAgreement,
    Disagreement,
    ErrorAnalysis,
    analyze_errors,
    error_histogram,
    max_error_per_image,
)

NAMES = ("cat", "dog", "frog")

Logits = NDArray[np.float32]


def logits(*rows: tuple[float, ...]) -> Logits:
    return np.array(rows, np.float32)


def analyze(reference: Logits, artifact: Logits, labels: NDArray[np.int64] | None = None) -> ErrorAnalysis:
    names = tuple(f"class {index}" for index in range(reference.shape[1]))
    return analyze_errors(names, np.arange(len(reference)), labels, reference, artifact)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Logits, Logits]:
    """Logits of up to 40 images of 5 classes, and others that are equal, different or not finite."""
    images = draw(st.integers(1, 40))
    reference = draw(arrays(np.float32, (images, 5), elements=st.floats(-20, 20, width=32)))
    other = draw(arrays(np.float32, (images, 5), elements=st.floats(width=32)))
    return reference, np.where(draw(arrays(np.bool_, (images, 5))), reference, other)


@given(pairs())
def test_every_logit_is_counted_once_in_the_bin_of_its_error(pair: tuple[Logits, Logits]) -> None:
    found = error_histogram(*pair)
    assert len(found.counts) == (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_DECADE
    assert sum(found.counts) + found.zero + found.nonfinite == pair[0].size
    with np.errstate(invalid="ignore"):
        error = np.abs(pair[1].astype(float) - pair[0])
    assert found.nonfinite == (~np.isfinite(error)).sum()
    assert found.zero == (error == 0).sum()
    width = (found.highest - found.lowest) / len(found.counts)
    edges = 10.0 ** (found.lowest + width * np.arange(len(found.counts) + 1))
    near = error[np.isfinite(error) & (error > 0)].clip(1.0001 * edges[0], 0.9999 * edges[-1])
    np.testing.assert_array_equal(np.histogram(near, edges)[0], found.counts)


@given(pairs())
def test_classes_and_disagreements_match_a_plain_count(pair: tuple[Logits, Logits]) -> None:
    found = analyze(*pair)
    expected, other = (part.argmax(1) for part in pair)
    for index, row in enumerate(found.by_class):
        assert row == ClassAgreement(
            int((expected == index).sum()), int(((expected == index) & (other == index)).sum())
        )
    for one in found.disagreements:
        assert one.reference != one.artifact
        assert one.count == ((expected == one.reference) & (other == one.artifact)).sum() > 0
    counts = [one.count for one in found.disagreements]
    assert sum(counts) == (expected != other).sum()
    assert counts == sorted(counts, reverse=True)


@given(pairs())
def test_the_worst_images_are_flips_then_the_largest_errors(pair: tuple[Logits, Logits]) -> None:
    found = analyze(*pair).worst
    assert len(found) == min(MAX_WORST_IMAGES, len(pair[0]))
    errors = max_error_per_image(*pair)
    flipped = pair[0].argmax(1) != pair[1].argmax(1)
    order = sorted(range(len(errors)), key=lambda row: (not flipped[row], -errors[row]))
    keys = [(flipped[worst.image], errors[worst.image]) for worst in found]
    assert keys == [(flipped[row], errors[row]) for row in order[:MAX_WORST_IMAGES]]
    for worst in found:
        assert worst.flipped == flipped[worst.image]
        assert worst.reference == tuple(map(float, pair[0][worst.image]))
        assert (worst.error is None) == np.isinf(errors[worst.image])


@given(pairs())
def test_it_can_be_encoded_and_decoded_as_json(pair: tuple[Logits, Logits]) -> None:
    found = analyze(*pair)
    assert msgspec.json.decode(msgspec.json.encode(found), type=ErrorAnalysis) == found


def test_positions_and_labels_refer_to_the_data() -> None:
    reference = logits((2, 1, 0), (0, 3, 1))
    found = analyze_errors(
        NAMES, np.array([70, 40]), np.array([1, 2]), reference, reference + logits((0, 0, 0), (1, 0, 0))
    )
    assert [(worst.image, worst.label, worst.error) for worst in found.worst] == [(40, 2, 1.0), (70, 1, 0.0)]
    assert (found.worst[0].reference_prediction, found.worst[0].artifact_prediction) == (1, 1)
    assert analyze(reference, reference).worst[0].label is None


def test_a_small_flip_comes_before_a_large_error() -> None:
    reference = logits((1, 0, 0), (1.001, 1, 0))
    found = analyze(reference, reference + logits((50, 0, 0), (0, 0.01, 0)))
    assert [(worst.image, worst.flipped) for worst in found.worst] == [(1, True), (0, False)]
    assert found.disagreements == (Disagreement(0, 1, 1),)


def test_a_logit_that_is_not_finite_is_the_worst_and_null() -> None:
    reference = logits((1, 0, 0), (1, 0, 0), (1, 0, 0))
    found = analyze(reference, logits((9, 0, 0), (1, 0, 0), (1, -np.inf, 0)))
    assert [worst.image for worst in found.worst] == [2, 0, 1]
    assert found.worst[0].artifact == (1.0, None, 0.0)
    assert found.worst[0].error is None


@pytest.mark.parametrize(("error", "place"), [(1e-30, 0), (1.1e-10, 0), (1.1e-3, 28), (50, -2), (1e30, -1)])
def test_errors_outside_the_bins_are_in_the_first_or_last(error: float, place: int) -> None:
    counts = error_histogram(logits((0, 0)), logits((error, 0))).counts
    assert counts[place] == 1


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    reference, noise = random.normal(size=(2, 50, 4)).astype(np.float32)
    whole = analyze(reference, reference + noise)
    monkeypatch.setattr(error_analysis, "_CHUNK_LOGITS", 12)
    assert analyze(reference, reference + noise) == whole
    monkeypatch.setattr(error_analysis, "_CHUNK_LOGITS", 1)
    assert analyze(reference, reference + noise) == whole


def test_the_most_frequent_disagreements_of_many_classes_are_kept() -> None:
    classes = MAX_DISAGREEMENTS + 30
    reference = np.eye(classes, dtype=np.float32).repeat(2, axis=0)[1:]  # class 0 once, the others twice
    found = analyze(reference, np.roll(reference, 1, axis=1))
    assert len(found.disagreements) == MAX_DISAGREEMENTS
    assert {one.count for one in found.disagreements} == {2}
    assert len(msgspec.json.encode(found)) < 40_000
