from typing import Any

import pytest
import torch

from cifarx_serve.errors import SpecError, UsageError
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.options import ModelOptions, SpecOverrides
from cifarx_train.models.preprocessing import Preprocessing
from cifarx_train.models.sources import find_architecture
from cifarx_train.models.timm_networks import timm_architecture, timm_input

CONFIG = {
    "input_size": (3, 64, 64),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def test_a_network_with_its_data_configuration() -> None:
    found = find_architecture(ModelOptions("timm/resnet18.tv_in1k"))
    assert found.name == "resnet18"
    assert found.source == ModelSource(kind="timm", name="resnet18.tv_in1k")
    assert found.input == Preprocessing.imagenet()
    assert found.states_input
    assert found.activation is None
    small = InputSpec(height=32, width=32)
    assert found.build(5, small).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_a_tag_selects_the_preprocessing() -> None:
    assert timm_architecture("resnet18.a1_in1k", {}).input.interpolation == "bicubic"
    assert timm_architecture("resnet18.tv_in1k", {}).input.interpolation == "bilinear"


def test_a_transformer_gets_the_size_of_the_images() -> None:
    found = timm_architecture("vit_tiny_patch16_224", {"depth": 1})
    assert found.build(5, InputSpec(height=32, width=48)).eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 5)


@pytest.mark.parametrize("side", [32, 64, 96, 160, 288])
def test_another_size_is_cropped_as_timm_does(side: int) -> None:
    """The size before the crop is rounded down, so that it is not always in proportion to the published one."""
    import timm.data

    name = "convnext_atto"  # crop_pct 0.95
    overrides = SpecOverrides({"input": {"height": side, "width": side}})
    options = ModelOptions(f"timm/{name}")._replace(overrides=overrides)
    found = overrides.apply_to_input(find_architecture(options).input)
    config = timm.data.resolve_data_config({"img_size": side}, timm.get_pretrained_cfg(name).to_dict())
    assert found == timm_input(config)
    assert (found.height, found.width) == (side, side)


def test_the_argument_img_size_is_the_size_of_the_images() -> None:
    found = timm_architecture("vit_tiny_patch16_224", {"depth": 1, "img_size": 64})
    assert (found.input.height, found.input.width) == (64, 64)
    assert found.build(5).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_grayscale_images() -> None:
    gray = InputSpec(height=32, width=32, channels=1, color="L")
    found = timm_architecture("mobilenetv3_small_050", {})
    assert found.build(5, gray).eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 5)


def test_arguments() -> None:
    found = timm_architecture("mobilenetv3_small_050", {"num_classes": 4})
    assert found.num_outputs == 4
    with pytest.raises(UsageError, match="has 4 outputs, not 5"):
        found.build(5)
    with pytest.raises(UsageError, match=r"timm/resnet18 cannot be built with .*wrong=1 \(.*unexpected keyword"):
        timm_architecture("resnet18", {"wrong": 1}).build(5)


@pytest.mark.parametrize("name", ["resnett18", "hf-hub:someone/model", "local-dir:/somewhere", "../resnet18"])
def test_only_networks_of_the_library_are_built(name: str) -> None:
    with pytest.raises(UsageError, match=r"timm [\d.]+ has no network .*`timm.list_models\(\)` lists them"):
        timm_architecture(name, {})


def test_unknown_names_suggest_others() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*resnet50"):
        timm_architecture("resnett50", {})
    with pytest.raises(UsageError, match=r"unknown tag of timm/resnet18 'tv': .*choose from a1_in1k, a2_in1k"):
        timm_architecture("resnet18.tv", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_mode": "border"}, "crop mode border with a crop_pct below 1 is not supported"),
        ({"interpolation": "hamming"}, "timm's interpolation hamming is not supported"),
        ({"input_size": (3, 64, 32)}, "timm's center crop to 64x32 is not supported"),
    ],
)
def test_what_a_spec_cannot_describe_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        timm_input({**CONFIG, **changes})


def test_a_border_has_the_mean_color() -> None:
    found = timm_input({**CONFIG, "crop_mode": "border", "crop_pct": 1.0, "mean": (0.485, 0.456, 0.406)})
    assert (found.resize, found.fill) == ("letterbox", (124, 116, 104))


@pytest.mark.slow
def test_every_published_configuration_is_described() -> None:
    import timm.data

    configs = {}
    for name in timm.list_pretrained():
        config = timm.data.resolve_data_config({"in_chans": 3}, timm.get_pretrained_cfg(name).to_dict())
        configs[repr(config)] = config
    assert len(configs) > 100
    for config in configs.values():
        timm_input(config)
