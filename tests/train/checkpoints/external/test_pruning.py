"""Folded masks give the weights that the pruned network used."""

import torch
from torch import nn
from torch.nn.utils import prune

from cifarx_train.checkpoints.external.pruning import fold_masks


def test_folded_weights_are_those_of_the_pruned_network() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    prune.l1_unstructured(module[0], "weight", 0.5)
    prune.random_unstructured(module[0], "weight", 0.5)
    prune.ln_structured(module[1], "weight", 0.5, n=2, dim=0)
    prune.random_unstructured(module[1], "bias", 1)
    tensors, pruned = fold_masks(module.state_dict())
    for name, count in (("0.weight", 3), ("1.weight", 3), ("1.bias", 3)):
        assert pruned == count
        assert torch.equal(tensors[name], module.get_submodule(name[0]).__dict__[name[2:]])
    assert set(tensors) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_other_tensors_are_unchanged() -> None:
    tensors = {"a_orig": torch.ones(2), "b_mask": torch.ones(2), "c_orig": torch.ones(2), "c_mask": torch.ones(3)}
    folded, pruned = fold_masks(tensors)
    assert pruned == 0
    assert "a_orig" in folded
    assert "b_mask" in folded


def test_the_type_of_the_weights_is_kept() -> None:
    folded, _ = fold_masks({"w_orig": torch.ones(2).half(), "w_mask": torch.tensor([1.0, 0.0])})
    assert folded["w"].dtype is torch.float16
    assert folded["w"].tolist() == [1, 0]
