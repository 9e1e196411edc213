import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cifarx_serve.preprocess import scale
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabelledImages
from cifarx_train.data.on_device import DeviceImages
from cifarx_train.evaluation import evaluate

SPEC = InputSpec(height=4, width=4)


def random_split(count: int, classes: int) -> LabelledImages:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return LabelledImages(images, rng.integers(0, classes, count))


def on_cpu(data: LabelledImages) -> DeviceImages:
    return DeviceImages(data, SPEC, torch.device("cpu"))


class Watched(nn.Module):
    """Linear; remembers the size of every batch and whether it came in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 5)
        self.batches: list[int] = []
        self.modes: set[bool] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        self.modes.add(self.training)
        logits: torch.Tensor = self.linear(images.flatten(1))
        return logits


# Around the batch of an evaluation: fewer, exactly, one more, and a last partial batch after several.
@pytest.mark.parametrize("count", [1, 3, 499, 500, 501, 1203])
def test_equals_a_direct_computation_over_every_image(count: int) -> None:
    torch.manual_seed(0)
    model, data = Watched(), random_split(count, classes=5)
    judged = evaluate(model, on_cpu(data))
    assert sum(model.batches) == count
    with torch.no_grad():
        logits = model(torch.from_numpy(scale(data.images, SPEC))).double()
    labels = torch.from_numpy(data.labels)
    assert judged.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert judged.accuracy == (logits.argmax(1).numpy() == data.labels).mean()


def test_the_model_is_in_eval_mode() -> None:
    model = Watched().train()
    evaluate(model, on_cpu(random_split(600, classes=5)))
    assert model.modes == {False}


def test_dropout_is_off_and_statistics_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.9), nn.Linear(48, 5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = on_cpu(random_split(700, classes=5))
    assert evaluate(model, data) == evaluate(model, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_gradients_are_kept() -> None:
    model = Watched()
    evaluate(model, on_cpu(random_split(10, classes=5)))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_random_state_stays() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 5))
    before = torch.get_rng_state()
    evaluate(model, on_cpu(random_split(600, classes=5)))
    assert torch.equal(torch.get_rng_state(), before)


class Oracle(nn.Module):
    """Reads the label out of the first pixel, and is as sure of it as `certainty`."""

    def __init__(self, certainty: float, shift: int = 0) -> None:
        super().__init__()
        self.certainty = certainty
        self.shift = shift

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        labels = (images[:, 0, 0, 0] * 255).round().long()
        return functional.one_hot((labels + self.shift) % 5, 5) * self.certainty


def test_accuracy_is_a_fraction_between_all_wrong_and_all_right() -> None:
    data = random_split(733, classes=5)
    data.images[:, 0, 0, 0] = data.labels
    assert evaluate(Oracle(100.0), on_cpu(data)) == (0.0, 1.0)
    wrong = evaluate(Oracle(100.0, shift=1), on_cpu(data))
    assert wrong == (pytest.approx(100.0), 0.0)
    undecided = evaluate(Oracle(0.0), on_cpu(data))
    assert undecided.loss == pytest.approx(np.log(5))
    assert undecided.accuracy == (data.labels == 0).mean()
