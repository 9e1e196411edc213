"""Small networks to quantize, and images for them."""

import warnings

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto
from torch import nn

from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import InputSpec, ModelSpec

SPEC = ModelSpec(
    model="small",
    class_names=tuple("abcdefghij"),
    input=InputSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    precision="int8",
)


class ResidualNetwork(nn.Module):
    """A residual block and a linear head, with every kind of node that an image classifier has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.deep(x))
        x = nn.functional.max_pool2d(torch.relu(self.wide(x)), 4)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class AttentionNetwork(nn.Module):
    """An addition after a linear layer, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.linear(self.norm(tokens))
        logits: torch.Tensor = self.head(tokens.mean(1))
        return logits


class TwoBlockNetwork(nn.Module):
    """Two residual blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 10, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.first(x))
        x = torch.relu(x + self.first(x))
        logits: torch.Tensor = self.second(x).mean((2, 3))
        return logits


def vision_transformer() -> nn.Module:
    """Return a small ViT of torchvision. In its attention, the batch is the second dimension."""
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)
        network.get_parameter("heads.head.weight").data.normal_()  # zeros otherwise
    return network.eval()


def residual_network() -> ResidualNetwork:
    """Return an untrained `ResidualNetwork` with a bias that makes it predict at least six of the classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = ResidualNetwork().eval()
    with torch.no_grad():
        logits = module(torch.from_numpy(normalize(color_blobs(500), SPEC.input)))
        module.head.bias.sub_(logits.mean(0))
        assert len((logits - logits.mean(0)).argmax(1).unique()) > 5
    return module


def color_blobs(count: int) -> np.ndarray:
    """Return images of colored squares. Unlike noise, they differ in what a convolution extracts."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def export_fp32(module: nn.Module) -> ModelProto:
    """Return the ONNX model of a network, in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (torch.rand(2, 3, 32, 32),), dynamo=True, dynamic_shapes=({0: "batch"},), input_names=["input"],
            output_names=["logits"], opset_version=18, verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model_proto


def run_model(model: ModelProto, inputs: np.ndarray) -> np.ndarray:
    """Return the logits of an ONNX model."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"input": inputs})[0])
