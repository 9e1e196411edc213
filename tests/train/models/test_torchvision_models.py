from itertools import groupby
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models import get_model_builder
from torchvision.models.regnet import BlockParams

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.models.registry import get_architecture
from cifarx_train.models.torchvision_models import list_classifiers, published_image_size

RESNET_NAMES = [name for name in list_classifiers() if "resnet" in name or "resnext" in name]
NOT_AT_32 = ["alexnet", "inception_v3", "maxvit_t"]
ONE_OF_EACH_FAMILY = [
    next(names)
    for _, names in groupby(
        sorted(list_classifiers(), key=lambda name: get_model_builder(name).__module__),
        key=lambda name: get_model_builder(name).__module__,
    )
]
"""One network of each module of torchvision: the others have the same layers, more or larger ones."""


@pytest.fixture
def _regnets_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """RegNets compute their widths with tensors, which have no values on the meta device."""
    widths = BlockParams.from_init_params

    def on_the_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return widths(*args, **kwargs)

    monkeypatch.setattr(BlockParams, "from_init_params", on_the_cpu)


def assert_supports_its_default_size(name: str, training: bool) -> None:
    architecture = get_architecture(name)
    with torch.device("meta"):
        module = architecture.build(7).train(training)
        logits = module(torch.empty(2, 3, architecture.input.height, architecture.input.width))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32


@pytest.mark.usefixtures("_regnets_on_meta")
@pytest.mark.parametrize("name", list_classifiers())
def test_every_classifier_supports_its_default_size(name: str) -> None:
    assert_supports_its_default_size(name, training=False)


@pytest.mark.usefixtures("_regnets_on_meta")
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_a_classifier_of_each_family_trains_at_its_default_size(name: str) -> None:
    assert_supports_its_default_size(name, training=True)


@pytest.mark.parametrize("name", list_classifiers())
def test_every_classifier_that_supports_32x32_images_defaults_to_them(name: str) -> None:
    """Vision transformers could be built for 32x32 images, but would have too few patches."""
    keeps_size = name in NOT_AT_32 or name.startswith("vit_")
    side = published_image_size(name) if keeps_size else 32
    assert get_architecture(name).input == InputSpec(height=side, width=side)


@pytest.mark.parametrize("name", NOT_AT_32)
def test_the_other_classifiers_fail_for_32x32_images(name: str) -> None:
    with torch.device("meta"):
        module = get_architecture(name).build(10)
        with pytest.raises(RuntimeError):
            module(torch.empty(2, 3, 32, 32))


def test_published_sizes() -> None:
    sizes = {name: get_architecture(name).input.height for name in ("inception_v3", "alexnet", "maxvit_t", "vit_b_16")}
    assert sizes == {"inception_v3": 299, "alexnet": 224, "maxvit_t": 224, "vit_b_16": 224}


@pytest.mark.parametrize("name", ["resnet34", "vgg16", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_logits_of_random_images_are_finite(name: str) -> None:
    module = get_architecture(name).build(10)
    images = torch.rand(2, 3, 32, 32)
    for training in (True, False):
        with torch.no_grad():
            logits = module.train(training)(images)
        assert logits.shape == (2, 10)
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["resnet34", "vgg16"])
def test_weights_are_those_of_a_torchvision_network(name: str) -> None:
    torch.manual_seed(0)
    ours = get_architecture(name).build(10).state_dict()
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_have_no_auxiliary_heads(name: str) -> None:
    with torch.device("meta"):
        assert not any("aux" in key.lower() for key in get_architecture(name).build(10).state_dict())


@pytest.mark.parametrize(("name", "side"), [("vit_b_16", 32), ("vit_b_32", 96), ("vit_h_14", 28), ("maxvit_t", 448)])
def test_networks_of_a_fixed_size_are_built_for_the_requested_size(name: str, side: int) -> None:
    with torch.device("meta"):
        module = get_architecture(name).build(10, InputSpec(height=side, width=side))
        assert module.eval()(torch.empty(2, 3, side, side)).shape == (2, 10)


def test_every_resnet_has_a_small_stem() -> None:
    assert len(RESNET_NAMES) >= 10
    for name in RESNET_NAMES:
        architecture = get_architecture(name, stem="small")
        assert (architecture.name, architecture.stem, architecture.input) == (
            name,
            "small",
            InputSpec(height=32, width=32),
        )


def test_the_small_stem_keeps_the_image_size() -> None:
    module: Any = get_architecture("resnet18", stem="small").build(10)
    sizes: list[torch.Size] = []
    module.layer1.register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].shape))
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(2, 64, 32, 32)]
    assert module.conv1.weight.shape == (64, 3, 3, 3)
    assert module.conv1.bias is None
    # Kaiming initialization with fan-out: the variance of the weights is 2 / (64 * 3 * 3).
    assert module.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.1)


def test_the_state_dict_restores_a_small_stem() -> None:
    architecture = get_architecture("resnet18", stem="small")
    first, second = architecture.build(10).eval(), architecture.build(10).eval()
    second.load_state_dict(first.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(first(images), second(images))
    with pytest.raises(RuntimeError, match=r"conv1\.weight"):
        get_architecture("resnet18").build(10).load_state_dict(first.state_dict())


@pytest.mark.parametrize("name", ["vgg16", "vit_b_16", "regnet_x_400mf"])
def test_other_networks_have_no_small_stem(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no small stem: leave out --stem; .*ResNets"):
        get_architecture(name, stem="small")
