import numpy as np
import pytest
import torch

from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.base import Loader
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.loaders.streaming import StreamingLoader
from cifarx_train.data.loaders.subset import SubsetLoader, stratified_split

CPU = torch.device("cpu")


def images_of(labels: list[int]) -> LabeledImages:
    """Images whose pixels are their indices."""
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return LabeledImages(pixels, np.array(labels))


def indices_in(loader: Loader) -> list[int]:
    [(images, _)] = loader.batches([torch.arange(len(loader))])
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("kind", [DeviceLoader, StreamingLoader])
def test_the_images_and_labels_are_those_of_the_indices(kind: type[DeviceLoader | StreamingLoader]) -> None:
    subset = SubsetLoader(kind(images_of([0, 1, 2, 1, 0]), CPU), torch.tensor([4, 1, 2]))
    assert len(subset) == 3
    [(first, first_labels), (second, second_labels)] = subset.batches([torch.tensor([2, 0]), torch.tensor([1])])
    assert (first[:, 0, 0, 0].tolist(), first_labels.tolist()) == ([2, 4], [2, 0])
    assert (second[:, 0, 0, 0].tolist(), second_labels.tolist()) == ([1], [1])
    assert subset.labels.tolist() == [0, 1, 2]


def test_the_same_fraction_of_every_class_is_held_out() -> None:
    kept, held = stratified_split(DeviceLoader(images_of([0] * 100 + [1] * 20 + [2] * 4), CPU), 0.1, seed=3)
    assert torch.bincount(held.labels, minlength=3).tolist() == [10, 2, 0]
    assert sorted(indices_in(kept) + indices_in(held)) == list(range(124))
    again = stratified_split(DeviceLoader(images_of([0] * 100 + [1] * 20 + [2] * 4), CPU), 0.1, seed=3)[1]
    other = stratified_split(DeviceLoader(images_of([0] * 100 + [1] * 20 + [2] * 4), CPU), 0.1, seed=4)[1]
    assert indices_in(again) == indices_in(held) != indices_in(other)
