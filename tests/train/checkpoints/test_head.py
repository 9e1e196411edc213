from pathlib import Path

import pytest

from cifarx_serve.errors import UsageError
from cifarx_train.checkpoints.head import head_keys
from cifarx_train.models.options import ModelOptions
from cifarx_train.models.sources import find_architecture

NETWORKS = """
from torch import nn

class Open(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.final = nn.Conv2d(4, num_classes, 1)

    def forward(self, images):
        return self.final(self.body(images)).mean((2, 3))

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3072, 6)
        self.last = nn.Linear(6, 6)

    def forward(self, images):
        return self.last(self.first(images.flatten(1)))

class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)

    def forward(self, images):
        return self.body(images).mean((2, 3))[:, :5]
"""


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("lzh", {"model.8.weight", "model.8.bias"}),
        ("fastnet", {"head.weight"}),
        ("resnet18", {"fc.weight", "fc.bias"}),
        ("squeezenet1_1", {"classifier.1.weight", "classifier.1.bias"}),
        ("vgg11", {"classifier.6.weight", "classifier.6.bias"}),
        ("vit_b_16", {"heads.head.weight", "heads.head.bias"}),
        ("timm/mobilenetv3_small_050", {"classifier.weight", "classifier.bias"}),
        ("networks.py:Open", {"final.weight", "final.bias"}),
        ("networks.py:Fixed", {"last.weight", "last.bias"}),
    ],
)
def test_the_head_is_the_layer_for_the_classes(model: str, keys: set[str], tmp_path: Path) -> None:
    (tmp_path / "networks.py").write_text(NETWORKS)
    if model.startswith("timm/"):
        pytest.importorskip("timm")
    architecture = find_architecture(ModelOptions(model))
    assert head_keys(architecture, architecture.input) == keys


def test_a_network_without_such_a_layer(tmp_path: Path) -> None:
    (tmp_path / "networks.py").write_text(NETWORKS)
    architecture = find_architecture(ModelOptions("networks.py:Pooled"))
    with pytest.raises(UsageError, match=r"networks.py:Pooled has no layer whose size is the number of classes"):
        head_keys(architecture, architecture.input)
