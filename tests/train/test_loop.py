import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cifarx_serve.errors import CheckFailed
from cifarx_serve.preprocess import scale
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabelledImages
from cifarx_train.data.on_device import DeviceImages
from cifarx_train.loop import EpochEnd, Loop
from cifarx_train.models.registry import network
from cifarx_train.observers import Observer
from cifarx_train.recipes import recipe

SPEC = InputSpec(height=32, width=32)


def random_split(count: int, side: int = 32) -> LabelledImages:
    """Random images, each with its own number in its first pixel's red."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return LabelledImages(images, rng.integers(0, 3, count))


class Watched(nn.Module):
    """Linear on tiny images; remembers the numbers of the images of each batch, and the modes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)
        self.batches: list[list[int]] = []
        self.modes: list[bool] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append((images[:, 0, 0, 0] * 255).round().int().tolist())
        self.modes.append(self.training)
        logits: torch.Tensor = self.linear(images.flatten(1))
        return logits


class Notes(Observer):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: dict[int, float] = {}

    def on_step(self, step: int) -> None:
        self.steps.append(step)

    def on_train_loss(self, step: int, loss: float) -> None:
        self.losses[step] = loss


def tiny_loop(model: nn.Module, count: int, *, epochs: int, batch_size: int, lr: float = 0.01, seed: int = 0) -> Loop:
    data = DeviceImages(random_split(count, side=2), SPEC, torch.device("cpu"))
    return Loop(model, data, recipe("notes", epochs=epochs, batch_size=batch_size, learning_rate=lr), seed)


def by_hand(
    data: LabelledImages, model: nn.Module, *, epochs: int, batch_size: int, lr: float, seed: int
) -> Iterator[float]:
    """Plain SGD without an optimizer object or any code of the loop; gives the loss of every step."""
    inputs, labels = torch.from_numpy(scale(data.images, SPEC)), torch.from_numpy(data.labels)
    orders = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=orders)
        for start in range(0, len(labels), batch_size):
            chosen = order[start : start + batch_size]
            loss = functional.cross_entropy(model(inputs[chosen]), labels[chosen])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.add_(gradient, alpha=-lr)
            yield loss.item()


def test_equals_sgd_written_by_hand_bit_for_bit() -> None:
    data = random_split(70)
    torch.manual_seed(3)
    model = network("lzh").build(3)
    twin = network("lzh").build(3)
    twin.load_state_dict(model.state_dict())
    plan = recipe("notes", epochs=2, batch_size=16, learning_rate=0.05)
    loop = Loop(model, DeviceImages(data, SPEC, torch.device("cpu")), plan, seed=11)
    assert [end.epoch for end in loop.epochs(Observer())] == [0, 1]
    losses = list(by_hand(data, twin, epochs=2, batch_size=16, lr=0.05, seed=11))
    assert len(losses) == 10
    for name, expected in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), name


def test_every_image_is_seen_once_an_epoch_in_a_new_order() -> None:
    model = Watched()
    loop = tiny_loop(model, 50, epochs=3, batch_size=16)
    orders = []
    for _ in loop.epochs(Observer()):
        assert [len(batch) for batch in model.batches] == [16, 16, 16, 2]
        orders.append([number for batch in model.batches for number in batch])
        model.batches.clear()
    assert [sorted(order) for order in orders] == [list(range(50))] * 3
    assert len({tuple(order) for order in [*orders, range(50)]}) == 4


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[list[int]]:
        model = Watched()
        list(tiny_loop(model, 50, epochs=2, batch_size=50, seed=seed).epochs(Observer()))
        return model.batches

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_order_does_not_hang_on_the_global_random_state() -> None:
    def order(state: int) -> list[list[int]]:
        model = Watched()
        torch.manual_seed(state)
        list(tiny_loop(model, 50, epochs=1, batch_size=50).epochs(Observer()))
        return model.batches

    assert order(1) == order(2)


def test_training_is_in_train_mode_also_after_an_evaluation() -> None:
    model = Watched().eval()
    for _ in tiny_loop(model, 20, epochs=3, batch_size=8).epochs(Observer()):
        model.eval()  # as an evaluation does between epochs
    assert model.modes == [True] * 9


def test_the_train_loss_is_that_of_every_hundredth_step() -> None:
    torch.manual_seed(0)
    model = Watched()
    twin = Watched()
    twin.load_state_dict(model.state_dict())
    notes = Notes()
    ends = list(tiny_loop(model, 70, epochs=5, batch_size=1).epochs(notes))
    losses = list(by_hand(random_split(70, side=2), twin, epochs=5, batch_size=1, lr=0.01, seed=0))
    assert notes.steps == list(range(1, 351))
    assert notes.losses == {step: losses[step - 1] for step in (100, 200, 300)}
    assert [end.step for end in ends] == [70, 140, 210, 280, 350]


def test_few_steps_report_no_train_loss() -> None:
    notes = Notes()
    list(tiny_loop(Watched(), 99, epochs=1, batch_size=1).epochs(notes))
    assert notes.losses == {}


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(50, 16, 12), (48, 16, 9), (50, 64, 3), (1, 1, 3)])
def test_steps_are_known_beforehand(count: int, batch_size: int, steps: int) -> None:
    loop = tiny_loop(Watched(), count, epochs=3, batch_size=batch_size)
    notes = Notes()
    assert loop.steps == steps
    assert list(loop.epochs(notes))[-1].step == steps
    assert notes.steps[-1] == steps


def test_the_speed_of_an_epoch_is_a_positive_number() -> None:
    ends: list[EpochEnd] = list(tiny_loop(Watched(), 50, epochs=2, batch_size=8).epochs(Observer()))
    assert all(math.isfinite(end.images_per_s) and end.images_per_s > 0 for end in ends)


@pytest.mark.parametrize("epochs", [1, 200])
def test_a_diverging_loss_fails_the_check(epochs: int) -> None:
    loop = tiny_loop(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Linear(9, 3)), 40, epochs=epochs, batch_size=8, lr=1e30
    )
    with pytest.raises(CheckFailed, match=r"training diverged.*at step [1-9].*lower --lr") as caught:
        list(loop.epochs(Observer()))
    assert caught.value.exit_status == 1


def test_a_diverging_loss_is_not_reported_as_a_reading() -> None:
    notes = Notes()
    with pytest.raises(CheckFailed, match="at step 100:"):
        list(tiny_loop(Watched(), 100, epochs=1, batch_size=1, lr=1e38).epochs(notes))
    assert notes.losses == {}
