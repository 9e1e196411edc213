"""Usual ways to preprocess images, each as an `InputSpec`."""

from typing import Any, Final

from cifarx_serve.spec import InputSpec

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

_IMAGENET_CROP: Final = 224 / 256


class Preprocessing:
    """Ways to state how images become the input of a network. Each method returns an `InputSpec`."""

    @staticmethod
    def imagenet(size: int | tuple[int, int] = 224) -> InputSpec:
        """Return the preprocessing with which ImageNet's networks are usually tested.

        This is torchvision's `Resize(256)`, `CenterCrop(224)`, `ToTensor()` and `Normalize` with ImageNet's mean and
        standard deviation; for another size, the images are resized in the same proportion.

        Args:
            size: the size of the crop in pixels, or (height, width).
        """
        height, width = _height_and_width(size)
        return InputSpec(
            height=height,
            width=width,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            resize="shorter_side",
            resize_to=round(min(height, width) / _IMAGENET_CROP),
        )

    @staticmethod
    def cifarx(size: int | tuple[int, int] = 32) -> InputSpec:
        """Return the preprocessing of `cifarx train`: resized without a crop, scaled to 0 to 1, not normalized.

        Args:
            size: the size in pixels, or (height, width).
        """
        height, width = _height_and_width(size)
        return InputSpec(height=height, width=width)

    @staticmethod
    def from_transforms(transforms: Any, image_size: int | tuple[int, int] | None = None) -> InputSpec:
        """Return the preprocessing of transforms of torchvision, for evaluation.

        Args:
            transforms: a `Compose` of `torchvision.transforms` or `torchvision.transforms.v2`, a list of transforms, or
                the `transforms()` of published weights.
            image_size: the size of the images in pixels, or (height, width), if the transforms do not resize them.

        Raises:
            SpecError: a spec cannot describe a transform. The message names it.
            UsageError: the transforms do not resize the images, and `image_size` is not given.
        """
        from cifarx_train.models.torchvision_transforms import transforms_input

        return transforms_input(transforms, None if image_size is None else _height_and_width(image_size))

    @staticmethod
    def from_timm(model: Any) -> InputSpec:
        """Return the preprocessing that timm configures for one of its models.

        Args:
            model: a model of timm, or a data configuration as `timm.data.resolve_data_config` returns it.

        Raises:
            SpecError: a spec cannot describe it.
            UsageError: timm is not installed.
        """
        from cifarx_train.models.timm_networks import model_input_config, timm_input

        return timm_input(model if isinstance(model, dict) else model_input_config(model))

    @staticmethod
    def from_hf(processor: Any) -> InputSpec:
        """Return the preprocessing of an image processor of Hugging Face's transformers.

        Raises:
            SpecError: a spec cannot describe it.
        """
        from cifarx_train.models.image_processor import processor_input

        return processor_input(processor)


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
