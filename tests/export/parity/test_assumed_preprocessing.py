"""An assumed preprocessing is refused where another one is better."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cifarx_export.parity.assumed_preprocessing import require_no_better_preprocessing
from cifarx_export.parity.compare import Reference, run_reference
from cifarx_export.parity.data import ParityData
from cifarx_serve.devices import Device
from cifarx_serve.errors import CheckFailed
from cifarx_serve.spec import Assumption, InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint
from cifarx_train.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from cifarx_train.pytorch_backend import PyTorchBackend
from tests.support.level_model import CLASSES, LEVELS, SIDE, Levels

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, len(CLASSES), 1000)


def pictures() -> NDArray[np.uint8]:
    """Return images with the levels of red and blue of their classes."""
    images = RANDOM.integers(0, 256, (len(LABELS), SIDE, SIDE, 3))
    levels = np.array(LEVELS)[LABELS][:, None, None]
    images[..., [0, 2]] = levels + RANDOM.integers(-12, 13, images[..., [0, 2]].shape)
    return images.astype(np.uint8)


IMAGES = pictures()
ASSUMED: tuple[Assumption, ...] = ("preprocessing",)


def check(
    size: InputSpec,
    assumed: tuple[Assumption, ...] = ASSUMED,
    labels: NDArray[np.int64] | None = LABELS,
    module: nn.Module | None = None,
) -> list[str]:
    spec = ModelSpec(model="levels", class_names=CLASSES, input=size, assumed=assumed)
    network = module or Levels()
    lines: list[str] = []
    checkpoint = Checkpoint(spec, dict(network.state_dict()), {}, lambda: network)
    with PyTorchBackend.from_checkpoint(checkpoint, Device("cpu")) as backend:
        reference: Reference = run_reference(backend, ParityData(IMAGES, labels, "pictures", "0" * 64))
        require_no_better_preprocessing(backend, reference, "my net.pth", lines.append)
    return lines


def test_a_better_scaling_is_named() -> None:
    with pytest.raises(CheckFailed) as caught:
        check(InputSpec(height=SIDE, width=SIDE))
    assert caught.value.problem.endswith("with the assumed preprocessing, but 100.0% with ImageNet's mean and std")
    assert "--preprocessing, or --mean and --std, find it with `cifarx diagnose 'my net.pth'`" in caught.value.remedy
    assert caught.value.exit_status == 1


def test_the_other_order_of_the_colors_is_named() -> None:
    size = InputSpec(height=SIDE, width=SIDE, color="BGR", mean=IMAGENET_MEAN[::-1], std=IMAGENET_STD[::-1])
    with pytest.raises(CheckFailed, match=r"100\.0% with ImageNet's mean and std and RGB images"):
        check(size)


def test_the_right_one_is_kept() -> None:
    size = InputSpec(height=SIDE, width=SIDE, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert check(size) == ["reference: comparing other preprocessings, because this one is assumed"]


def test_a_slightly_better_one_is_only_noted() -> None:
    class Weak(Levels):
        """Answers the first class for seven of eight images, whatever their scaling."""

        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            answered = images[:, 1, 0].argmax(1) == 0
            return torch.where(answered[:, None], logits, logits.new_tensor([1.0, 0, 0, 0, 0, 0]))

    lines = check(InputSpec(height=SIDE, width=SIDE), module=Weak())
    assert lines[-1].startswith("note: accuracy ")
    assert lines[-1].endswith("with ImageNet's mean and std")


def test_luck_is_no_reason() -> None:
    class Guesses(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            waves = (images.flatten(1)[:, :96] * 1e4).sin()
            return waves.reshape(-1, 6, 16).sum(2)

    check(InputSpec(height=SIDE, width=SIDE), module=Guesses())


def test_nothing_is_tried_without_need() -> None:
    size = InputSpec(height=SIDE, width=SIDE)
    assert check(size, assumed=("output",)) == []
    assert check(size, labels=None) == []
