"""Weights are put into the network that the user states, if they fit it."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision import models

from cifarx_serve.errors import ModelFileError, SpecError, UsageError
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.models.options import ModelOptions, SpecOverrides
from cifarx_train.models.registry import get_architecture
from tests.support.external_checkpoints import (
    both_formats,
    load_external,
    load_with_notes,
    new_weights,
    same_outputs,
    save,
)

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4, classes)
    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

class Pruned(Net):
    def __init__(self, classes=10):
        super().__init__(classes)
        from torch.nn.utils import prune
        prune.identity(self.conv, "weight")

class Normalized(Net):
    def __init__(self, classes=10):
        super().__init__(classes)
        nn.utils.parametrizations.weight_norm(self.conv)

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        return self.conv(x).mean((2, 3))
"""


@pytest.fixture
def net(tmp_path: Path) -> Any:
    """A file `net.py` with a network of the user, and the network itself."""
    (tmp_path / "net.py").write_text(NET)
    scope: dict[str, Any] = {"__name__": "user_net"}
    exec(NET, scope)
    return scope["Net"](3)


@both_formats
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "net.model."])
@pytest.mark.parametrize("name", ["lzh", "squeezenet1_0"])
def test_state_dicts_with_prefixes(tmp_path: Path, name: str, prefix: str, zipped: bool) -> None:
    own = new_weights(name)
    save(OrderedDict((prefix + key, tensor) for key, tensor in own.items()), tmp_path / "x.pth", zipped)
    checkpoint = load_external(tmp_path / "x.pth", name)
    assert checkpoint.spec.model == name
    assert checkpoint.spec.source == get_architecture(name).source
    assert list(checkpoint.weights) == list(own)
    assert all(torch.equal(checkpoint.weights[key], own[key]) for key in own)


@pytest.mark.parametrize("prefix", ["model1.", "module1.", "", "net.model."])
def test_lzh_with_another_attribute_name(tmp_path: Path, prefix: str) -> None:
    save({prefix + key.removeprefix("model."): value for key, value in new_weights().items()}, tmp_path / "x.pth")
    assert load_external(tmp_path / "x.pth", "lzh").spec.model == "lzh"


def test_a_small_stem_is_stated(tmp_path: Path) -> None:
    saved = get_architecture("resnet18", stem="small").build(10)
    path = save(saved.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=r"conv1\.weight has shape .*--model-arg stem=small if .*no max-pooling"):
        load_checkpoint(path, ModelOptions("resnet18"))
    checkpoint = load_checkpoint(path, ModelOptions("resnet18", {"stem": "small"}))
    assert (checkpoint.spec.model, checkpoint.spec.stem) == ("resnet18", "small")
    assert same_outputs(checkpoint, saved)


def test_arguments_of_a_network(tmp_path: Path) -> None:
    saved = models.googlenet(num_classes=10, transform_input=True, aux_logits=False, init_weights=False)
    path = save(saved.state_dict(), tmp_path / "x.pth")
    checkpoint = load_checkpoint(path, ModelOptions("googlenet", {"transform_input": True}))
    assert checkpoint.spec.source is not None
    assert checkpoint.spec.source.arguments == {"transform_input": True}
    assert same_outputs(checkpoint, saved)
    assert not same_outputs(load_external(path, "googlenet"), saved)


def test_auxiliary_heads_are_left_out(tmp_path: Path) -> None:
    saved = models.googlenet(num_classes=10, aux_logits=True, init_weights=False)
    checkpoint, notes = load_with_notes(save(saved.state_dict(), tmp_path / "x.pth"), ModelOptions("googlenet"))
    assert not any(key.startswith("aux") for key in checkpoint.weights)
    assert len(notes) == 1
    assert notes[0].startswith("left out 20 keys that googlenet does not use (aux1.conv.conv.weight, ")
    assert notes[0].endswith(" and 15 more)")


def test_other_keys_are_named_and_left_out(tmp_path: Path) -> None:
    own = new_weights()
    weights: dict[str, Any] = {f"model.{key}": value for key, value in own.items()}
    path = save({**weights, "loss.weight": torch.ones(10), "note": "mine"}, tmp_path / "x.pth")
    checkpoint, notes = load_with_notes(path, ModelOptions("lzh"))
    assert notes == ["left out 2 keys that lzh does not use (loss.weight, note)"]
    assert all(torch.equal(checkpoint.weights[key], own[key]) for key in own)


def test_missing_batchnorm_counters_are_zero(tmp_path: Path) -> None:
    own = new_weights("shufflenet_v2_x0_5", 4)
    save({key: value for key, value in own.items() if "num_batches" not in key}, tmp_path / "x.pth")
    checkpoint = load_external(tmp_path / "x.pth", "shufflenet_v2_x0_5")
    assert list(checkpoint.weights) == list(own)
    checkpoint.build()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    own = new_weights()
    save({key: tensor.to(dtype) for key, tensor in own.items()}, tmp_path / "x.pth")
    checkpoint, notes = load_with_notes(tmp_path / "x.pth", ModelOptions("lzh"))
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.weights.values())
    assert notes == [f"converted weights from {str(dtype).removeprefix('torch.')} to float32"]


def test_pruned_weights_are_folded(tmp_path: Path) -> None:
    module = models.squeezenet1_1(num_classes=3)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            prune.l1_unstructured(layer, "weight", 0.3)
    path = save(module.state_dict(), tmp_path / "x.pth")
    checkpoint, notes = load_with_notes(path, ModelOptions("squeezenet1_1"))
    assert notes == ["multiplied 26 pruned weights by their masks"]
    assert same_outputs(checkpoint, module)


@pytest.mark.parametrize("normalize", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_is_folded(tmp_path: Path, normalize: Callable[[nn.Module], nn.Module]) -> None:
    module = get_architecture("lzh").build(3)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            normalize(layer)
    path = save({f"module.{key}": tensor for key, tensor in module.state_dict().items()}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="fit lzh, "):
        load_checkpoint(path)
    checkpoint, notes = load_with_notes(path, ModelOptions("lzh"))
    assert notes == ["scaled 3 weights with weight norm to their norm"]
    assert same_outputs(checkpoint, module)


def test_the_version_of_a_state_dict_is_kept(tmp_path: Path) -> None:
    """MNASNet changes its first layers for the state dicts of its first version, and needs a version."""
    module = models.mnasnet1_0(num_classes=3)
    assert same_outputs(load_external(save(module.state_dict(), tmp_path / "x.pth"), "mnasnet1_0"), module)


# --- averaged weights


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    raw, averaged = (get_architecture("lzh").build(10) for _ in range(2))
    content = {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict(), "epoch": 1}
    path = save(content, tmp_path / "x.pth")
    checkpoint, notes = load_with_notes(path, ModelOptions("lzh"))
    assert notes == ["using the weights state_dict_ema (EMA), not state_dict: choose with --weights-key"]
    assert same_outputs(checkpoint, averaged)
    assert not same_outputs(checkpoint, raw)
    checkpoint, notes = load_with_notes(path, ModelOptions("lzh", weights_key="state_dict"))
    assert notes == ["using the weights state_dict, not state_dict_ema (EMA): choose with --weights-key"]
    assert same_outputs(checkpoint, raw)


def test_averaged_weights_in_the_state_dict_of_lightning(tmp_path: Path) -> None:
    raw, averaged = new_weights(), new_weights()
    state = {f"net.{key}": value for key, value in raw.items()}
    state |= {f"ema.module.{key}": value for key, value in averaged.items()} | {"ema.n_averaged": torch.tensor(3)}
    path = save({"state_dict": state, "pytorch-lightning_version": "2.5"}, tmp_path / "x.ckpt")
    checkpoint, notes = load_with_notes(path, ModelOptions("lzh"))
    assert notes == [
        "using the weights ema, not net: choose with --weights-key",
        "left out 1 key that lzh does not use (ema.n_averaged)",
    ]
    assert torch.equal(checkpoint.weights["model.0.bias"], averaged["model.0.bias"])
    checkpoint, _ = load_with_notes(path, ModelOptions("lzh", weights_key="net"))
    assert torch.equal(checkpoint.weights["model.0.bias"], raw["model.0.bias"])


# --- weights that do not fit


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the weights of SqueezeNet with some replaced, added or, if None, removed."""
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in {**new_weights("squeezenet1_1"), **given}.items() if value is not None}


MISMATCHES: list[tuple[dict[str, torch.Tensor | None], str]] = [
    ({"classifier__1__bias": None}, r"missing classifier\.1\.bias\)"),
    ({"features__0__bias": None, "features__0__weight": None}, r"missing features\.0\.weight, features\.0\.bias\)"),
    ({"head": torch.zeros(1)}, r"unexpected head\)"),
    ({f"x{number}": torch.zeros(1) for number in range(7)}, r"unexpected x0, x1, x2, x3, x4 and 2 more\)"),
    ({"features__0__bias": torch.zeros(3)}, r"features\.0\.bias has shape \[3\] instead of \[64\]"),
    ({"classifier__1__bias": torch.zeros(11)}, r"classifier\.1\.bias has shape \[1[01]\] instead of \[1[01]\]"),
    ({"features__0__bias": None, "x": torch.zeros(1)}, r"missing features\.0\.bias; unexpected x\)"),
]


@pytest.mark.parametrize(("changes", "message"), MISMATCHES)
def test_mismatches_are_described(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    save(changed(**changes), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=rf"the closest is squeezenet1_1 \(.*{message}"):
        load_checkpoint(tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=rf"x\.pth do not match squeezenet1_1 \(.*{message}"):
        load_checkpoint(tmp_path / "x.pth", ModelOptions("squeezenet1_1"))


def test_a_wrong_name_is_an_error(tmp_path: Path) -> None:
    save(new_weights(), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=r"do not match resnet18 \(missing conv1\.weight, .* and \d+ more;"):
        load_checkpoint(tmp_path / "x.pth", ModelOptions("resnet18"))
    with pytest.raises(UsageError, match="unknown model 'lhz': did you mean 'lzh'"):
        load_checkpoint(tmp_path / "x.pth", ModelOptions("lhz"))


@pytest.mark.parametrize("name", ["lzh", "resnet18", "squeezenet1_1"])
def test_no_network_is_guessed(tmp_path: Path, name: str) -> None:
    save({"state_dict": new_weights(name), "arch": name}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=rf"without their network, which it calls {name}; .*--model {name}"):
        load_checkpoint(tmp_path / "x.pth")


# --- the user's own network


def test_the_network_of_the_user(tmp_path: Path, net: nn.Module) -> None:
    path = save(
        {"model_state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, tmp_path / "x"
    )
    checkpoint = load_external(path, f"{tmp_path}/net.py:Net")
    assert checkpoint.spec.model == "net"
    assert checkpoint.spec.source is not None
    assert (checkpoint.spec.source.kind, checkpoint.spec.source.name) == ("python", "net.py:Net")
    assert len(checkpoint.spec.class_names) == 3
    assert same_outputs(checkpoint, net)


def test_a_network_with_a_fixed_number_of_outputs(tmp_path: Path, net: nn.Module) -> None:  # noqa: ARG001
    weights = nn.Conv2d(3, 4, 3).state_dict()
    path = save({f"conv.{key}": value for key, value in weights.items()}, tmp_path / "x.pth")
    assert len(load_external(path, f"{tmp_path}/net.py:Fixed").spec.class_names) == 4


def test_a_network_that_is_pruned_itself_keeps_its_masks(tmp_path: Path, net: nn.Module) -> None:
    prune.l1_unstructured(net.conv, "weight", 0.5)
    path = save(net.state_dict(), tmp_path / "x.pth")
    checkpoint, _ = load_with_notes(path, ModelOptions(f"{tmp_path}/net.py:Pruned"))
    assert "conv.weight_mask" in checkpoint.weights
    assert same_outputs(checkpoint, net)


def test_a_network_with_weight_norm_keeps_it(tmp_path: Path, net: Any) -> None:
    nn.utils.parametrizations.weight_norm(net.conv)
    path = save(net.state_dict(), tmp_path / "x.pth")
    checkpoint, notes = load_with_notes(path, ModelOptions(f"{tmp_path}/net.py:Normalized"))
    assert notes == []
    assert "conv.parametrizations.weight.original0" in checkpoint.weights
    assert same_outputs(checkpoint, net)


# --- the spec


@pytest.mark.slow
def test_the_size_of_the_images_is_that_of_the_network(tmp_path: Path) -> None:
    saved = models.vit_b_16(num_classes=3, image_size=32)
    path = save(saved.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=r"pos_embedding has shape \[1, 5, 768\] instead of \[1, 197, 768\]"):
        load_checkpoint(path, ModelOptions("vit_b_16"))
    options = ModelOptions("vit_b_16", overrides=SpecOverrides({"input": {"height": 32, "width": 32}}))
    assert same_outputs(load_checkpoint(path, options), saved)


def test_one_logit_stands_for_two_classes(tmp_path: Path) -> None:
    path = save(new_weights("squeezenet1_1", 1), tmp_path / "x.pth")
    spec = load_external(path, "squeezenet1_1").spec
    assert (spec.outputs, spec.activation, spec.class_names) == (1, "sigmoid", ("class 0", "class 1"))


def test_invalid_fields_are_reported(tmp_path: Path) -> None:
    path = save(new_weights(), tmp_path / "x.pth")
    with pytest.raises(SpecError, match="the stated input is not valid"):
        load_checkpoint(path, ModelOptions("lzh", overrides=SpecOverrides({"input": {"height": -1}})))
