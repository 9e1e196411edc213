from typing import Any

import pytest
import torch
import torchvision
from torchvision.models.regnet import BlockParams

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.models.registry import network
from cifarx_train.models.torchvision_models import classifier_names, published_size

RESNETS = [name for name in classifier_names() if "resnet" in name or "resnext" in name]
NOT_AT_32 = ["alexnet", "inception_v3", "maxvit_t"]


@pytest.fixture
def _regnets_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """RegNets compute their widths with tensors, which must have values."""
    widths = BlockParams.from_init_params

    def on_the_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return widths(*args, **kwargs)

    monkeypatch.setattr(BlockParams, "from_init_params", on_the_cpu)


@pytest.mark.usefixtures("_regnets_on_meta")
@pytest.mark.parametrize("name", classifier_names())
def test_every_classifier_works_at_its_own_size(name: str) -> None:
    chosen = network(name)
    with torch.device("meta"):
        module = chosen.build(7)
        images = torch.empty(2, 3, chosen.input.height, chosen.input.width)
        for training in (True, False):
            logits = module.train(training)(images)
            assert isinstance(logits, torch.Tensor)
            assert logits.shape == (2, 7)
            assert logits.dtype == torch.float32


@pytest.mark.parametrize("name", classifier_names())
def test_every_classifier_takes_small_images_that_can(name: str) -> None:
    """Vision transformers are built for one size; they could be built for 32x32, but have too few patches there."""
    kept = name in NOT_AT_32 or name.startswith("vit_")
    side = published_size(name) if kept else 32
    assert network(name).input == InputSpec(height=side, width=side)


@pytest.mark.parametrize("name", NOT_AT_32)
def test_those_that_take_no_small_images_really_fail_there(name: str) -> None:
    with torch.device("meta"):
        module = network(name).build(10)
        with pytest.raises(RuntimeError):
            module(torch.empty(2, 3, 32, 32))


def test_the_published_sizes() -> None:
    sizes = {name: network(name).input.height for name in ("inception_v3", "alexnet", "maxvit_t", "vit_b_16")}
    assert sizes == {"inception_v3": 299, "alexnet": 224, "maxvit_t": 224, "vit_b_16": 224}


@pytest.mark.parametrize("name", ["resnet34", "vgg16", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_real_images_give_real_logits(name: str) -> None:
    module = network(name).build(10)
    images = torch.rand(2, 3, 32, 32)
    for training in (True, False):
        with torch.no_grad():
            logits = module.train(training)(images)
        assert logits.shape == (2, 10)
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["resnet34", "vgg16"])
def test_the_networks_of_the_notes_are_torchvisions_own(name: str) -> None:
    torch.manual_seed(0)
    ours = network(name).build(10).state_dict()
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_auxiliary_heads(name: str) -> None:
    with torch.device("meta"):
        assert not any("aux" in key.lower() for key in network(name).build(10).state_dict())


@pytest.mark.parametrize(("name", "side"), [("vit_b_16", 32), ("vit_b_32", 96), ("vit_h_14", 28), ("maxvit_t", 448)])
def test_networks_built_for_one_size_are_built_for_the_size_asked_for(name: str, side: int) -> None:
    with torch.device("meta"):
        module = network(name).build(10, InputSpec(height=side, width=side))
        assert module.eval()(torch.empty(2, 3, side, side)).shape == (2, 10)


def test_the_small_stem_is_for_every_resnet() -> None:
    assert len(RESNETS) >= 10
    for name in RESNETS:
        chosen = network(name, stem="small")
        assert (chosen.name, chosen.stem, chosen.input) == (name, "small", InputSpec(height=32, width=32))


def test_the_small_stem_keeps_the_images_size() -> None:
    module: Any = network("resnet18", stem="small").build(10)
    sizes: list[torch.Size] = []
    module.layer1.register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].shape))
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(2, 64, 32, 32)]
    assert module.conv1.weight.shape == (64, 3, 3, 3)
    assert module.conv1.bias is None
    # Kaiming, fan out: the variance of the weights is 2 / (64 * 3 * 3).
    assert module.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.1)


def test_a_small_stem_is_restored_from_its_weights() -> None:
    chosen = network("resnet18", stem="small")
    first, second = chosen.build(10).eval(), chosen.build(10).eval()
    second.load_state_dict(first.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(first(images), second(images))
    with pytest.raises(RuntimeError, match=r"conv1\.weight"):
        network("resnet18").build(10).load_state_dict(first.state_dict())


@pytest.mark.parametrize("name", ["vgg16", "vit_b_16", "regnet_x_400mf"])
def test_no_small_stem_for_others(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no small stem: leave out --stem; .*ResNets"):
        network(name, stem="small")
