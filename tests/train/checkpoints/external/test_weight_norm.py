"""Folded weight norm gives the weights that the network used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cifarx_train.checkpoints.external.weight_norm import fold_weight_norm, has_weight_norm

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")

FORMS: list[Callable[..., Any]] = [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm]


@pytest.mark.parametrize("normalize", FORMS)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("layer", [nn.Linear(4, 2), nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(1, 4, 2)])
def test_folded_weights_are_those_of_the_network(
    layer: nn.Module, dim: int | None, normalize: Callable[..., Any]
) -> None:
    inner: Any = type(layer)(*_sizes(layer))
    module = nn.Sequential(nn.Sequential(inner))
    normalize(inner, dim=dim)
    tensors, normalized = fold_weight_norm(module.state_dict())
    assert normalized == 1
    assert has_weight_norm(module.state_dict())
    assert set(tensors) == {"0.0.weight", "0.0.bias"}
    torch.testing.assert_close(tensors["0.0.weight"], inner.weight.detach())


def _sizes(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size[0]


def test_a_module_without_a_prefix_in_half_precision() -> None:
    module = nn.utils.weight_norm(nn.Linear(4, 2))
    half = {key: tensor.half() for key, tensor in module.state_dict().items()}
    tensors = fold_weight_norm(half).tensors
    assert tensors["weight"].dtype is torch.float32
    torch.testing.assert_close(tensors["weight"], module.weight.detach(), atol=2e-3, rtol=2e-3)


def test_other_tensors_are_unchanged() -> None:
    tensors = {
        "a_g": torch.ones(2, 3),  # more than one axis
        "a_v": torch.ones(2, 3),
        "b_g": torch.ones(2, 1),  # another size
        "b_v": torch.ones(3, 4),
        "c_g": torch.ones(2, 1),  # alone
        "d.parametrizations.weight.original": torch.ones(2),
    }
    assert fold_weight_norm(tensors) == (tensors, 0)
    assert not has_weight_norm(tensors)
