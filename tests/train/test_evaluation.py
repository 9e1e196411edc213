from functools import reduce

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluation, Evaluator

CPU = torch.device("cpu")
CLASSES = 5
# At this size the evaluator uses batches of 32 images.
SPEC = InputSpec(height=126, width=126)
SMALL = InputSpec(height=4, width=4)


def random_split(count: int, spec: InputSpec = SMALL) -> LabeledImages:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, spec.height, spec.width, 3), dtype=np.uint8)
    return LabeledImages(images, rng.integers(0, CLASSES, count))


def evaluate(
    model: nn.Module,
    data: LabeledImages,
    spec: InputSpec = SMALL,
    distributed: Distributed = Distributed(),  # noqa: B008
) -> Evaluation:
    return Evaluator(DeviceLoader(data, CPU), spec, CLASSES, CPU, distributed).evaluate(model)


class RecordingModel(nn.Module):
    """A linear layer on the mean color and one pixel that records batch sizes and whether it is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, CLASSES)
        self.batches: list[int] = []
        self.modes: set[bool] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        self.modes.add(self.training)
        logits: torch.Tensor = self.linear(torch.cat((images.mean((2, 3)), images[:, :, 0, 0]), 1))
        return logits


def expected_logits(model: nn.Module, data: LabeledImages, spec: InputSpec) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(torch.from_numpy(normalize(data.images, spec))), torch.from_numpy(data.labels)


# Fewer images than a batch, exactly one batch, one image more, and several batches with a partial one at the end.
@pytest.mark.parametrize("count", [1, 3, 31, 32, 33, 75])
def test_matches_a_direct_computation_over_all_images(count: int) -> None:
    torch.manual_seed(0)
    model, data = RecordingModel(), random_split(count, SPEC)
    evaluation = evaluate(model, data, SPEC)
    assert sum(model.batches) == count
    assert len(model.batches) == -(-count // 32)
    logits, labels = expected_logits(model, data, SPEC)
    assert evaluation.loss == pytest.approx(functional.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert evaluation.accuracy == (logits.argmax(1).numpy() == data.labels).mean()
    confusion_matrix = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(confusion_matrix, (data.labels, logits.argmax(1).numpy()), 1)
    assert np.array_equal(evaluation.confusion_matrix, confusion_matrix)
    assert evaluation.confusion_matrix.dtype == np.int64


@pytest.mark.parametrize("count", [5, 30, 200])
def test_mistakes_are_sorted_by_confidence(count: int) -> None:
    torch.manual_seed(1)
    model, data = RecordingModel(), random_split(count)
    evaluation = evaluate(model, data)
    logits, labels = expected_logits(model, data, SMALL)
    confidences, predicted = logits.softmax(1).max(1)
    wrong = sorted((i for i in range(count) if predicted[i] != labels[i]), key=lambda i: -confidences[i])
    assert [mistake.image_index for mistake in evaluation.mistakes] == wrong[:25]
    for mistake in evaluation.mistakes:
        assert mistake.predicted == predicted[mistake.image_index]
        assert mistake.confidence == pytest.approx(confidences[mistake.image_index].item(), rel=1e-5)


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_several_ranks_evaluate_every_image_once(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of the results of all ranks is the result of a single process."""
    torch.manual_seed(0)
    model, data = RecordingModel(), random_split(count)
    single = evaluate(model, data)
    monkeypatch.setattr(Distributed, "all_reduce", lambda _, tensor: tensor)
    parts = [evaluate(model, data, distributed=Distributed(rank, size, rank, size)) for rank in range(size)]
    assert np.array_equal(reduce(np.add, (part.confusion_matrix for part in parts)), single.confusion_matrix)
    assert sum(part.loss for part in parts) == pytest.approx(single.loss, rel=1e-6)
    assert sum(part.accuracy for part in parts) == pytest.approx(single.accuracy)
    counts = [int(part.confusion_matrix.sum()) for part in parts]
    assert sum(counts) == count
    assert max(counts) - min(counts) <= 1
    mistakes = sorted((mistake for part in parts for mistake in part.mistakes), key=lambda m: -m.confidence)
    assert [m.image_index for m in mistakes[:25]] == [m.image_index for m in single.mistakes]


def test_the_model_is_in_eval_mode() -> None:
    model = RecordingModel().train()
    evaluate(model, random_split(60))
    assert model.modes == {False}


def test_dropout_is_disabled_and_running_statistics_are_unchanged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.9), nn.Linear(48, CLASSES)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = random_split(70)
    first, second = evaluate(model, data), evaluate(model, data)
    assert (first.loss, first.accuracy) == (second.loss, second.accuracy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_gradients_are_computed() -> None:
    model = RecordingModel()
    evaluate(model, random_split(10))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_can_be_trained_after_evaluation() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))
    evaluate(model, random_split(10))
    model(torch.zeros(2, 3, 4, 4)).sum().backward()


def test_the_random_state_is_unchanged() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, CLASSES))
    before = torch.get_rng_state()
    evaluate(model, random_split(60))
    assert torch.equal(torch.get_rng_state(), before)


class Oracle(nn.Module):
    """Reads the label from the first pixel and returns a logit of `certainty` for it."""

    def __init__(self, certainty: float, shift: int = 0) -> None:
        super().__init__()
        self.certainty = certainty
        self.shift = shift

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        labels = (images[:, 0, 0, 0] * 255).round().long()
        return functional.one_hot((labels + self.shift) % CLASSES, CLASSES) * self.certainty


def test_all_correct_all_wrong_and_undecided_predictions() -> None:
    data = random_split(73)
    data.images[:, 0, 0, 0] = data.labels
    counts = np.bincount(data.labels, minlength=CLASSES)
    right = evaluate(Oracle(100.0), data)
    assert (right.loss, right.accuracy, list(right.mistakes)) == (0.0, 1.0, [])
    assert np.array_equal(right.confusion_matrix, np.diag(counts))
    wrong = evaluate(Oracle(100.0, shift=1), data)
    assert (wrong.loss, wrong.accuracy) == (pytest.approx(100.0), 0.0)
    assert np.array_equal(wrong.confusion_matrix, np.roll(np.diag(counts), 1, axis=1))
    assert len(wrong.mistakes) == 25
    undecided = evaluate(Oracle(0.0), data)
    assert undecided.loss == pytest.approx(np.log(CLASSES))
    assert undecided.accuracy == (data.labels == 0).mean()


def test_the_input_is_normalized_according_to_the_spec() -> None:
    data = random_split(20)
    spec = InputSpec(height=4, width=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model = RecordingModel()
    logits, labels = expected_logits(model, data, spec)
    assert evaluate(model, data, spec).loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_nan_logits_give_a_non_finite_loss() -> None:
    assert not np.isfinite(evaluate(Oracle(float("nan")), random_split(10)).loss)
