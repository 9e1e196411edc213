from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

from cifarx_serve.errors import CifarxError, SpecError, UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.models.torchvision_transforms import transforms_input

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def found(*steps: Any, image_size: tuple[int, int] | None = None) -> InputSpec:
    return transforms_input(transforms.Compose(steps), image_size)


def error_of(*steps: Any) -> str:
    with pytest.raises(CifarxError) as caught:
        found(*steps)
    return str(caught.value)


def test_images_that_are_not_resized_need_a_size() -> None:
    steps = (transforms.ToTensor(), transforms.Normalize(*HALF))
    with pytest.raises(UsageError, match=r"do not resize the images.*from_transforms\(transforms, image_size=32\)"):
        found(*steps)
    assert found(*steps, image_size=(32, 48)) == InputSpec(height=32, width=48, mean=HALF[0], std=HALF[1])


@pytest.mark.parametrize(
    "steps",
    [
        [transforms.Resize((8, 9)), transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float32)],
        [v2.RGB(), v2.Resize((8, 9)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()],
        [transforms.Compose([transforms.Resize((8, 9))]), nn.Sequential(v2.Identity()), transforms.ToTensor()],
        [transforms.Resize((8, 9), interpolation=2), transforms.ToTensor()],
    ],
)
def test_several_ways_to_write_the_same(steps: list[Any]) -> None:
    assert transforms_input(steps, None) == InputSpec(height=8, width=9)
    assert transforms_input(v2.Compose(steps), None) == InputSpec(height=8, width=9)


def test_values_from_0_to_255() -> None:
    assert found(transforms.Resize((8, 9)), v2.PILToTensor(), v2.ToDtype(torch.float32)).value_range == (0, 255)


def test_a_resize_without_antialiasing() -> None:
    plain = found(transforms.ToTensor(), transforms.Resize((30, 40), antialias=False))
    assert not plain.antialias
    ignored = found(transforms.Resize((30, 40), antialias=False), transforms.ToTensor())  # for a Pillow image
    assert ignored.antialias


@pytest.mark.parametrize("name", ["ResNet18_Weights", "EfficientNet_B3_Weights", "ViT_B_16_Weights"])
def test_the_transforms_of_published_weights(name: str) -> None:
    preset = getattr(torchvision.models, name).DEFAULT.transforms()
    spec = transforms_input(preset, None)
    assert (spec.height, spec.resize_to, spec.mean) == (
        preset.crop_size[0],
        preset.resize_size[0],
        tuple(preset.mean),
    )


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([transforms.RandomHorizontalFlip()], "the transform RandomHorizontalFlip, which is for training: give the"),
        ([transforms.ColorJitter(0.1)], "the transform ColorJitter, which is for training"),
        ([transforms.Lambda(abs)], "the transform Lambda, which is not among those for the evaluation of image"),
        ([nn.Identity()], "the transform Identity, which is not among those"),
        ([transforms.CenterCrop(8), transforms.Resize((9, 9))], "CenterCrop, which comes before the images are"),
        ([transforms.Resize(9), transforms.Resize(8)], "Resize, which comes after another resize, a crop or a norm"),
        ([transforms.Resize(8, max_size=9)], "Resize, which has a maximum size"),
        ([transforms.Resize((8, 8), transforms.InterpolationMode.BOX)], "Resize, which uses the filter box"),
        ([transforms.Grayscale(3)], "Grayscale, which returns three equal channels"),
        ([transforms.Resize((8, 8)), transforms.Grayscale()], "Grayscale, which comes after another transform"),
        ([transforms.ToTensor(), transforms.ConvertImageDtype(torch.float16)], "which converts to torch.float16"),
        ([transforms.Normalize(*HALF)], "Normalize, which comes before the images are floats"),
        ([transforms.ToTensor(), *[transforms.Normalize(*HALF)] * 2], "Normalize, which comes after another norm"),
        ([transforms.Resize(64), transforms.ToTensor()], r"Resize\(64\) keeps the aspect ratio of the images"),
        ([transforms.Resize((8, 8))], "the transforms do not make a tensor of floats: add ToTensor"),
    ],
)  # fmt: skip
def test_what_a_spec_cannot_describe_is_refused_by_name(steps: list[Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        transforms_input(steps, None)


def test_a_transform_that_is_changed_is_noticed() -> None:
    class Twice(transforms.Normalize):
        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            twice: torch.Tensor = super().forward(super().forward(tensor))
            return twice

    Twice.__name__, Twice.__module__ = "Normalize", "torchvision.transforms"
    assert "does what a spec cannot describe (its pixels differ by up to" in error_of(
        transforms.Resize((8, 8)), transforms.ToTensor(), Twice(*HALF)
    )
