"""The architectures of torchvision's classifiers, under torchvision's names and without published weights.

This module imports torchvision, which takes seconds, so the registry imports it only when it is needed.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torchvision
from torch import nn

from cifarx_serve.errors import UsageError, error_message
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.architecture import RESNET_PREFIXES, Architecture, Stem, format_size, no_small_stem_error

_SMALL_SIDE = 32  # the size of CIFAR-10's images, which is the default for every network that supports it
# The prefixes of networks that do not support 32x32 images, or only the size that they are built for. Tests check this.
_AT_PUBLISHED_SIZE = ("alexnet", "inception_v3", "maxvit", "vit_")
# With auxiliary heads, the output in training mode would be a tuple. Without `init_weights`, torchvision warns that its
# default will change.
_WITHOUT_AUXILIARY_HEADS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@cache
def list_classifiers() -> tuple[str, ...]:
    """Return the names of all classifiers of the installed torchvision, sorted."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def classifier_architecture(name: str, stem: Stem, arguments: Mapping[str, Any] = MappingProxyType({})) -> Architecture:
    """Return the architecture of a classifier, one of `list_classifiers()`.

    Args:
        name: the name of the classifier.
        stem: "small" to replace the first layers of a ResNet with ones for small images.
        arguments: keyword arguments of torchvision's builder, such as `transform_input` of GoogLeNet.

    Raises:
        UsageError: a small stem was requested for a network that is not a ResNet. Building the network raises it for
            arguments that the network does not take.
    """
    if stem == "small" and not name.startswith(RESNET_PREFIXES):
        raise no_small_stem_error(name)

    def build(classes: int, size: InputSpec) -> nn.Module:
        options = {**_WITHOUT_AUXILIARY_HEADS.get(name, {}), **_size_options(name, size), "num_classes": classes}
        module = _get_model(name, options, arguments)
        if stem == "small":
            _replace_stem(module)
        return module

    side = published_image_size(name) if name.startswith(_AT_PUBLISHED_SIZE) else _SMALL_SIDE
    source = ModelSource(kind="torchvision", name=name, arguments=dict(arguments))
    size = InputSpec(height=side, width=side)
    return Architecture(name, stem, size, build, source, num_outputs=arguments.get("num_classes"), is_tested=True)


def _get_model(name: str, options: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    try:
        module: nn.Module = torchvision.models.get_model(name, weights=None, **{**options, **arguments})
    except (TypeError, ValueError) as error:
        if not arguments:
            raise
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UsageError(
            f"torchvision's {name} does not take {given} ({error_message(error)})", "correct --model-arg"
        ) from error
    return module


def published_image_size(name: str) -> int:
    """Return the side of the square images for which the weights of a classifier were published. Downloads nothing."""
    side: int = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    return side


def _size_options(name: str, size: InputSpec) -> dict[str, Any]:
    """Return the arguments of a classifier's builder that depend on the image size.

    Raises:
        UsageError: the classifier does not support the size.
    """
    if name.startswith("vit_"):
        _check_multiple(name, size, of=int(name.rsplit("_", 1)[1]))  # vit_b_16 has patches of 16x16 pixels
        return {"image_size": size.height}
    if name.startswith("maxvit"):
        _check_multiple(name, size, of=7 * 32)  # windows of 7x7 after the image is halved five times
        return {"input_size": (size.height, size.width)}
    return {}


def _check_multiple(name: str, size: InputSpec, of: int) -> None:
    if size.height != size.width or size.height % of:
        raise UsageError(
            f"{name} takes square images whose side is a multiple of {of}, not {format_size(size)}",
            f"use --image-size {max(of, size.height // of * of)}, or leave it out",
        )


def _replace_stem(resnet: Any) -> None:
    """Replace the stem of a ResNet, in place, by the one for CIFAR-10.

    This is a 3x3 convolution with stride 1 and no max-pooling. The original stem reduces 32x32 images to 8x8.
    He et al. 2015, "Deep residual learning for image recognition" (arXiv:1512.03385), section 4.2.
    """
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as in torchvision's ResNet
    resnet.maxpool = nn.Identity()
