"""Train a network of your own, export it to ONNX with the parity check, and classify an image.

    python examples/own_network.py dog.png --data builtin --epochs 2

A checkpoint contains the name of its network and never the code, so that every step names this file. The command line
does the same: `cifarx train --model own_network.py:tiny_resnet`, then `cifarx export --ckpt tiny_resnet_1.pth --model
own_network.py:tiny_resnet --format onnx`. The ONNX file runs anywhere.
"""

import argparse
import sys

from torch import Tensor, nn

import cifarx

NETWORK = f"{__file__}:tiny_resnet"


class Residual(nn.Module):
    """Maps (N, channels, H, W) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.relu(features + self.layers(features))


def tiny_resnet(classes: int) -> nn.Module:
    """Return a network that maps (N, 3, H, W) to logits (N, classes), for images of any size from 4x4."""
    return nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=3, stride=2, padding=1),
        Residual(32),
        nn.Conv2d(32, 64, kernel_size=2, stride=2),
        Residual(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, export and run a network of your own.")
    parser.add_argument("image")
    parser.add_argument("--data", default="auto", help="cifar10, builtin, or a folder with train/CLASS and test/CLASS")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    trained = cifarx.train(NETWORK, data=options.data, recipe_name="fast", epochs=options.epochs)
    print(f"trained {trained.checkpoints[-1]}, test accuracy {trained.test_accuracy:.2%}")

    (exported,) = cifarx.export(trained.checkpoints[-1], ["onnx"], model=NETWORK, data=options.data)
    parity = exported.report.summary
    if not parity.passed:
        sys.exit(f"error: the parity check failed: see {exported.report_path}")
    print(f"exported {exported.path}, agreement {parity.agreement:.2%} on {parity.images} images")

    with cifarx.load(exported.path) as model:
        prediction = model.predict(options.image)
    print(f"{options.image}: {prediction.label} {prediction.score:.4f}")


if __name__ == "__main__":
    try:
        main()
    except cifarx.CifarxError as error:
        sys.exit(f"error: {error}")
