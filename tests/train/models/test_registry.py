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
from cifarx_train.models.registry import get_architecture, list_models, register_model


def square(side: int) -> InputSpec:
    return InputSpec(height=side, width=side)


def test_models_are_sorted_and_each_has_an_architecture() -> None:
    names = list_models()
    assert {"lzh", "fastnet", "resnet34", "vgg16"} <= set(names)
    assert names == sorted(names)
    for name in names:
        architecture = get_architecture(name)
        assert (architecture.name, architecture.stem) == (name, "own")
        assert architecture.input == square(architecture.input.height)  # with a range of 0 to 1, mean 0 and std 1


@pytest.mark.parametrize(
    ("name", "meant"), [("lhz", "lzh"), ("LZH", "lzh"), ("lz", "lzh"), ("resnet-34", "resnet34"), ("VGG16", "vgg16")]
)
def test_an_unknown_name_suggests_the_closest(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}'") as caught:
        get_architecture(name)
    assert repr(name) in caught.value.problem
    assert caught.value.exit_status == 2


def test_a_name_that_is_close_to_none_lists_all() -> None:
    with pytest.raises(UsageError, match=r"choose from .*lzh") as caught:
        get_architecture("0123456789")
    assert "did you mean" not in str(caught.value)


# Detection, segmentation and video networks are not supported, only networks with one logit per class.
@pytest.mark.parametrize("name", ["fcn_resnet50", "fasterrcnn_resnet50_fpn", "r3d_18"])
def test_other_networks_are_unknown(name: str) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        get_architecture(name)


def test_a_registered_architecture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    get_architecture("lzh")  # registers the built-in architectures first
    monkeypatch.setattr(registry, "_architectures", {})  # so that other tests do not see this architecture
    calls: list[tuple[nn.Module, torch.Tensor]] = []

    @register_model(
        "linear", InputSpec(height=4, width=5), initialize=lambda module, images: calls.append((module, images))
    )
    def linear(classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(60, classes))

    builder: Callable[[int], nn.Module] = linear
    assert isinstance(builder(3), nn.Sequential)
    architecture = get_architecture("linear")
    assert architecture.input.width == 5
    assert "linear" in list_models()
    module, images = architecture.build(3), torch.rand(2, 3, 4, 5)
    assert module(images).shape == (2, 3)
    assert architecture.initialize is not None
    architecture.initialize(module, images)
    assert calls == [(module, images)]
    with pytest.raises(UsageError, match="linear takes 4x5 images, not 5x5"):
        architecture.build(3, InputSpec(height=5, width=5))


def test_a_registered_architecture_of_another_package_may_return_several_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    get_architecture("lzh")
    monkeypatch.setattr(registry, "_architectures", {})

    class Heads(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(60, classes)

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.head(images.flatten(1)), "embedding": images.flatten(1)}

    register_model("heads", InputSpec(height=4, width=5))(Heads)
    architecture = get_architecture("heads")
    assert not architecture.is_registered
    module, images = architecture.build(3), torch.rand(2, 3, 4, 5)
    assert torch.equal(module(images), module.get_submodule("network")(images)["logits"])
    assert list(module.state_dict()) == ["head.weight", "head.bias"]
    architecture.require_input(architecture.input)
    assert get_architecture("resnet18").is_registered


def test_only_fastnet_is_initialized_from_images() -> None:
    assert get_architecture("lzh").initialize is None
    assert get_architecture("resnet18").initialize is None
    assert get_architecture("fastnet").initialize is not None


@pytest.mark.parametrize("name", ["lzh", "fastnet"])
def test_built_in_architectures_have_no_small_stem(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no small stem: leave out --stem; .*ResNets"):
        get_architecture(name, stem="small")


@pytest.mark.parametrize("name", ["lzh", "fastnet"])
def test_built_in_architectures_do_not_import_torchvision(name: str) -> None:
    code = (
        "import sys; from cifarx_train.models.registry import get_architecture\n"
        f"get_architecture({name!r}).build(10)\n"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "side", "message"),
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
def test_an_unsupported_size_is_an_error_that_suggests_a_supported_one(name: str, side: int, message: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError) as caught:
        get_architecture(name).build(10, square(side))
    assert str(caught.value) == message
    suggested = re.search(r"use --image-size (\d+)", message)
    with torch.device("meta"):
        assert isinstance(get_architecture(name).build(10, suggested and square(int(suggested[1]))), nn.Module)


def test_non_square_images() -> None:
    tall = InputSpec(height=64, width=32)
    with torch.device("meta"):
        assert get_architecture("resnet18").build(10, tall)(torch.rand(2, 3, 64, 32)).shape == (2, 10)
        with pytest.raises(UsageError, match=r"square images .* not 64x32"):
            get_architecture("vit_b_16").build(10, tall)


def test_the_size_check_changes_neither_the_network_nor_the_random_state() -> None:
    architecture = get_architecture("mobilenet_v3_small")  # has BatchNorm and dropout
    torch.manual_seed(0)
    unchecked, after_unchecked = architecture.build(4), torch.rand(1)
    torch.manual_seed(0)
    checked, after_checked = architecture.build(4, square(48)), torch.rand(1)
    assert torch.equal(after_unchecked, after_checked)
    assert checked.training
    for (name, before), after in zip(unchecked.state_dict().items(), checked.state_dict().values(), strict=True):
        assert after.device.type == "cpu"
        assert torch.equal(before, after), name
