from typing import Any

import numpy as np
import pytest
import torch

from cifarx_train.data.mixing import MixedLabels, Mixing, cutmix, mixup, select_targets
from cifarx_train.recipes import load_recipe

CPU = torch.device("cpu")


def flat_images(count: int, side: int = 16) -> torch.Tensor:
    """Return images of one level each, which is 10 times the index, uint8 (count, side, side, 3)."""
    levels = 10 * torch.arange(count, dtype=torch.uint8)
    return levels[:, None, None, None].expand(count, side, side, 3).contiguous()


def make_mixing(**values: Any) -> Mixing:
    return Mixing(load_recipe("notes", overrides=values), CPU)


def test_mixup_is_the_weighted_mean() -> None:
    images, weight = flat_images(4), torch.tensor([1.0, 0.0, 0.5, 0.26])
    mixed, share = mixup(images, images.roll(1, 0), weight)
    assert mixed[:, 0, 0, 0].tolist() == [0, 0, 15, round(0.26 * 30 + 0.74 * 20)]
    assert torch.equal(share, weight)


def test_cutmix_pastes_one_rectangle_whose_share_is_the_weight() -> None:
    torch.manual_seed(0)
    images = flat_images(25)
    mixed, share = cutmix(images, images.roll(1, 0), torch.linspace(0, 1, 25))
    pasted = mixed[..., 0] != images[..., 0]
    assert torch.equal(share, 1 - pasted.float().mean((1, 2)))
    assert share[-1] == 1
    for hole in pasted.numpy():
        assert hole.sum() == hole.any(0).sum() * hole.any(1).sum()  # a rectangle


def test_the_rectangle_has_the_wanted_size_where_it_fits() -> None:
    torch.manual_seed(0)
    images = flat_images(2).repeat(2000, 1, 1, 1)
    _, share = cutmix(images, images.roll(1, 0), torch.full((4000,), 0.75))  # 8x8 of 16x16 pixels
    assert share.min() >= 0.75 - 0.1  # rounded to 9x9 at most
    assert 0.74 < share.mode().values < 0.76


@pytest.mark.parametrize("values", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_labels_are_mixed_like_the_pixels(values: dict[str, Any]) -> None:
    torch.manual_seed(0)
    labels = torch.arange(20)
    mixed, targets = make_mixing(**values)(flat_images(20), labels)
    assert torch.equal(targets.first, labels)
    assert torch.equal(targets.second, labels.roll(1))
    mean = mixed.float().mean((1, 2, 3))
    expected = 10 * (targets.weight * targets.first + (1 - targets.weight) * targets.second)
    assert (mean - expected).abs().max() <= 0.51
    assert len(torch.unique(targets.weight)) > 5


def test_the_weights_follow_the_beta_distribution() -> None:
    torch.manual_seed(0)
    _, targets = make_mixing(mixup=0.4)(flat_images(25, 2).repeat(800, 1, 1, 1), torch.zeros(20_000, dtype=torch.int64))
    weights = targets.weight.double().numpy()
    assert np.isclose(weights.mean(), 0.5, atol=0.01)
    assert np.isclose(weights.var(), 1 / (4 * (2 * 0.4 + 1)), atol=0.005)


def test_parts_of_targets() -> None:
    labels = torch.arange(4)
    assert torch.equal(select_targets(labels, slice(1, 3)), torch.tensor([1, 2]))  # type: ignore[arg-type]
    part = select_targets(MixedLabels(labels, labels.flip(0), labels / 4), slice(2, 4))
    assert isinstance(part, MixedLabels)
    assert (part.first.tolist(), part.second.tolist(), part.weight.tolist()) == ([2, 3], [1, 0], [0.5, 0.75])
