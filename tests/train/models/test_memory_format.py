import torch
from torch import Tensor, nn

from cifarx_serve.spec import InputSpec
from cifarx_train.models.memory_format import make_input_contiguous, supports_channels_last

SIZE = InputSpec(height=8, width=8)


class View(nn.Module):
    """Reshapes its activations with `view`, which needs contiguous ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images).view(len(images), -1))
        return logits


def test_a_network_with_flatten_supports_any_format() -> None:
    assert supports_channels_last(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), SIZE)


def test_a_network_with_view_needs_contiguous_activations() -> None:
    network = View()
    images = torch.rand(2, 3, 8, 8)
    expected = network(images)
    assert not supports_channels_last(network, SIZE)
    make_input_contiguous(network)
    assert torch.allclose(network(images.to(memory_format=torch.channels_last)), expected)
    assert network.training
    assert network.state_dict().keys() == View().state_dict().keys()


def test_channels_that_are_last_anyway() -> None:
    assert not supports_channels_last(nn.Flatten(), InputSpec(height=8, width=8, layout="NHWC"))
