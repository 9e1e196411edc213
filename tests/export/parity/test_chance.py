"""The test for chance, and what it stops."""

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_export.parity.chance import LEVEL, measure_chance, require_better_than_chance
from cifarx_export.parity.compare import Reference
from cifarx_export.parity.data import ParityData
from cifarx_serve.errors import CheckFailed
from cifarx_serve.spec import InputSpec, ModelSpec

CLASSES = 10
SPEC = ModelSpec(
    model="net", class_names=tuple(f"c{index}" for index in range(CLASSES)), input=InputSpec(height=1, width=1)
)
RANDOM = np.random.default_rng(0)
LABELS = np.arange(1000) % CLASSES


def with_accuracy(accuracy: float) -> NDArray[np.int64]:
    """Return predictions of which this share is correct, and the others wrong."""
    correct = np.arange(len(LABELS)) < accuracy * len(LABELS)
    return np.where(RANDOM.permutation(correct), LABELS, (LABELS + RANDOM.integers(1, CLASSES, len(LABELS))) % CLASSES)


@pytest.mark.parametrize("accuracy", [0.0, 0.05, 0.10, 0.11])
def test_an_accuracy_that_guessing_reaches_is_chance(accuracy: float) -> None:
    assert measure_chance(with_accuracy(accuracy), LABELS, CLASSES).at_chance


@pytest.mark.parametrize("accuracy", [0.16, 0.5, 1.0])
def test_a_better_accuracy_is_not(accuracy: float) -> None:
    found = measure_chance(with_accuracy(accuracy), LABELS, CLASSES)
    assert not found.at_chance
    assert found.accuracy == pytest.approx(accuracy)
    assert found.chance == pytest.approx(0.1, abs=0.01)


def test_one_class_for_all_images_is_chance_however_frequent_it_is() -> None:
    labels = (np.arange(1000) % 10 == 0).astype(np.int64)
    found = measure_chance(np.zeros(1000, np.int64), labels, 2)
    assert (found.accuracy, found.chance) == (0.9, 0.9)
    assert found.at_chance
    some = np.where(np.arange(1000) % 20 == 0, labels, 0)  # recognizes half of the rare class
    assert not measure_chance(some, labels, 2).at_chance


def test_guessing_passes_as_rarely_as_the_level_says() -> None:
    passed = sum(not measure_chance(RANDOM.integers(0, CLASSES, 1000), LABELS, CLASSES).at_chance for _ in range(3000))
    assert passed <= 3000 * LEVEL * 4


def reference(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None = LABELS) -> Reference:
    logits = np.eye(CLASSES, dtype=np.float32)[predictions]
    data = ParityData(np.zeros((len(logits), 1, 1, 3), np.uint8), labels, "pictures", "0" * 64)
    return Reference("pytorch", SPEC, data, logits, logits, logits[:3], logits[:3])


def report(reference: Reference, *, trained_here: bool = False, allowed: bool = False) -> list[str]:
    lines: list[str] = []
    require_better_than_chance(reference, "net.pth", trained_here=trained_here, allowed=allowed, progress=lines.append)
    return lines


def test_the_accuracy_is_reported_with_its_confidence() -> None:
    assert report(reference(with_accuracy(0.5))) == [
        "reference: accuracy 50.00% of 1,000 images (46.9% to 53.1% with 95% confidence), chance is 10.0%"
    ]


def test_chance_stops_a_network_of_unknown_origin_with_what_to_do() -> None:
    with pytest.raises(
        CheckFailed,
        match=r"accuracy 10\.2% on 10 classes is chance: preprocessing or class order is likely wrong: "
        r"try `cifarx diagnose net\.pth`",
    ) as error:
        report(reference(with_accuracy(0.102)))
    assert error.value.exit_status == 1


@pytest.mark.parametrize("options", [{"trained_here": True}, {"allowed": True}])
def test_chance_is_only_noted_for_own_training_or_if_it_is_allowed(options: dict[str, bool]) -> None:
    lines = report(reference(with_accuracy(0.1)), **options)
    assert lines[1].startswith("note: accuracy 10.0% on 10 classes is chance (one-sided binomial test, p = ")


def with_training_images(predictions: NDArray[np.int64], tested: int) -> Reference:
    whole = reference(predictions, LABELS[: len(predictions)])
    return whole._replace(data=whole.data._replace(training_rows=tuple(range(len(predictions) - tested))))


def test_the_accuracy_is_that_of_the_test_images_and_training_images_take_part_in_the_decision() -> None:
    right = LABELS.copy()
    right[:5] = (right[:5] + 1) % CLASSES
    (line,) = report(with_training_images(right, 5))
    assert line.startswith("reference: accuracy 0.00% of 5 images")
    with pytest.raises(CheckFailed, match="is chance"):
        report(with_training_images(with_accuracy(0.1), 5))


def test_too_few_images_leave_it_open_whether_the_accuracy_is_chance() -> None:
    lines = report(with_training_images(LABELS[:2], 2))
    assert lines[1] == "note: 2 images are too few to tell whether the accuracy is better than chance"


def test_without_labels_there_is_nothing_to_test() -> None:
    assert report(reference(with_accuracy(0.1), None)) == []


def test_one_logit_is_tested_by_its_decision() -> None:
    spec = msgspec.structs.replace(SPEC, class_names=("no", "yes"), activation="sigmoid", outputs=1)
    labels = LABELS % 2
    logits = np.where(labels == 1, 2.0, -2.0).astype(np.float32)[:, None]
    data = ParityData(np.zeros((1000, 1, 1, 3), np.uint8), labels, "pictures", "0" * 64)
    one = Reference("pytorch", spec, data, logits, logits, logits[:3], logits[:3])
    assert report(one)[0].startswith("reference: accuracy 100.00%")
    with pytest.raises(CheckFailed, match="on 2 classes is chance"):
        report(one._replace(logits=-logits))
