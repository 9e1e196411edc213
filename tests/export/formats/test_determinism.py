"""Networks that return something else each time are found, with the line of the code."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cifarx_export.formats.determinism import require_deterministic
from cifarx_serve.errors import UsageError

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits


class Dropout(Network):
    def forward(self, images: Tensor) -> Tensor:
        return functional.dropout(super().forward(images), 0.5)  # this line


class Noise(Network):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + 0.1 * torch.randn_like(images))  # this line


class Counter(Network):
    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images) + self.calls


class Memory(Network):
    def forward(self, images: Tensor) -> Tensor:
        self.last = images.mean() + getattr(self, "last", 0)
        return super().forward(images) + self.last


class DropoutInTraining(Network):
    def forward(self, images: Tensor) -> Tensor:
        return functional.dropout(super().forward(images), 0.5, training=self.training)


class UnusedNoise(Network):
    def forward(self, images: Tensor) -> Tensor:
        torch.rand(3)
        images -= 0.5  # also changes the images in place
        return super().forward(images)


class NotANumber(Network):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float("nan")


@pytest.mark.parametrize("network", [Dropout, Noise])
def test_the_line_that_draws_random_numbers(network: type[Network]) -> None:
    lines, first = inspect.getsourcelines(network)
    line = first + next(number for number, text in enumerate(lines) if "# this line" in text)
    module = network().eval()
    state = torch.get_rng_state()
    with pytest.raises(UsageError) as raised:
        require_deterministic(module, IMAGES)
    assert str(raised.value) == (
        f"{Path(__file__).name} line {line} draws random numbers in eval mode, so the network never returns the same "
        "twice: draw them only in training mode, as in dropout(x, training=self.training)"
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_a_buffer_that_changes_is_named() -> None:
    with pytest.raises(UsageError, match=r"second time on the same images, because it changes its buffer calls: let "):
        require_deterministic(Counter().eval(), IMAGES)


def test_other_state_is_found() -> None:
    with pytest.raises(UsageError, match=r"^the network returns something else when it runs a second time on the same"):
        require_deterministic(Memory().eval(), IMAGES)


class Pair(Network):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images), images  # type: ignore[return-value]


def test_a_network_that_returns_several_tensors_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^the network returns a tuple instead of one tensor: return the logits alone"
    ):
        require_deterministic(Pair().eval(), IMAGES)


@pytest.mark.parametrize("network", [Network, DropoutInTraining, UnusedNoise, NotANumber])
def test_networks_that_return_the_same(network: type[Network]) -> None:
    images = IMAGES.clone()
    require_deterministic(network().eval(), images)
    assert torch.equal(images, IMAGES)
