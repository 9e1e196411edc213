"""Weights without their network are not guessed: the networks that fit are proposed, with what could differ."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from cifarx_serve.errors import CifarxError, ModelFileError, UsageError
from cifarx_train.checkpoints.external.candidates import (
    EmptyOnMeta,
    find_candidates,
    find_similar_network,
    fits_small_stem,
    missing_network_error,
)
from cifarx_train.checkpoints.external.key_matching import Shapes
from cifarx_train.models.architecture import Stem
from cifarx_train.models.registry import get_architecture, list_models


def shapes_of(module: nn.Module) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def shapes(name: str, outputs: int = 10, stem: Stem = "own") -> Shapes:
    architecture = get_architecture(name, stem=stem)
    with EmptyOnMeta():
        return shapes_of(architecture.builder(outputs, architecture.input))


def error(given: Shapes, mentioned: str | None = None) -> CifarxError:
    return missing_network_error(Path("x.pth"), given, mentioned)


@pytest.mark.parametrize("name", ["lzh", "fastnet", "resnet18", "resnet34", "squeezenet1_0", "mobilenet_v3_small"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_network_that_fits_is_proposed(name: str, prefix: str) -> None:
    found = error({prefix + key: shape for key, shape in shapes(name).items()})
    assert type(found) is UsageError
    assert found.problem.startswith("x.pth contains weights without their network; names and shapes fit ")
    assert f"fit {name}, but do not say " in found.problem
    assert f"if it is exactly this network, state it with --model {name}, otherwise" in found.remedy
    assert "--model FILE.py:CALLABLE" in found.remedy


def test_what_could_differ_is_listed() -> None:
    assert "do not say strides and padding, pooling, eps, activations or options" in error(shapes("resnet18")).problem
    assert "do not say strides and padding, pooling, activations or options" in error(shapes("lzh")).problem
    assert "options such as transform_input" in error(shapes("googlenet")).problem


def test_a_small_stem_is_described() -> None:
    found = error(shapes("resnet18", stem="small"))
    assert "resnet18 with a small stem (3x3, stride 1, no max-pooling)" in found.problem
    assert "--model resnet18 --model-arg stem=small" in found.remedy


def test_the_name_in_the_file_is_a_hint() -> None:
    assert (
        "without their network, which it calls efficientnet_b0; "
        in error(shapes("resnet18"), "efficientnet_b0").problem
    )


def test_a_name_in_a_file_that_fits_no_known_network_may_be_one_of_timm() -> None:
    found = error({"cls_token": (1, 1, 8), "blocks.0.weight": (8, 8)}, "vit_tiny")
    assert (
        found.remedy == "state it with --model timm/vit_tiny if it is timm's, otherwise with --model FILE.py:CALLABLE"
    )


def test_several_networks_are_all_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarx_serve.spec import InputSpec
    from cifarx_train.models import registry

    monkeypatch.setattr(registry, "_architectures", dict(registry._architectures))
    registry.register_model("lzhtwin", InputSpec(height=32, width=32))(
        lambda classes: get_architecture("lzh").build(classes)
    )
    found = error(shapes("lzh"))
    assert "fit lzh or lzhtwin" in found.problem
    assert "--model lzh or --model lzhtwin" in found.remedy


def test_the_closest_network_is_described() -> None:
    given = {**shapes("squeezenet1_1"), "features.0.bias": (3,)}
    del given["classifier.1.bias"]
    found = error(given)
    assert type(found) is ModelFileError
    assert "do not fit any network that cifarx knows, the closest is squeezenet1_1 (missing classifier.1.bias; " in str(
        found
    )
    assert "features.0.bias has shape [3] instead of [64]" in str(found)


def test_weights_of_anything_else() -> None:
    found = error({"weight": (3, 2), "bias": (3,)})
    assert type(found) is ModelFileError
    assert str(found).endswith(
        "that cifarx knows: name the network with --model, such as --model FILE.py:CALLABLE for your own code"
    )


def test_the_closest_candidate_comes_first() -> None:
    candidates = find_candidates(shapes("resnet34", 5))
    assert (candidates[0].name, candidates[0].stem, candidates[0].distance) == ("resnet34", "own", 0)
    assert all(candidate.distance > 0 for candidate in candidates[1:])


def test_fits_small_stem() -> None:
    assert fits_small_stem("resnet18", shapes("resnet18", stem="small"))
    assert not fits_small_stem("resnet18", shapes("resnet18"))
    assert not fits_small_stem("lzh", shapes("lzh"))


# --- the same network as a module


def test_the_same_network_is_recognized() -> None:
    similar = find_similar_network(models.squeezenet1_1(num_classes=7), 7)
    assert similar is not None
    assert (similar.architecture.name, similar.same_settings) == ("squeezenet1_1", True)
    small = find_similar_network(get_architecture("resnet18", stem="small").build(3), 3)
    assert small is not None
    assert (small.architecture.stem, small.same_settings) == ("small", True)


def test_a_changed_network_is_only_similar() -> None:
    module = models.squeezenet1_1(num_classes=7)
    module.features[2] = nn.AvgPool2d(3, 2, ceil_mode=True)
    similar = find_similar_network(module, 7)
    assert similar is not None
    assert (similar.architecture.name, similar.same_settings) == ("squeezenet1_1", False)
    assert find_similar_network(nn.Sequential(nn.Linear(2, 3)), 3) is None


def test_networks_on_meta_need_no_memory() -> None:
    with EmptyOnMeta():
        module = models.vgg16(num_classes=3)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert torch.zeros(2).device.type == "cpu"
    with EmptyOnMeta():
        assert nn.init.ones_(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.slow
def test_every_network_is_proposed_for_its_own_weights() -> None:
    for name in list_models():
        best = find_candidates(shapes(name, 7))[0]
        assert (best.name, best.stem, best.distance) == (name, "own", 0)
