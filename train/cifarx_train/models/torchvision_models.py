"""torchvision's classifiers, by torchvision's own names, without published weights.

Importing this module imports torchvision, which takes seconds: only the registry does, and only when it must.
"""

from functools import cache
from typing import Any

import torchvision
from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.models.network import RESNETS, Network, Stem, no_small_stem
from cifarx_train.models.sizes import size_text

_SMALLEST = 32  # the size of CIFAR-10's images: every network takes it that works on it
# These do not work on 32x32 images, or on no other size than they were built for. Tests hold this to torchvision.
_AT_PUBLISHED_SIZE = ("alexnet", "inception_v3", "maxvit", "vit_")
# Their auxiliary heads would make the output of training a tuple; unsaid, `init_weights` warns that it will change.
_ONE_HEAD: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@cache
def classifier_names() -> tuple[str, ...]:
    """Every classifier of the installed torchvision, sorted."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def classifier(name: str, stem: Stem) -> Network:
    """The classifier of that name, one of `classifier_names()`.

    Raises:
        UsageError: a small stem was asked of a network that is no ResNet.
    """
    if stem == "small" and not name.startswith(RESNETS):
        raise no_small_stem(name)

    def build(classes: int, size: InputSpec) -> nn.Module:
        module: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=classes, **_ONE_HEAD.get(name, {}), **_size_options(name, size)
        )
        if stem == "small":
            _keep_size(module)
        return module

    side = published_size(name) if name.startswith(_AT_PUBLISHED_SIZE) else _SMALLEST
    return Network(name, stem, InputSpec(height=side, width=side), build)


def published_size(name: str) -> int:
    """The side of the square images that the published weights of a classifier take; downloads nothing."""
    side: int = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    return side


def _size_options(name: str, size: InputSpec) -> dict[str, Any]:
    """What the builder of a classifier must know of the images' size.

    Raises:
        UsageError: it cannot be built for it.
    """
    if name.startswith("vit_"):
        _check_multiple(name, size, of=int(name.rsplit("_", 1)[1]))  # vit_b_16 has patches of 16x16 pixels
        return {"image_size": size.height}
    if name.startswith("maxvit"):
        _check_multiple(name, size, of=7 * 32)  # windows of 7x7 on what five halvings leave of the image
        return {"input_size": (size.height, size.width)}
    return {}


def _check_multiple(name: str, size: InputSpec, of: int) -> None:
    if size.height != size.width or size.height % of:
        raise UsageError(
            f"{name} takes square images whose side is a multiple of {of}, not {size_text(size)}",
            f"use --image-size {max(of, size.height // of * of)}, or leave it out",
        )


def _keep_size(resnet: Any) -> None:
    """Give a ResNet the stem for 32x32 images of the paper (arXiv:1512.03385, section 4.2), in place.

    A 3x3 convolution of stride 1 and no max-pool: torchvision's own stem would leave 8x8 pixels of them.
    """
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as all of torchvision's ResNet
    resnet.maxpool = nn.Identity()
