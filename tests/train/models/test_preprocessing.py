"""What a spec describes is what the libraries do, on photographs of many sizes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import timm.data
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from cifarx_serve.images.preprocess import normalize, resize
from cifarx_serve.spec import InputSpec
from cifarx_train.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

FEW: Final = 12
MANY: Final = 1000

NORMALIZE = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
SCALE = v2.ToDtype(torch.float32, scale=True)


class Library(NamedTuple):
    """The preprocessing of a library: the spec that is made of it, what it does, and the largest difference in levels.

    A difference of 0 means that the results are equal bit for bit.
    """

    spec: InputSpec
    preprocess: Callable[[Image.Image], NDArray[np.float32]]
    max_levels: float


def torchvision_library(*steps: Any, max_levels: float = 0) -> Library:
    composed = transforms.Compose(steps)
    return Library(Preprocessing.from_transforms(composed), lambda image: composed(image).numpy(), max_levels)


def timm_library(crop_mode: str, interpolation: str, crop_pct: float) -> Library:
    config = {
        "input_size": (3, 224, 224),
        "interpolation": interpolation,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    transform = timm.data.create_transform(**config, is_training=False)
    return Library(Preprocessing.from_timm(config), lambda image: transform(image).numpy(), 0)


def processor_library(processor: Any, max_levels: float) -> Library:
    def preprocess(image: Image.Image) -> NDArray[np.float32]:
        return np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])

    return Library(Preprocessing.from_hf(processor), preprocess, max_levels)


# torchvision resizes tensors with other roundings than Pillow: by up to two levels for bilinear filters, by a few for
# bicubic ones. Hugging Face's processors use these tensors unless they are the ones "Pil".
TENSOR_BILINEAR, TENSOR_BICUBIC = 2.01, 4.01
FLOAT_ROUNDING = 0.01

LIBRARIES: Final[dict[str, Callable[[], Library]]] = {
    "torchvision": lambda: torchvision_library(
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), NORMALIZE
    ),
    "torchvision bicubic": lambda: torchvision_library(
        transforms.Resize(235, InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor(), NORMALIZE
    ),
    "torchvision stretched": lambda: torchvision_library(
        transforms.Resize((250, 240)), transforms.CenterCrop((224, 200)), transforms.ToTensor()
    ),
    "torchvision grayscale": lambda: torchvision_library(
        transforms.Grayscale(), transforms.Resize((28, 28)), transforms.ToTensor(), transforms.Normalize((0.1,), (0.3,))
    ),
    "torchvision v2": lambda: torchvision_library(
        v2.ToImage(), v2.Resize(256), v2.CenterCrop(224), SCALE, NORMALIZE, max_levels=TENSOR_BILINEAR
    ),
    "torchvision floats": lambda: torchvision_library(
        transforms.ToTensor(), transforms.Resize(64), transforms.CenterCrop(56), NORMALIZE, max_levels=TENSOR_BILINEAR
    ),
    "timm center": lambda: timm_library("center", "bicubic", 0.9),
    "timm squash": lambda: timm_library("squash", "bicubic", 0.95),
    "timm border": lambda: timm_library("border", "bilinear", 1.0),
    "ViT": lambda: processor_library(transformers.ViTImageProcessor(), TENSOR_BILINEAR),
    "ViT Pil": lambda: processor_library(transformers.ViTImageProcessorPil(), FLOAT_ROUNDING),
    "ConvNeXT": lambda: processor_library(
        transformers.ConvNextImageProcessor(size={"shortest_edge": 224}), TENSOR_BICUBIC
    ),
    "ConvNeXT 384": lambda: processor_library(transformers.ConvNextImageProcessor(), TENSOR_BICUBIC),
    "MobileNetV2": lambda: processor_library(transformers.MobileNetV2ImageProcessor(), TENSOR_BILINEAR),
    "MobileNetV2 Pil": lambda: processor_library(transformers.MobileNetV2ImageProcessorPil(), FLOAT_ROUNDING),
    "MobileViT": lambda: processor_library(
        transformers.MobileViTImageProcessor(size={"shortest_edge": 288}), TENSOR_BICUBIC
    ),
    "EfficientNet": lambda: processor_library(transformers.EfficientNetImageProcessor(), TENSOR_BICUBIC),
    "LeViT": lambda: processor_library(transformers.LevitImageProcessor(), TENSOR_BICUBIC),
    "PoolFormer": lambda: processor_library(transformers.PoolFormerImageProcessor(), TENSOR_BICUBIC),
    "SigLIP": lambda: processor_library(transformers.SiglipImageProcessor(), TENSOR_BICUBIC),
    "CLIP": lambda: processor_library(transformers.CLIPImageProcessor(), TENSOR_BICUBIC),
    "DeiT": lambda: processor_library(transformers.DeiTImageProcessor(), TENSOR_BICUBIC),
}


def photographs(path: Path, count: int) -> Iterator[Image.Image]:
    """Yield random parts of a photograph, from 40 to 500 pixels wide and high."""
    random = np.random.default_rng(0)
    with Image.open(path) as image:
        whole = image.convert("RGB")
    for _ in range(count):
        width, height = random.integers(40, 500, 2)
        left, top = random.integers(0, whole.width - width), random.integers(0, whole.height - height)
        yield whole.crop((left, top, left + width, top + height))


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_preprocessing_of_a_library(name: str, count: int, dog: Path) -> None:
    library = LIBRARIES[name]()
    spec = library.spec
    level = np.asarray((spec.value_range[1] - spec.value_range[0]) / 255 / np.asarray(spec.std)).reshape(-1, 1, 1)
    for image in photographs(dog, count):
        expected, found = library.preprocess(image), normalize(resize(image, spec)[None], spec)[0]
        assert expected.shape == found.shape
        if not library.max_levels:
            assert np.array_equal(expected, found), image.size
        assert (np.abs(expected - found) / level).max() <= library.max_levels, image.size


def test_the_usual_preprocessings() -> None:
    imagenet = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), NORMALIZE]
    )
    assert Preprocessing.imagenet() == Preprocessing.from_transforms(imagenet)
    assert Preprocessing.imagenet(288).resize_to == 329
    assert Preprocessing.imagenet((224, 320)).resize_to == 256
    assert Preprocessing.cifarx() == InputSpec(height=32, width=32)
    assert Preprocessing.cifarx((28, 32)) == InputSpec(height=28, width=32)


def test_a_model_of_timm() -> None:
    model = timm.create_model("resnet18.tv_in1k", pretrained=False)
    assert Preprocessing.from_timm(model) == Preprocessing.imagenet()
