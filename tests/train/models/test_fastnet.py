import io
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cifarx_serve.spec import InputSpec
from cifarx_train.models.registry import get_architecture


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fastnet(images: Tensor) -> nn.Module:
    """An initialized network that has seen one batch, so that its running statistics are not the defaults."""
    torch.manual_seed(0)
    architecture = get_architecture("fastnet")
    module = architecture.build(10)
    assert architecture.initialize is not None
    architecture.initialize(module, images)
    with torch.no_grad():
        module(images)
    return module.eval()


def train_steps(module: nn.Module, images: Tensor, count: int) -> list[float]:
    module.train()
    labels = torch.arange(len(images)) % 10
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    losses = []
    for _ in range(count):
        loss = functional.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_default_input_is_32x32_in_0_to_1() -> None:
    assert get_architecture("fastnet").input == InputSpec(height=32, width=32)


def test_trained_parameters(fastnet: nn.Module) -> None:
    trained = {
        name: tuple(parameter.shape) for name, parameter in fastnet.named_parameters() if parameter.requires_grad
    }
    assert trained == {
        "whitening.bias": (24,),
        "groups.0.0.weight": (64, 24, 3, 3),
        "groups.0.2.bias": (64,),
        "groups.0.4.weight": (64, 64, 3, 3),
        "groups.0.5.bias": (64,),
        "groups.1.0.weight": (256, 64, 3, 3),
        "groups.1.2.bias": (256,),
        "groups.1.4.weight": (256, 256, 3, 3),
        "groups.1.5.bias": (256,),
        "groups.2.0.weight": (256, 256, 3, 3),
        "groups.2.2.bias": (256,),
        "groups.2.4.weight": (256, 256, 3, 3),
        "groups.2.5.bias": (256,),
        "head.weight": (10, 256),
    }
    assert sum(parameter.numel() for parameter in fastnet.parameters() if parameter.requires_grad) == 1_971_352


def test_convolutions_are_initialized_to_the_identity_on_the_first_channels() -> None:
    weights = get_architecture("fastnet").build(10).state_dict()
    images = torch.rand(2, 24, 8, 8)
    outputs = functional.conv2d(images, weights["groups.0.0.weight"], padding=1)
    assert torch.allclose(outputs[:, :24], images)
    assert outputs[:, 24:].std() > 0.01
    images = torch.rand(2, 256, 8, 8)
    assert torch.allclose(functional.conv2d(images, weights["groups.2.4.weight"], padding=1), images)


def test_only_the_whitening_and_scales_are_fixed(fastnet: nn.Module, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in fastnet.state_dict().items()}
    losses = train_steps(fastnet, images, 12)
    unchanged = {name for name, tensor in fastnet.state_dict().items() if torch.equal(tensor, before[name])}
    scales = {f"groups.{group}.{layer}.weight" for group in range(3) for layer in (2, 5)}
    assert unchanged == {"whitening.weight", *scales}
    assert all((before[name] == 1).all() for name in scales)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("side", [32, 33, 48, 64, 96])
@pytest.mark.parametrize("training", [True, False])
def test_any_size_from_32_returns_one_logit_per_class(side: int, training: bool) -> None:
    module = get_architecture("fastnet").build(7, InputSpec(height=side, width=side)).train(training)
    assert module(torch.rand(2, 3, side, side)).shape == (2, 7)


def test_initialization_depends_only_on_the_images(images: Tensor) -> None:
    architecture = get_architecture("fastnet")
    assert architecture.initialize is not None
    first, second, other = (architecture.build(10) for _ in range(3))
    for module, inputs in ((first, images), (second, images), (other, images.square())):
        architecture.initialize(module, inputs)
    for name in ("whitening.weight", "whitening.bias"):
        assert torch.equal(first.state_dict()[name], second.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert architecture.build(10).training
    assert first.training


def test_the_state_dict_restores_the_network(fastnet: nn.Module, images: Tensor) -> None:
    buffer = io.BytesIO()
    torch.save(fastnet.state_dict(), buffer)
    buffer.seek(0)
    restored = get_architecture("fastnet").build(10).eval()
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(restored(images), fastnet(images))


def test_traced_logits_are_the_same(fastnet: nn.Module, images: Tensor) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated")
        traced = torch.jit.freeze(torch.jit.trace(fastnet, images[:2]).eval())
        assert torch.allclose(traced(images), fastnet(images), atol=1e-6)


def test_exported_logits_are_the_same_for_any_batch(fastnet: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from inside the exporter
        program = torch.onnx.export(
            fastnet, (images[:2],), dynamo=True, dynamic_shapes=({0: "batch"},), external_data=False, verbose=False
        )
    assert program is not None
    program.save(tmp_path / "fastnet.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "fastnet.onnx", providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    for count in (1, 2, 5):
        (logits,) = session.run(None, {entry.name: images[:count].numpy()})
        np.testing.assert_allclose(logits, fastnet(images[:count]).detach().numpy(), atol=1e-5)


def test_half_precision_and_channels_last(fastnet: nn.Module, images: Tensor) -> None:
    expected = fastnet(images)
    module = fastnet.to(memory_format=torch.channels_last)
    assert torch.allclose(module(images.contiguous(memory_format=torch.channels_last)), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(images)
        loss = functional.cross_entropy(module.train()(images).float(), torch.arange(8))
    assert torch.allclose(logits.float(), expected, atol=0.1 * float(expected.detach().abs().max()))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


def test_compiles_as_one_graph(fastnet: nn.Module, images: Tensor) -> None:
    compiled = torch.compile(fastnet, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(images), fastnet(images), atol=1e-6)
