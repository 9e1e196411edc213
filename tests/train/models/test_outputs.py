from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.outputs import (
    OutputKey,
    SingleOutput,
    count_outputs,
    require_outputs,
    runs_with,
    with_one_output,
)

SIZE = InputSpec(height=4, width=5)
SOURCE = ModelSource(kind="python", name="model.py:Net")
Named = namedtuple("Named", ["logits", "auxiliary"])


@dataclass
class Record:
    logits: Tensor
    loss: Tensor | None = None


class Network(nn.Module):
    """Returns `wrap(features, logits)`: (N, 8) and (N, 3)."""

    def __init__(self, wrap: Any = lambda _features, logits: logits) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(60, 8), nn.Linear(8, 3)
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        features = self.body(images.flatten(1))
        return self.wrap(features, self.head(features))


WRAPPED: dict[str, tuple[Any, OutputKey]] = {
    "dict": (lambda features, logits: {"features": features, "logits": logits}, "logits"),
    "dict with one fitting tensor": (lambda features, logits: {"a": features, "b": logits}, "b"),
    "tuple": (lambda features, logits: (features, logits), 1),
    "list": (lambda features, logits: [logits, features], 0),
    "named tuple": (lambda _features, logits: Named(logits, logits + 1), "logits"),
    "dataclass": (lambda _features, logits: Record(logits), "logits"),
    "one-element tuple": (lambda _features, logits: (logits,), 0),
}


def source(output: OutputKey | None) -> ModelSource:
    return ModelSource(kind="python", name="model.py:Net", output=output)


def test_a_network_with_one_tensor_is_not_wrapped() -> None:
    network = Network()
    assert require_outputs(network, 3, SIZE, SOURCE) is network


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_logits_are_taken_out_of(kind: str) -> None:
    wrap, key = WRAPPED[kind]
    network = Network(wrap)
    adapted = require_outputs(network, 3, SIZE, SOURCE)
    assert isinstance(adapted, SingleOutput)
    assert adapted.key == key
    images = torch.rand(6, 3, 4, 5)
    assert torch.equal(adapted(images), network.head(network.body(images.flatten(1))))


def test_the_state_dict_is_that_of_the_network() -> None:
    network, other = Network(WRAPPED["dict"][0]), Network(WRAPPED["dict"][0])
    adapted, target = (require_outputs(each, 3, SIZE, SOURCE) for each in (network, other))
    assert adapted.state_dict().keys() == network.state_dict().keys()
    target.load_state_dict(adapted.state_dict())
    assert torch.equal(other.head.weight, network.head.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({})
    parallel = nn.Sequential(adapted)  # a module that contains it, as in distributed training
    assert next(iter(parallel.state_dict())) == "0.body.weight"


def test_several_fitting_tensors_are_a_question() -> None:
    network = Network(lambda _features, logits: (logits, logits.softmax(1)))
    with pytest.raises(UsageError) as caught:
        require_outputs(network, 3, SIZE, SOURCE)
    assert str(caught.value) == (
        "model.py:Net returns a tuple (0 (N, 3), 1 (N, 3)), of which 2 fit 3 classes: return the logits alone, or "
        "state which output they are, as in source.output = 0 in --spec FILE"
    )
    chosen = require_outputs(network, 3, SIZE, source(1))
    assert torch.allclose(chosen(torch.rand(2, 3, 4, 5)).sum(1), torch.ones(2))


@pytest.mark.parametrize("output", [2, "logits", -5])
def test_a_stated_output_that_is_not_there(output: OutputKey) -> None:
    network = Network(lambda features, logits: (features, logits))
    with pytest.raises(UsageError, match=r"returns no tensor .* but a tuple .*: correct source.output in --spec FILE"):
        require_outputs(network, 3, SIZE, source(output))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda features, _logits: features, "model.py:Net has 8 outputs, not 3: give as many class names"),
        (lambda _features, logits: logits[:, :1], "model.py:Net has 1 output, not 3: "),
        (lambda _features, logits: logits[..., None, None], r"returns \(N, 3, 1, 1\): return one tensor \(N, 3\)"),
        (lambda _features, logits: logits.argmax(1, keepdim=True).repeat(1, 3), "returns int64: return logits"),
        (lambda features, _logits: {"a": features}, r"a dict \(a \(N, 8\)\), of which none fits 3 classes"),
        (lambda _features, _logits: {}, r"a dict \(no tensors\), of which none fits 3 classes"),
        (lambda _features, _logits: "text", r"a str \(no tensors\), of which none fits"),
    ],
)
def test_other_outputs_are_refused(wrap: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        require_outputs(Network(wrap), 3, SIZE, SOURCE)


def test_a_network_that_does_not_run_names_the_line() -> None:
    with pytest.raises(UsageError) as caught:
        require_outputs(Network(), 3, InputSpec(height=7, width=7), SOURCE)
    assert str(caught.value).startswith("model.py:Net does not run with 3x7x7 images (test_outputs.py line ")
    assert "mat1 and mat2 shapes cannot be multiplied" in str(caught.value)


@pytest.mark.parametrize("batch", [1, 64])
def test_a_network_with_a_fixed_batch_size_is_told_so(batch: int) -> None:
    class Fixed(Network):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images.reshape(batch, 3, 4, 5))

    with pytest.raises(UsageError) as caught:
        require_outputs(Fixed(), 3, SIZE, SOURCE)
    assert str(caught.value).startswith(f"model.py:Net runs only with batches of {batch} (test_outputs.py line ")
    assert str(caught.value).endswith(
        "): flatten with x.flatten(1), or reshape with x.shape[0], instead of a fixed batch size"
    )


def test_a_network_that_mixes_images_of_another_size_is_told_so() -> None:
    class Mixing(Network):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images.reshape(-1, 60))

    size = InputSpec(height=8, width=10)
    assert not runs_with(Mixing(), size)
    with pytest.raises(UsageError, match=r"returns 8 rows for 2 images of 3x8x10: state the size .* --image-size, and"):
        require_outputs(Mixing(), 3, size, SOURCE)


def test_running_a_network_changes_nothing() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(60, 3))
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    require_outputs(network, 3, SIZE, SOURCE)
    assert with_one_output(network, 3, SIZE, SOURCE) is network
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in network.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_several_tensors_in_training_mode_only() -> None:
    class Auxiliary(Network):
        def forward(self, images: Tensor) -> Any:
            logits = super().forward(images)
            return {"logits": logits, "auxiliary": logits} if self.training else logits

    network = Auxiliary()
    assert require_outputs(network, 3, SIZE, SOURCE) is network
    adapted = with_one_output(network, 3, SIZE, SOURCE)
    images = torch.rand(2, 3, 4, 5)
    assert adapted.train()(images).shape == adapted.eval()(images).shape == (2, 3)


@pytest.mark.parametrize(
    ("wrap", "stated", "expected"),
    [
        (lambda _features, logits: logits, None, 3),
        (lambda features, logits: {"logits": logits, "features": features}, None, 3),
        (lambda features, logits: (features, logits), None, None),
        (lambda features, logits: (features, logits), 0, 8),
        (lambda _features, logits: (logits, logits), None, 3),
        (lambda _features, _logits: {}, None, None),
    ],
)
def test_the_number_of_outputs(wrap: Any, stated: OutputKey | None, expected: int | None) -> None:
    assert count_outputs(Network(wrap), SIZE, source(stated)) == expected


def test_which_inputs_a_network_supports() -> None:
    assert runs_with(Network(), SIZE)
    assert not runs_with(Network(), InputSpec(height=5, width=5))
    assert runs_with(nn.Flatten(), InputSpec(height=5, width=5, channels=1, color="L", layout="NHWC"))
