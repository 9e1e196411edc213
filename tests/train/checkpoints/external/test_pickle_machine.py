"""The pickle machine returns what Python's unpickler returns for plain values, and stubs for everything else."""

import io
import pickle
import struct
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_train.checkpoints.external.pickle_machine import (
    COMPUTED_NAME,
    Evaluation,
    Global,
    ObjectStub,
    evaluate_pickle,
    require_key,
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    SCALARS,
    lambda items: st.lists(items) | st.tuples(items, items) | st.dictionaries(KEYS, items),
    max_leaves=20,
)


def evaluated(data: bytes, constructors: dict[str, Any] | None = None) -> Evaluation:
    def no_ids(persistent_id: Any) -> Any:
        return ("persistent", persistent_id)

    return evaluate_pickle(io.BytesIO(data), constructors or {}, no_ids)


@given(VALUES, st.integers(3, 5))
def test_plain_values_round_trip(value: Any, protocol: int) -> None:
    found = evaluated(pickle.dumps(value, protocol))
    assert found.value == value
    assert not found.called


@given(st.recursive(SCALARS.filter(lambda value: type(value) is not bytes), st.lists, max_leaves=5))
def test_plain_values_round_trip_in_the_first_protocols(value: Any) -> None:
    for protocol in (0, 1, 2):
        assert evaluated(pickle.dumps(value, protocol)).value == value


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets_of_later_protocols(protocol: int) -> None:
    for value in ({1, "a"}, frozenset({1}), bytearray(b"abc") if protocol == 5 else {2}):
        assert evaluated(pickle.dumps(value, protocol)).value == value


def test_an_object_that_contains_itself() -> None:
    value: list[Any] = [1]
    value.append(value)
    found = evaluated(pickle.dumps(value)).value
    assert found[1] is found


class Thing:
    def __init__(self) -> None:
        self.size = 3


class Items(list[int]):
    pass


class Mapping(dict[str, int]):
    pass


def test_objects_become_stubs_with_their_state() -> None:
    stub = evaluated(pickle.dumps(Thing())).value
    assert isinstance(stub, ObjectStub)
    assert stub.name.endswith("test_pickle_machine.Thing")
    assert (stub.state, stub.arguments, stub.called) == ({"size": 3}, (), False)
    assert evaluated(pickle.dumps(Items([1, 2]))).value.items == [1, 2]
    assert evaluated(pickle.dumps(Mapping(a=1))).value.mapping == {"a": 1}


def test_calls_become_stubs_with_their_arguments() -> None:
    found = evaluated(b"\x80\x02cdatetime\ndate\nK\x01K\x02\x86R.")
    assert isinstance(found.value, ObjectStub)
    assert (found.value.name, found.value.arguments, found.value.called) == ("datetime.date", (1, 2), True)
    assert found.called == found.imported == {"datetime.date"}


def test_globals_are_names() -> None:
    found = evaluated(pickle.dumps([Thing, len]))
    assert [type(value) for value in found.value] == [Global, Global]
    assert found.value[1] == Global("builtins.len")
    assert "builtins.len" in found.imported
    assert not found.called


def test_names_of_python_2_are_those_of_python_3() -> None:
    assert evaluated(b"c__builtin__\nxrange\n.").value == Global("builtins.range")
    assert evaluated(b"ccopy_reg\n_reconstructor\n.").value == Global("copyreg._reconstructor")


def test_constructors_make_values() -> None:
    constructors = {"collections.OrderedDict": OrderedDict, "builtins.complex": complex}
    value = OrderedDict(a=1j)
    found = evaluated(pickle.dumps(value), constructors)
    assert found.value == value
    assert type(found.value) is OrderedDict
    assert found.called == {"collections.OrderedDict", "builtins.complex"}


def test_the_state_of_a_plain_value_is_ignored() -> None:
    """A file could replace the methods of an OrderedDict."""
    ordered = (
        b"ccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00itemscbuiltins\nset\nX\x03\x00\x00\x00getcbuiltins\nset\nub."
    )
    value = evaluated(ordered, {"collections.OrderedDict": OrderedDict}).value
    assert vars(value) == {}


def test_a_state_cannot_replace_setstate() -> None:
    """The first BUILD sets the attribute `__setstate__`; the second one would call it on a real object."""
    set_state = b"}X\x0c\x00\x00\x00__setstate__c__builtin__\nset\nsb"
    made = b"ctorch.nn.modules.linear\nIdentity\n)\x81"
    stub = evaluated(b"\x80\x02" + made + set_state + b"]K\x01ab.").value
    assert isinstance(stub, ObjectStub)
    assert stub.state == [1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (b"ctorch._C\n_VariableFunctionsClass\nX\x04\x00\x00\x00relu", Global("torch.relu")),
        (b"c__main__\nThing\n)\x81X\x04\x00\x00\x00step", "__main__.Thing.step"),
    ],
)
def test_getattr_of_functions_and_methods(arguments: bytes, expected: Any) -> None:
    found = evaluated(b"\x80\x02c__builtin__\ngetattr\n" + arguments + b"\x86R.")
    assert (found.value if isinstance(found.value, Global) else found.value.name) == expected
    assert "builtins.getattr" not in found.imported


@pytest.mark.parametrize(
    "arguments",
    [
        b"cos\nenviron\nX\x03\x00\x00\x00get",
        b"ctorch._C\n_VariableFunctionsClass\nX\x03\x00\x00\x00a.b",
        b"c__main__\nThing\n)\x81X\x09\x00\x00\x00__class__",
        b"c__main__\nthing\n)RX\x04\x00\x00\x00step",
        b"X\x01\x00\x00\x00aX\x05\x00\x00\x00upper",
    ],
)
def test_any_other_getattr_is_recorded(arguments: bytes) -> None:
    found = evaluated(b"\x80\x02c__builtin__\ngetattr\n" + arguments + b"\x86R.")
    assert "builtins.getattr" in found.called


def test_a_call_of_the_result_of_a_call_is_recorded() -> None:
    found = evaluated(b"\x80\x02c__main__\nmake\n)R)R.")
    assert found.called == {"__main__.make", COMPUTED_NAME}
    method = evaluated(b"\x80\x02c__builtin__\ngetattr\nc__main__\nThing\n)\x81X\x04\x00\x00\x00step\x86R)R.")
    assert COMPUTED_NAME in method.called


def test_persistent_ids_are_loaded() -> None:
    assert evaluated(b"\x80\x02X\x02\x00\x00\x00idQ.").value == ("persistent", "id")
    assert evaluated(b"Pid\n.").value == ("persistent", "id")


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x97", b"\x98"])
def test_extension_codes_and_buffers_are_refused(code: bytes) -> None:
    """An extension code is a global that only the registry of another process can resolve."""
    with pytest.raises(ValueError, match="unsupported pickle instruction"):
        evaluated(b"\x80\x05N" + code + b".")


@pytest.mark.parametrize("items", [b"N", b"K\x01", b"X\x01\x00\x00\x00a", b"c__main__\nThing\n"])
def test_items_of_something_else_are_refused(items: bytes) -> None:
    for change in (b"K\x01a.", b"K\x01K\x02s.", b"(K\x01e.", b"(K\x01K\x02u."):
        with pytest.raises(ValueError, match="items of a"):
            evaluated(b"\x80\x02" + items + change)


def test_a_long_key_is_refused() -> None:
    assert require_key(("a", (1, 2))) == ("a", (1, 2))
    nested: Any = 1
    for _ in range(100):
        nested = (nested, nested)
    with pytest.raises(ValueError, match="a key of more than 1000 items"):
        require_key(nested)


@given(st.binary(max_size=100), st.sampled_from([b"", b"\x80\x02", b"\x80\x04\x95"]))
def test_random_bytes_raise_an_exception_or_are_a_pickle(data: bytes, start: bytes) -> None:
    with suppress(ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError, struct.error, OverflowError):
        evaluated(start + data)
