import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.models import registry
from cifarx_train.models.registry import model_names, network, register_model


def square(side: int) -> InputSpec:
    return InputSpec(height=side, width=side)


def test_the_names_are_sorted_and_each_is_a_network() -> None:
    names = model_names()
    assert {"lzh", "fastnet", "resnet34", "vgg16"} <= set(names)
    assert names == sorted(names)
    for name in names:
        chosen = network(name)
        assert (chosen.name, chosen.stem) == (name, "own")
        assert chosen.input == square(chosen.input.height)  # the range 0..1, mean 0, std 1


@pytest.mark.parametrize(
    ("name", "meant"), [("lhz", "lzh"), ("LZH", "lzh"), ("lz", "lzh"), ("resnet-34", "resnet34"), ("VGG16", "vgg16")]
)
def test_an_unknown_name_is_told_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}'") as caught:
        network(name)
    assert repr(name) in caught.value.problem
    assert caught.value.exit_status == 2


def test_a_name_near_to_none_is_told_them_all() -> None:
    with pytest.raises(UsageError, match=r"known are .*lzh") as caught:
        network("0123456789")
    assert "did you mean" not in str(caught.value)


# Neither of detection nor of segmentation: only what gives a logit a class.
@pytest.mark.parametrize("name", ["fcn_resnet50", "fasterrcnn_resnet50_fpn", "r3d_18"])
def test_what_is_no_classifier_is_unknown(name: str) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        network(name)


def test_a_registered_network_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    network("lzh")  # so that all others are registered before
    monkeypatch.setattr(registry, "_networks", {})  # so that no other test meets this one's network
    seen: list[tuple[nn.Module, torch.Tensor]] = []

    @register_model(
        "linear", InputSpec(height=4, width=5), initialize=lambda module, images: seen.append((module, images))
    )
    def linear(classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(60, classes))

    builder: Callable[[int], nn.Module] = linear
    assert isinstance(builder(3), nn.Sequential)
    chosen = network("linear")
    assert chosen.input.width == 5
    assert "linear" in model_names()
    module, images = chosen.build(3), torch.rand(2, 3, 4, 5)
    assert module(images).shape == (2, 3)
    assert chosen.initialize is not None
    chosen.initialize(module, images)
    assert seen == [(module, images)]
    with pytest.raises(UsageError, match="linear takes 4x5 images, not 5x5"):
        chosen.build(3, InputSpec(height=5, width=5))


def test_only_networks_that_need_it_see_the_images_before_training() -> None:
    assert network("lzh").initialize is None
    assert network("resnet18").initialize is None
    assert network("fastnet").initialize is not None


@pytest.mark.parametrize("name", ["lzh", "fastnet"])
def test_our_own_have_no_small_stem(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no small stem: leave out --stem; .*ResNets"):
        network(name, stem="small")


@pytest.mark.parametrize("name", ["lzh", "fastnet"])
def test_torchvision_is_imported_only_for_its_own(name: str) -> None:
    code = (
        "import sys; from cifarx_train.models.registry import network\n"
        f"network({name!r}).build(10)\n"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "side", "said"),
    [
        ("lzh", 64, "lzh takes 32x32 images, not 64x64: leave out --image-size"),
        ("lzh", 16, "lzh takes 32x32 images, not 16x16: use --image-size 32, or leave it out"),
        ("fastnet", 8, "fastnet takes 32x32 images, not 8x8: use --image-size 32, or leave it out"),
        ("vgg16", 16, "vgg16 takes 32x32 images, not 16x16: use --image-size 32, or leave it out"),
        ("alexnet", 32, "alexnet takes 224x224 images, not 32x32: use --image-size 64, or leave it out"),
        ("inception_v3", 32, "inception_v3 takes 299x299 images, not 32x32: use --image-size 96, or leave it out"),
        (
            "vit_b_16",
            40,
            "vit_b_16 takes square images whose side is a multiple of 16, not 40x40: "
            "use --image-size 32, or leave it out",
        ),
        (
            "vit_b_32",
            16,
            "vit_b_32 takes square images whose side is a multiple of 32, not 16x16: "
            "use --image-size 32, or leave it out",
        ),
        (
            "maxvit_t",
            32,
            "maxvit_t takes square images whose side is a multiple of 224, not 32x32: "
            "use --image-size 224, or leave it out",
        ),
    ],
)
def test_a_size_that_does_not_work_is_refused_with_one_that_does(name: str, side: int, said: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError) as caught:
        network(name).build(10, square(side))
    assert str(caught.value) == said
    proposed = re.search(r"use --image-size (\d+)", said)
    with torch.device("meta"):
        assert isinstance(network(name).build(10, proposed and square(int(proposed[1]))), nn.Module)


def test_images_that_are_not_square() -> None:
    tall = InputSpec(height=64, width=32)
    with torch.device("meta"):
        assert network("resnet18").build(10, tall)(torch.rand(2, 3, 64, 32)).shape == (2, 10)
        with pytest.raises(UsageError, match=r"square images .* not 64x32"):
            network("vit_b_16").build(10, tall)


def test_the_check_of_a_size_leaves_the_network_and_the_random_numbers_as_they_are() -> None:
    chosen = network("mobilenet_v3_small")  # it has batch norms and dropout
    torch.manual_seed(0)
    unchecked, after_unchecked = chosen.build(4), torch.rand(1)
    torch.manual_seed(0)
    checked, after_checked = chosen.build(4, square(48)), torch.rand(1)
    assert torch.equal(after_unchecked, after_checked)
    assert checked.training
    for (name, before), after in zip(unchecked.state_dict().items(), checked.state_dict().values(), strict=True):
        assert after.device.type == "cpu"
        assert torch.equal(before, after), name
