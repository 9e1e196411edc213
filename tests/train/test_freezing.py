import pytest
import torch
from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_train.freezing import freeze


def network() -> nn.Module:
    parts = {
        "stem": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        "body": nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)),
        "head": nn.Linear(4, 2),
    }
    return nn.ModuleDict(parts)


def frozen_names(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize(
    ("patterns", "names", "layers"),
    [
        ((), [], []),
        (("stem.*",), ["stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"], ["stem.1"]),
        (("stem.1.weight",), ["stem.1.weight"], []),  # its bias is trained, so its statistics move
        (("body.0.*", "body.2.b*"), ["body.0.weight", "body.0.bias", "body.2.bias"], []),
        (
            ("body.?.*",),
            [f"body.{number}.{key}" for number in (0, 2) for key in ("weight", "bias")],
            ["body.1", "body.2"],
        ),
        (("*.0.weight",), ["stem.0.weight", "body.0.weight"], []),
    ],
)
def test_patterns_select_parameters_and_layers(patterns: tuple[str, ...], names: list[str], layers: list[str]) -> None:
    module = network()
    found = freeze(module, patterns)
    assert frozen_names(module) == names
    assert [name for name, layer in module.named_modules() if any(layer is one for one in found)] == layers


def test_a_layer_that_the_network_itself_froze_keeps_moving() -> None:
    module = network()
    for parameter in module.get_submodule("stem.1").parameters():
        parameter.requires_grad_(False)
    assert freeze(module, ("body.0.*",)) == []


def test_a_pattern_without_a_match_names_the_layers() -> None:
    with pytest.raises(UsageError) as caught:
        freeze(network(), ("stem.*", "layer1.*"))
    assert str(caught.value) == (
        "--freeze layer1.* matches no parameter: use a pattern such as 'stem*'; the names start with stem, body, head"
    )


def test_something_has_to_be_left_to_train() -> None:
    with pytest.raises(UsageError, match=r"--freeze \*\.\* leaves nothing to train"):
        freeze(network(), ("*.*",))


def test_frozen_statistics_are_those_of_the_weights() -> None:
    layer = nn.BatchNorm2d(3)
    module = nn.Sequential(layer, nn.Conv2d(3, 2, 1))
    [frozen] = freeze(module, ("0.*",))
    module.train()
    frozen.eval()
    module(torch.randn(8, 3, 4, 4) + 5)
    assert layer.running_mean is not None
    assert torch.equal(layer.running_mean, torch.zeros(3))
