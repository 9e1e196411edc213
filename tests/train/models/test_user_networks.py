from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.options import SpecOverrides
from cifarx_train.models.user_code import load_user_object, parse_reference
from cifarx_train.models.user_networks import callable_architecture, find_input, module_architecture
from tests.support.user_code import write_networks


def architecture(name: str, **arguments: Any) -> Architecture:
    """Return the architecture of an object of `model.py` in the current folder."""
    write_networks(Path())
    reference = f"model.py:{name}"
    source = ModelSource(kind="python", name=reference, arguments=arguments)
    return callable_architecture(name.lower(), load_user_object(reference), source, parse_reference(reference))


def error_of(name: str, **arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        architecture(name, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("Net", {}), ("Wide", {"width": 4}), ("small", {}), ("small", {"width": 8}), ("Dict", {"width": 4})],
)
def test_the_number_of_classes_is_passed_to_a_parameter_for_it(name: str, arguments: dict[str, Any]) -> None:
    found = architecture(name, **arguments)
    assert found.num_outputs is None
    for outputs in (2, 13):
        module = found.build(outputs)
        assert module.training
        assert module.eval()(torch.zeros(1, *found.input.shape)).shape == (1, outputs)


def test_an_argument_of_the_user_is_not_replaced() -> None:
    found = architecture("Net", classes=4)
    assert found.num_outputs == 4
    assert found.build(4)(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(UsageError, match=r"model.py:Net has 4 outputs, not 5: give as many class names"):
        found.build(5)


@pytest.mark.parametrize(("name", "outputs"), [("fixed", 7), ("Mnist", 10), ("net", 3)])
def test_a_network_with_a_fixed_number_of_classes(name: str, outputs: int) -> None:
    found = architecture(name)
    assert found.num_outputs == outputs
    assert found.find_num_outputs({}) == outputs
    found.build(outputs)
    with pytest.raises(UsageError, match=f"has {outputs} outputs, not 12"):
        found.build(12)


def test_the_number_of_classes_is_found_from_the_shapes_of_weights() -> None:
    found = architecture("Net")
    shapes = {key: tuple(tensor.shape) for key, tensor in found.build(23).state_dict().items()}
    assert found.find_num_outputs(shapes) == 23
    assert found.find_num_outputs({"conv1.weight": (6, 3, 5, 5)}) is None
    assert found.find_num_outputs({"fc3.weight": (23,)}) is None


def test_a_module_object_is_copied() -> None:
    found = architecture("net")
    one, other = found.build(3), found.build(3)
    with torch.no_grad():
        one.get_parameter("head.bias").add_(1)
    assert not torch.equal(one.get_parameter("head.bias"), other.get_parameter("head.bias"))
    assert found.weights is not None
    assert found.weights.num_outputs == 3
    assert found.weights.load().keys() == one.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Net", InputSpec(height=32, width=32)),
        ("Mnist", InputSpec(height=28, width=28, channels=1, color="L")),
        ("net", InputSpec(height=32, width=32)),
    ],
)
def test_the_default_input_is_one_that_the_network_supports(name: str, size: InputSpec) -> None:
    assert architecture(name).input == size


def test_a_network_that_supports_no_usual_input_says_why_when_it_is_built() -> None:
    found = architecture("Odd")
    with pytest.raises(UsageError, match=r"model.py:Odd does not run with 3x32x32 images \(model.py line \d+: shape"):
        found.build(10)


def test_another_size() -> None:
    found = architecture("small")
    tall = InputSpec(height=40, width=24)
    assert found.build(5, tall)(torch.zeros(1, 3, 40, 24)).shape == (1, 5)
    with pytest.raises(UsageError, match=r"model.py:Net does not run with 3x64x64 images"):
        architecture("Net").build(5, InputSpec(height=64, width=64))


def test_wrong_arguments() -> None:
    assert error_of("Wide") == ("model.py:Wide needs width: give it with --model-arg, such as --model-arg width=VALUE")
    assert error_of("Net", clases=3) == (
        "unknown argument of model.py:Net 'clases': did you mean 'classes'? choose from classes"
    )
    assert error_of("Mnist", width=3) == "model.py:Mnist takes no argument width: leave out --model-arg"
    assert error_of("net", width=3).startswith("model.py:net is a module, which takes no argument width: ")
    assert error_of("Wide", width="a").startswith("model.py line ")


def test_what_is_no_network() -> None:
    assert error_of("number") == "model.py:number is int 5: name a class, a function or a module"
    assert error_of("text").startswith("model.py:text returns str, not a module: name a class derived from")
    assert "raised ZeroDivisionError (division by zero)" in error_of("Broken")


def test_a_parameter_for_the_names_of_the_classes_gets_no_number() -> None:
    def make(classes: tuple[str, ...] = ("a", "b")) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(classes)))

    assert callable_architecture("make", make, ModelSource(kind="entry_point", name="make")).num_outputs == 2


# --- modules in memory


def network(outputs: int = 3) -> nn.Module:
    layers = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(3, outputs))
    return nn.Sequential(layers)


def test_a_module_in_memory_is_copied_to_fp32() -> None:
    module = network().double().eval()
    found = module_architecture(module, SpecOverrides())
    assert (found.name, found.source, found.num_outputs) == (
        "sequential",
        ModelSource(kind="module", name="Sequential"),
        3,
    )
    built = found.build(3)
    assert built.get_parameter("head.weight").dtype == torch.float32
    assert module.get_parameter("head.weight").dtype == torch.float64
    assert not module.training


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_module_in_a_wrapper(wrap: Any) -> None:
    found = module_architecture(wrap(network()), SpecOverrides())
    assert list(found.build(3).state_dict()) == ["head.weight", "head.bias"]


def test_a_module_with_a_stated_input() -> None:
    stated = SpecOverrides({"input": {"height": 8, "width": 6, "color": "L"}})
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    found = module_architecture(flat, stated)
    assert found.input == InputSpec(height=8, width=6, channels=1, color="L")
    assert found.num_outputs == 4
    with pytest.raises(UsageError, match="Sequential does not run with 3x32x32 images"):
        module_architecture(flat, SpecOverrides())


def test_a_module_that_cannot_be_copied() -> None:
    module = network()
    module.view = module.get_parameter("head.weight") * 2  # not a leaf
    with pytest.raises(UsageError, match=r"Sequential cannot be copied \(.*\): give a module that copy.deepcopy can"):
        module_architecture(module, SpecOverrides())


def test_the_first_usual_input_is_found() -> None:
    assert find_input(network()) == InputSpec(height=32, width=32)
    assert find_input(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2))) == InputSpec(height=224, width=224)
    assert find_input(nn.Linear(5, 5)) is None
