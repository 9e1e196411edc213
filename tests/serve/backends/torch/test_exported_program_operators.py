"""The operators that an exported program may use can only compute with tensors."""

import pytest
import torch
from torch._ops import OpOverloadPacket

from cifarx_serve.backends.torch import exported_program_operators
from cifarx_serve.backends.torch.exported_program_operators import is_allowed

HARMLESS_TYPES = {
    "Tensor", "number", "int", "float", "bool", "str", "Device", "Optional[Device]", "Optional[Generator]",
    "List[Tensor]", "List[Optional[Tensor]]", "List[int]", "Optional[Tensor]", "Optional[bool]", "Optional[float]",
    "Optional[int]", "Optional[number]", "Optional[str]", "Optional[List[float]]", "Optional[List[int]]",
}  # fmt: skip
"""Types of arguments, of which none is a storage, a stream, a file or an object of a class. A layout or a dtype is an
integer."""


def allowed_overloads() -> list[torch._ops.OpOverload]:
    names = sorted(exported_program_operators._ATEN)
    packets = [
        getattr(torch.ops.aten, name)
        for name in (*names, *(f"{name}_" for name in names))
        if hasattr(torch.ops.aten, name)
    ]
    return [
        getattr(packet, overload)
        for packet in packets
        for overload in packet.overloads()
        if is_allowed(f"torch.ops.aten.{packet.__name__}.{overload}")
    ]


def test_every_operator_exists() -> None:
    assert [name for name in exported_program_operators._ATEN if not hasattr(torch.ops.aten, name)] == []


def test_arguments_are_tensors_and_numbers() -> None:
    overloads = allowed_overloads()
    assert len(overloads) > 400
    for overload in overloads:
        types = {str(argument.type) for argument in overload._schema.arguments}
        assert types <= HARMLESS_TYPES, overload


def test_no_operator_writes_to_an_argument_other_than_its_first() -> None:
    for overload in allowed_overloads():
        written = [argument.is_write for argument in overload._schema.arguments]
        assert not any(written[1:]), overload


def test_no_overload_is_an_attribute_of_python() -> None:
    """PyTorch looks operators up as attributes, and those of Python could be called too."""
    assert {name for name in exported_program_operators._OVERLOADS if hasattr(OpOverloadPacket, name)} == set()


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.relu.default",
        "torch.ops.aten.add_.Tensor",
        "torch.ops.aten.lstm.input",
        "torch.ops.aten.__and__.Tensor",
        "_operator.getitem",
    ],
)
def test_allowed(target: str) -> None:
    assert is_allowed(target)


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.set_.source_Tensor",
        "torch.ops.aten.as_strided.default",
        "torch.ops.aten.empty_like.default",
        "torch.ops.aten.resize_.default",
        "torch.ops.aten.sort.values",
        "torch.ops.aten.add.out",
        "torch.ops.aten.add.overloads",
        "torch.ops.aten.add.op",
        "torch.ops.aten.add.__call__",
        "torch.ops.aten.add.Tensor.__class__",
        "torch.ops.aten.add",
        "torch.ops.aten.Add.Tensor",
        "torch.ops.aten.add__.Tensor",
        "torch.ops.prim.device.default",
        "torch.ops.higher_order.cond",
        "torch.ops.torchvision.deform_conv2d.default",
        "torch.ops.load_library",
        "torch.load",
        "aten.add.Tensor",
        " torch.ops.aten.add.Tensor",
        "torch.ops.aten.add.Tensor\n",
        "_operator.pow",
        "_operator.call",
        "_operator.attrgetter",
        "_operator.add.__class__",
        "operator.add",
        "builtins.eval",
        "",
    ],
)
def test_not_allowed(target: str) -> None:
    assert not is_allowed(target)
