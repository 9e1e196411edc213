"""Hostile files, which would run code, exhaust the memory or loop forever, are rejected."""

import functools
import io
import os
import pickle
import pickletools
import runpy
import shutil
import subprocess
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from cifarx_serve.errors import CifarxError, ModelFileError
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.checkpoints.legacy.safe_unpickle import ObjectStub, safe_load
from cifarx_train.models.options import ModelOptions
from tests.support.legacy_checkpoints import both_formats, new_weights, save


class Call:
    """An object that is pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def module_with_state(state: dict[str, Any]) -> nn.Module:
    """Return a module whose attributes are replaced by `state`."""
    module = nn.Identity()
    vars(module).clear()
    vars(module).update(state)
    return module


def with_pickle(path: Path, *pickles: bytes) -> Path:
    """Write a PyTorch archive with these bytes as its pickle. Several are stored under the same name."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore", UserWarning)  # about a duplicate name
        for name, value in content.items():
            for data in pickles if name.endswith("data.pkl") else (value,):
                archive.writestr(name, data)
    return path


def imported_names(path: Path) -> set[str]:
    """Return the globals that a file imports, according to Python's pickle disassembler, which runs nothing."""
    with path.open("rb") as file:
        streams: list[Any] = [file]
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.infolist() if entry.filename.endswith(".pkl")]
                streams = [io.BytesIO(archive.read(entry)) for entry in entries]
        file.seek(0)
        return {name for stream in streams for name in _imports(stream, 1 if stream is not file else 5)}


def _imports(stream: Any, pickles: int) -> Iterator[str]:
    for _ in range(pickles):
        texts: list[str] = []
        for code, argument, _position in pickletools.genops(stream):
            if code.name in ("GLOBAL", "INST"):
                names = {"__builtin__": "builtins", "posix": "os", "nt": "os", "commands": "subprocess"}  # Python 2's
                module, name = str(argument).split(" ")
                yield f"{names.get(module, module)}.{name}"
            elif code.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:]).replace("posix.", "os.")
            elif isinstance(argument, str):
                texts.append(argument)


def shell_command(marker: Path) -> str:
    return f"echo > {marker}"


def python_code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')"


CALLS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda marker: Call(os.system, shell_command(marker)),
    "subprocess.Popen": lambda marker: Call(subprocess.Popen, ["/bin/sh", "-c", shell_command(marker)]),
    "builtins.eval": lambda marker: Call(eval, python_code(marker)),
    "builtins.exec": lambda marker: Call(exec, python_code(marker)),
    "builtins.__import__": lambda _: Call(__import__, "antigravity"),
    "builtins.getattr": lambda _: Call(getattr, Call(__import__, "os"), "system"),
    "io.open": lambda marker: Call(open, str(marker), "w"),
    "torch.serialization.load": lambda marker: Call(torch.load, str(marker)),
    "torch.hub.load": lambda marker: Call(torch.hub.load, str(marker), "model"),
    "runpy.run_path": lambda marker: Call(runpy.run_path, str(marker)),
    "shutil.rmtree": lambda marker: Call(shutil.rmtree, str(marker)),
    "pickle.loads": lambda marker: Call(pickle.loads, pickle.dumps(Call(os.system, shell_command(marker)))),
    "torch.nn.modules.linear.Linear": lambda _: Call(nn.Linear, 10**9, 10**9),
}


def hide(payload: Any) -> dict[str, Any]:
    """Return contents of a file that contain the payload in different locations."""
    hidden = OrderedDict(new_weights())
    hidden["model.8.bias"] = payload
    deep: Any = payload
    for _ in range(50):
        deep = [{"deeper": deep}]
    module = nn.Sequential(nn.Linear(2, 2))
    module.hidden = payload
    return {
        "whole": payload,
        "weight": hidden,
        "deep": {"state_dict": new_weights(), "args": deep},
        "attribute": module,
        "hook": module_with_state({"_parameters": {}, "_modules": {}, "_forward_hooks": OrderedDict({0: payload})}),
        "partial": {"state_dict": new_weights(), "call": functools.partial(OrderedDict, payload)},
    }


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


def assert_refused(path: Path, message: str = r"\.pth") -> None:
    for model in (None, "lzh"):
        with pytest.raises(CifarxError, match=message):
            load_checkpoint(path, ModelOptions(model))


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


def test_two_pickles_with_the_same_name_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bad = pickle.dumps(Call(os.system, shell_command(marker)), 2)
    for number, pickles in enumerate([(bad, pickle.dumps({}, 2)), (pickle.dumps({}, 2), bad)]):
        path = with_pickle(tmp_path / f"{number}.pth", *pickles)
        assert "os.system" in imported_names(path)
        assert_refused(path)
    assert not marker.exists()


def test_a_state_cannot_replace_setstate(tmp_path: Path) -> None:
    """The first BUILD sets the attribute `__setstate__`; the second would call it on an object with a `__dict__`."""
    set_state = b"}X\x0c\x00\x00\x00__setstate__c__builtin__\nset\nsb"
    made = b"ctorch.nn.modules.linear\nIdentity\n)\x81"
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02" + made + set_state + b"]K\x01ab.")
    assert imported_names(path) == {"torch.nn.modules.linear.Identity", "builtins.set"}
    loaded = safe_load(path)
    assert isinstance(loaded, ObjectStub)
    assert loaded.state == [1]
    assert_refused(path, "contains no weights of a network")


def test_methods_of_an_ordered_dict_are_not_called(tmp_path: Path) -> None:
    """The file replaces the `items` method of an OrderedDict."""
    ordered_dict = (
        b"ccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00itemscbuiltins\nset\nX\x03\x00\x00\x00getcbuiltins\nset\nub"
    )
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02" + ordered_dict + b".")
    assert vars(safe_load(path)) == {"items": set, "get": set}
    assert_refused(path, "contains no weights of a network")


def test_modules_that_contain_each_other_are_refused(tmp_path: Path) -> None:
    root = module_with_state({"_parameters": {"weight": torch.zeros(1)}})
    vars(root)["_modules"] = {"again": root, "and": root}
    path = save(root, tmp_path / "x.pth")
    assert imported_names(path) >= {"torch.nn.modules.linear.Identity"}
    assert_refused(path, "the modules in .* contain each other")


@pytest.mark.parametrize("name", [["deep"], ("a", 1), "x" * 10**6, "a\n"])
def test_parameters_with_invalid_names_are_refused(tmp_path: Path, name: Any) -> None:
    name = tuple(name) if isinstance(name, list) else name
    save(module_with_state({"_parameters": {name: torch.zeros(1)}, "_modules": {}}), tmp_path / "x.pth")
    assert_refused(tmp_path / "x.pth", "a weight with an invalid name")


def test_a_torchscript_archive_is_not_a_checkpoint(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(Twice(), torch.zeros(1)), tmp_path / "x.pth")
    assert any(name.startswith("__torch__") for name in imported_names(tmp_path / "x.pth"))
    assert_refused(tmp_path / "x.pth", r"not a readable checkpoint \(a TorchScript archive\)")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02\x8b\xff\xff\xff\x7f",  # LONG4 of 2 GiB
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string of 2 GiB
        b"\x80\x02" + b"(" * 10**5 + b".",
        b"\x80\x02" + b"]" + b"\x85" * 10**5 + b".",
        b"\x80\x02" + b"K\x01r\xff\xff\xff\x7f" + b"j\xfe\xff\xff\x7f.",
        b"\x80\x02ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
        b"\x80\x02R.",
        b"\x80\x02N" * 1000,
        b"",
    ],
    ids=["long", "string", "marks", "nested tuples", "memo", "tensor", "empty stack", "no stop", "empty"],
)
def test_pickles_that_would_exhaust_the_memory_are_refused(tmp_path: Path, data: bytes) -> None:
    assert_refused(with_pickle(tmp_path / "x.pth", data))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_in_the_old_format_is_refused(tmp_path: Path, fraction: float) -> None:
    path = save(models.squeezenet1_1(num_classes=10), tmp_path / "x.pth", zipped=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    assert_refused(path, "not a readable checkpoint")
