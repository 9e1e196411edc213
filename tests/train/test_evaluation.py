from functools import reduce

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cifarx_serve.images.preprocess import scale
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.device import DeviceImages
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluation, Evaluator

CPU = torch.device("cpu")
CLASSES = 5
# As large as an evaluation's batch takes 32 of: batches come about without many pixels.
SPEC = InputSpec(height=126, width=126)
SMALL = InputSpec(height=4, width=4)


def random_split(count: int, spec: InputSpec = SMALL) -> LabeledImages:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, spec.height, spec.width, 3), dtype=np.uint8)
    return LabeledImages(images, rng.integers(0, CLASSES, count))


def eval_model(
    model: nn.Module, data: LabeledImages, spec: InputSpec = SMALL, ranks: Distributed = Distributed()
) -> Evaluation:  # noqa: B008
    return Evaluator(DeviceImages(data, CPU), spec, CLASSES, CPU, ranks).evaluate(model)


class Watched(nn.Module):
    """Linear on the mean colours and one pixel; remembers the size of every batch and its mode."""

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


def recomputed(model: nn.Module, data: LabeledImages, spec: InputSpec) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(torch.from_numpy(scale(data.images, spec))), torch.from_numpy(data.labels)


# Around the batch of an evaluation: fewer, exactly, one more, and a last partial batch after several.
@pytest.mark.parametrize("count", [1, 3, 31, 32, 33, 75])
def test_equals_a_direct_computation_over_every_image(count: int) -> None:
    torch.manual_seed(0)
    model, data = Watched(), random_split(count, SPEC)
    found = eval_model(model, data, SPEC)
    assert sum(model.batches) == count
    assert len(model.batches) == -(-count // 32)
    logits, labels = recomputed(model, data, SPEC)
    assert found.loss == pytest.approx(functional.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert found.accuracy == (logits.argmax(1).numpy() == data.labels).mean()
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(confusion, (data.labels, logits.argmax(1).numpy()), 1)
    assert np.array_equal(found.confusion, confusion)
    assert found.confusion.dtype == np.int64


@pytest.mark.parametrize("count", [5, 30, 200])
def test_the_mistakes_are_those_that_the_model_is_surest_of(count: int) -> None:
    torch.manual_seed(1)
    model, data = Watched(), random_split(count)
    found = eval_model(model, data)
    logits, labels = recomputed(model, data, SMALL)
    scores, predicted = logits.softmax(1).max(1)
    wrong = sorted((place for place in range(count) if predicted[place] != labels[place]), key=lambda p: -scores[p])
    assert [mistake.position for mistake in found.mistakes] == wrong[:25]
    for mistake in found.mistakes:
        assert mistake.predicted == predicted[mistake.position]
        assert mistake.score == pytest.approx(scores[mistake.position].item(), rel=1e-5)


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_several_ranks_judge_every_image_once(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's own part, added up by hand, is what one process finds."""
    torch.manual_seed(0)
    model, data = Watched(), random_split(count)
    alone = eval_model(model, data)
    monkeypatch.setattr(Distributed, "total", lambda _, values: values)
    parts = [eval_model(model, data, ranks=Distributed(rank, size, rank, size)) for rank in range(size)]
    assert np.array_equal(reduce(np.add, (part.confusion for part in parts)), alone.confusion)
    assert sum(part.loss for part in parts) == pytest.approx(alone.loss, rel=1e-6)
    assert sum(part.accuracy for part in parts) == pytest.approx(alone.accuracy)
    shares = [int(part.confusion.sum()) for part in parts]
    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1
    together = sorted((mistake for part in parts for mistake in part.mistakes), key=lambda m: -m.score)
    assert [m.position for m in together[:25]] == [m.position for m in alone.mistakes]


def test_the_model_is_in_eval_mode() -> None:
    model = Watched().train()
    eval_model(model, random_split(60))
    assert model.modes == {False}


def test_dropout_is_off_and_statistics_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.9), nn.Linear(48, CLASSES)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = random_split(70)
    one, other = eval_model(model, data), eval_model(model, data)
    assert (one.loss, one.accuracy) == (other.loss, other.accuracy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_gradients_are_kept() -> None:
    model = Watched()
    eval_model(model, random_split(10))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_can_be_trained_after_it_was_judged() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))
    eval_model(model, random_split(10))
    model(torch.zeros(2, 3, 4, 4)).sum().backward()


def test_the_random_state_stays() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, CLASSES))
    before = torch.get_rng_state()
    eval_model(model, random_split(60))
    assert torch.equal(torch.get_rng_state(), before)


class Oracle(nn.Module):
    """Reads the label out of the first pixel, and is as sure of it as `certainty`."""

    def __init__(self, certainty: float, shift: int = 0) -> None:
        super().__init__()
        self.certainty = certainty
        self.shift = shift

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        labels = (images[:, 0, 0, 0] * 255).round().long()
        return functional.one_hot((labels + self.shift) % CLASSES, CLASSES) * self.certainty


def test_from_all_right_to_all_wrong() -> None:
    data = random_split(73)
    data.images[:, 0, 0, 0] = data.labels
    counts = np.bincount(data.labels, minlength=CLASSES)
    right = eval_model(Oracle(100.0), data)
    assert (right.loss, right.accuracy, list(right.mistakes)) == (0.0, 1.0, [])
    assert np.array_equal(right.confusion, np.diag(counts))
    wrong = eval_model(Oracle(100.0, shift=1), data)
    assert (wrong.loss, wrong.accuracy) == (pytest.approx(100.0), 0.0)
    assert np.array_equal(wrong.confusion, np.roll(np.diag(counts), 1, axis=1))
    assert len(wrong.mistakes) == 25
    undecided = eval_model(Oracle(0.0), data)
    assert undecided.loss == pytest.approx(np.log(CLASSES))
    assert undecided.accuracy == (data.labels == 0).mean()


def test_the_input_is_normalised_as_the_spec_says() -> None:
    data = random_split(20)
    spec = InputSpec(height=4, width=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model = Watched()
    logits, labels = recomputed(model, data, spec)
    assert eval_model(model, data, spec).loss == pytest.approx(
        functional.cross_entropy(logits, labels).item(), rel=1e-5
    )


def test_logits_that_are_no_numbers_give_a_loss_that_is_none() -> None:
    assert not np.isfinite(eval_model(Oracle(float("nan")), random_split(10)).loss)
