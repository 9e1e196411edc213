"""Names in a file: what would run code is refused, what is only unknown becomes a stub, and nothing runs."""

import argparse
import collections
import copyreg
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import ipaddress
import itertools
import logging
import operator
import pickletools
import random
import sys
import types
import uuid
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.transforms import v2

from cifarx_serve.errors import ModelFileError
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.models.options import ModelOptions
from tests.support.external_checkpoints import both_formats, new_weights, save
from tests.support.hostile_pickles import (
    CALLS,
    Call,
    assert_refused,
    hide,
    imported_names,
    shell_command,
    with_pickle,
)


@both_formats
@pytest.mark.parametrize(
    ("name", "location"),
    [*((name, "whole") for name in CALLS)]
    + [("os.system", location) for location in ("weight", "deep", "attribute", "hook", "partial")],
)
def test_a_call_in_a_file_is_reported_and_not_made(tmp_path: Path, name: str, location: str, zipped: bool) -> None:
    marker = tmp_path / "marker"
    path = save(hide(CALLS[name](marker))[location], tmp_path / "x.pth", zipped)
    assert name in imported_names(path)
    for model in (None, "lzh"):
        with pytest.raises(ModelFileError, match=r"x\.pth would run code \(.*\): it was not loaded") as caught:
            load_checkpoint(path, ModelOptions(model))
        assert name in str(caught.value)
    assert not marker.exists()


def test_a_builtin_as_a_hook_is_refused(tmp_path: Path) -> None:
    """The payload would be called only in a forward pass, not while loading."""
    module = models.squeezenet1_1(num_classes=10)
    module._forward_hooks[0] = eval
    path = save(module, tmp_path / "x.pth")
    assert "builtins.eval" in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert_refused(path, r"would run code \(builtins\.eval\)")


SYSTEM = {
    "GLOBAL": b"cposix\nsystem\n(X%bt\x85R.",
    "GLOBAL of Python 2": b"cnt\nsystem\n(X%bt\x85R.",
    "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93(X%bt\x85R.",
    "STACK_GLOBAL from the memo": b"\x8c\x05posix\x94\x8c\x06system\x9400h\x00h\x01\x93(X%bt\x85R.",
    "INST": b"(X%biposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nX%bo.",
    "NEWOBJ": b"cposix\nsystem\nX%b\x85\x81.",
    "BUILD": b"cposix\nsystem\nX%b\x85b.",
    "DUP": b"cposix\nsystem\n20X%b\x85R.",
}


@pytest.mark.parametrize("protocol", [b"", b"\x80\x02", b"\x80\x04"])
@pytest.mark.parametrize("opcode", SYSTEM)
def test_every_way_to_call_a_function_is_refused(tmp_path: Path, opcode: str, protocol: bytes) -> None:
    marker = tmp_path / "marker"
    text = shell_command(marker).encode()
    path = with_pickle(tmp_path / "x.pth", protocol + SYSTEM[opcode] % (len(text).to_bytes(4, "little") + text))
    assert any(name.endswith(".system") for name in imported_names(path)) or "memo" in opcode
    assert_refused(path, r"would run code \(os\.system\): it was not loaded")
    assert not marker.exists()


def test_a_name_that_is_computed_while_loading_is_refused(tmp_path: Path) -> None:
    name = b"cbuiltins\nstr.join\nX\x00\x00\x00\x00(X\x03\x00\x00\x00sysX\x03\x00\x00\x00teml\x86R"
    path = with_pickle(tmp_path / "x.pth", b"\x80\x04\x8c\x02os" + name + b"\x93X\x02\x00\x00\x00ls\x85R.")
    with zipfile.ZipFile(path) as archive:
        codes = [code.name for code, _, _ in pickletools.genops(archive.read("x/data.pkl"))]
    assert "STACK_GLOBAL" in codes
    assert_refused(path, r"would run code \(a name that is computed while loading, builtins\.str\.join\)")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (fractions.Fraction(1).__reduce__, "builtins.getattr"),
        (Call(getattr, "text", "upper"), "builtins.getattr"),
        (Call(operator.attrgetter, "system"), "operator.attrgetter"),
        (Call(torch.compile, nn.Identity()), "torch.compile"),
        (Call(torch.from_file, "secret"), "torch.from_file"),
        (Call(np.load, "secret"), "numpy.load"),
        (Call(np.fromfile, "secret"), "numpy.fromfile"),
        (Call(models.get_model, "resnet18"), "torchvision.models._api.get_model"),
        (functools.partial(print, "x"), "builtins.print"),
        ([sys.exit], "sys.exit"),
    ],
)
def test_other_functions_are_refused(tmp_path: Path, value: Any, name: str) -> None:
    path = save({"state_dict": new_weights(), "extra": value}, tmp_path / "x.pth")
    assert_refused(path, rf"would run code \((.*, )?{name}(, .*)?\)")


@pytest.mark.parametrize("package", ["cloudpickle.cloudpickle", "dill._dill"])
def test_functions_made_from_byte_code_are_refused(tmp_path: Path, package: str) -> None:
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02c" + package.encode() + b"\n_create_function\n(tR.")
    assert_refused(path, rf"would run code \({package}\._create_function\)")


def test_the_backend_of_modules_before_pytorch_1_5_is_no_problem(tmp_path: Path) -> None:
    """Each module had an attribute that was saved as a call without arguments."""
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02ctorch.nn.backends.thnn\n_get_thnn_function_backend\n)R.")
    assert_refused(path, "contains no weights of a network")


# --- what programs save beside the weights


@dataclasses.dataclass
class Config:
    """A configuration of a training program."""

    lr: float = 0.1

    def copy(self) -> "Config":
        return dataclasses.replace(self)


class Phase(enum.Enum):
    """A state of a training program."""

    TRAIN = 1


class Options(dict[str, int]):
    """A dict with attributes, as configuration libraries have."""


class Point(collections.namedtuple("Point", "x y")):
    """A tuple with names."""

    __slots__ = ()


def optimizer() -> torch.optim.Optimizer:
    module = nn.Linear(2, 2)
    made = torch.optim.Adam(module.parameters())
    module(torch.rand(1, 2)).sum().backward()
    made.step()
    return made


EXTRAS: dict[str, Any] = {
    "array": np.arange(6.0).reshape(2, 3),
    "scalar": np.float64(1),
    "numpy generator": np.random.default_rng(0),
    "numpy state": np.random.get_state(),
    "strings": np.array(["a", "b"]),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "counter": collections.Counter("ab"),
    "deque": collections.deque([1, 2], 5),
    "datetime": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "timedelta": datetime.timedelta(1),
    "enum": Phase.TRAIN,
    "dataclass": Config(),
    "dict of another class": Options(a=1),
    "named tuple": Point(1, 2),
    "path": Path("a") / "b",
    "pure path": PurePosixPath("a"),
    "namespace": argparse.Namespace(lr=0.1),
    "simple namespace": types.SimpleNamespace(lr=0.1),
    "partial": functools.partial(Config, lr=1),
    "optimizer": optimizer(),
    "scheduler": torch.optim.lr_scheduler.StepLR(optimizer(), 1),
    "criterion": nn.CrossEntropyLoss(torch.ones(3)),
    "transform": v2.Compose([v2.Resize(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    "method": Config().copy,
    "random": random.Random(0),
    "random state": random.getstate(),
    "generator state": torch.get_rng_state(),
    "device": torch.device("cuda", 1),
    "dtype": torch.bfloat16,
    "size": torch.Size([1, 2]),
    "set": {"a", "b"},
    "frozenset": frozenset({1}),
    "bytes": b"\x00\xff",
    "complex": 1j,
    "decimal": decimal.Decimal("0.1"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.uuid4(),
    "address": ipaddress.ip_address("127.0.0.1"),
    "counter of steps": itertools.chain([1]),
    "logger": logging.getLogger("training"),
    "error": ValueError("diverged"),
    "slice": slice(1, 2),
    "large number": 10**100,
    "activation": torch.relu,
    "class": nn.Linear,
    "parameter": nn.Parameter(torch.ones(2)),
}


@both_formats
@pytest.mark.parametrize("name", EXTRAS)
def test_what_programs_save_beside_the_weights_is_no_problem(tmp_path: Path, name: str, zipped: bool) -> None:
    weights = new_weights()
    content = {"epoch": 1, "state_dict": weights, "extra": EXTRAS[name], "more": [{"deep": EXTRAS[name]}]}
    loaded = load_checkpoint(save(content, tmp_path / "x.pth", zipped), ModelOptions("lzh")).weights
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    weights = new_weights()
    torch.save({"state_dict": weights, **EXTRAS}, tmp_path / "x.pth", pickle_protocol=protocol)
    loaded = load_checkpoint(tmp_path / "x.pth", ModelOptions("lzh")).weights
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_no_method_of_an_object_runs(tmp_path: Path) -> None:
    """The class can be imported, and each way in which a pickle makes or fills an object would write the marker."""
    marker = tmp_path / "marker"
    code = types.ModuleType("trap")
    exec(
        f"def run(*_, **__): open({str(marker)!r}, 'w')\n"
        "class Trap(dict):\n"
        "    def __new__(cls, *args): made = dict.__new__(cls); run() if ARMED else None; return made\n"
        "    def __setstate__(self, state): run()\n"
        "    def __setitem__(self, key, value): run() if ARMED else dict.__setitem__(self, key, value)\n"
        "    def __reduce__(self): return (Trap, (1,), {'a': 1}, iter([1]), iter([(1, 2)]))\n"
        "    def append(self, item): run()\n"
        "    def extend(self, items): run()\n"
        "    def __hash__(self): run() if ARMED else None; return 1\n",
        code.__dict__,
    )
    code.__dict__["ARMED"] = False
    sys.modules["trap"] = code
    try:
        path = save({"state_dict": new_weights(), "extra": code.Trap(), "set": {1: code.Trap()}}, tmp_path / "x.pth")
        code.__dict__["ARMED"] = True
        assert "trap.Trap" in imported_names(path)
        load_checkpoint(path, ModelOptions("lzh"))
    finally:
        del sys.modules["trap"]
    assert not marker.exists()


def test_objects_of_the_first_pickle_protocols_become_stubs(tmp_path: Path) -> None:
    class Old:
        def __reduce_ex__(self, _protocol: Any) -> Any:
            return copyreg.__dict__["_reconstructor"], (Config, object, None), {"lr": 1}

    path = save({"state_dict": new_weights(), "extra": Old()}, tmp_path / "x.pth")
    assert "copyreg._reconstructor" in imported_names(path) or "copy_reg._reconstructor" in imported_names(path)
    assert load_checkpoint(path, ModelOptions("lzh")).spec.model == "lzh"
