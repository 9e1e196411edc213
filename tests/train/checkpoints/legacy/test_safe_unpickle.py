"""Hostile files: each would run, allocate or loop, and none is let."""

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
from cifarx_train.checkpoints.legacy.safe_unpickle import StandIn, load_safely
from tests.support.legacy_files import both_formats, save, weights


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def built(state: dict[str, Any]) -> nn.Module:
    """A module that is saved with this for its state."""
    module = nn.Identity()
    vars(module).clear()
    vars(module).update(state)
    return module


def with_pickle(path: Path, *pickles: bytes) -> Path:
    """A PyTorch archive around these bytes; more than one go under the same name."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore", UserWarning)  # of a name that is there twice
        for name, value in content.items():
            for data in pickles if name.endswith("data.pkl") else (value,):
                archive.writestr(name, data)
    return path


def asked_for(path: Path) -> set[str]:
    """What the file's pickles import, by Python's own disassembler, which runs nothing."""
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
                module, name = argument.split(" ")
                yield f"{names.get(module, module)}.{name}"
            elif code.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:]).replace("posix.", "os.")
            elif isinstance(argument, str):
                texts.append(argument)


def command(marker: Path) -> str:
    return f"echo > {marker}"


def python(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')"


CALLS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda marker: Call(os.system, command(marker)),
    "subprocess.Popen": lambda marker: Call(subprocess.Popen, ["/bin/sh", "-c", command(marker)]),
    "builtins.eval": lambda marker: Call(eval, python(marker)),
    "builtins.exec": lambda marker: Call(exec, python(marker)),
    "builtins.__import__": lambda _: Call(__import__, "antigravity"),
    "builtins.getattr": lambda _: Call(getattr, Call(__import__, "os"), "system"),
    "io.open": lambda marker: Call(open, str(marker), "w"),
    "torch.serialization.load": lambda marker: Call(torch.load, str(marker)),
    "torch.hub.load": lambda marker: Call(torch.hub.load, str(marker), "model"),
    "runpy.run_path": lambda marker: Call(runpy.run_path, str(marker)),
    "shutil.rmtree": lambda marker: Call(shutil.rmtree, str(marker)),
    "pickle.loads": lambda marker: Call(pickle.loads, pickle.dumps(Call(os.system, command(marker)))),
    "torch.nn.modules.linear.Linear": lambda _: Call(nn.Linear, 10**9, 10**9),
}


def places(payload: Any) -> dict[str, Any]:
    hidden = OrderedDict(weights())
    hidden["model.8.bias"] = payload
    deep: Any = payload
    for _ in range(50):
        deep = [{"deeper": deep}]
    module = nn.Sequential(nn.Linear(2, 2))
    module.hidden = payload
    return {
        "whole": payload,
        "weight": hidden,
        "deep": {"state_dict": weights(), "args": deep},
        "attribute": module,
        "hook": built({"_parameters": {}, "_modules": {}, "_forward_hooks": OrderedDict({0: payload})}),
        "partial": {"state_dict": weights(), "call": functools.partial(OrderedDict, payload)},
    }


@both_formats
@pytest.mark.parametrize(
    ("name", "place"),
    [*((name, "whole") for name in CALLS)]
    + [("os.system", place) for place in ("weight", "deep", "attribute", "hook", "partial")],
)
def test_a_call_in_a_file_is_named_and_never_made(tmp_path: Path, name: str, place: str, zipped: bool) -> None:
    marker = tmp_path / "marker"
    path = save(places(CALLS[name](marker))[place], tmp_path / "x.pth", zipped)
    assert name in asked_for(path)
    for model in (None, "lzh"):
        with pytest.raises(ModelFileError, match=r"x\.pth would run code \(.*\): it is not loaded") as caught:
            load_checkpoint(path, model)
        assert name in str(caught.value)
    assert not marker.exists()


def refused(path: Path, words: str = r"\.pth") -> None:
    for model in (None, "lzh"):
        with pytest.raises(CifarxError, match=words):
            load_checkpoint(path, model)


def test_a_hook_that_is_a_builtin(tmp_path: Path) -> None:
    """Nothing is called while loading: the payload waits for the network to be asked."""
    module = models.squeezenet1_1(num_classes=10)
    module._forward_hooks[0] = eval
    path = save(module, tmp_path / "x.pth")
    assert "builtins.eval" in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    refused(path, r"would run code \(builtins\.eval\)")


SYSTEM = {
    "GLOBAL": b"cposix\nsystem\n(X%bt\x85R.",
    "GLOBAL of Python 2": b"cnt\nsystem\n(X%bt\x85R.",
    "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93(X%bt\x85R.",
    "STACK_GLOBAL out of the memo": b"\x8c\x05posix\x94\x8c\x06system\x9400h\x00h\x01\x93(X%bt\x85R.",
    "INST": b"(X%biposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nX%bo.",
    "NEWOBJ": b"cposix\nsystem\nX%b\x85\x81.",
    "BUILD": b"cposix\nsystem\nX%b\x85b.",
    "DUP": b"cposix\nsystem\n20X%b\x85R.",
}


@pytest.mark.parametrize("protocol", [b"", b"\x80\x02", b"\x80\x04"])
@pytest.mark.parametrize("way", SYSTEM)
def test_pickles_put_together_by_hand(tmp_path: Path, way: str, protocol: bytes) -> None:
    marker = tmp_path / "marker"
    text = command(marker).encode()
    path = with_pickle(tmp_path / "x.pth", protocol + SYSTEM[way] % (len(text).to_bytes(4, "little") + text))
    assert any(name.endswith(".system") for name in asked_for(path)) or "memo" in way
    refused(path, r"would run code \(os\.system\): it is not loaded")
    assert not marker.exists()


def test_a_name_put_together_while_loading(tmp_path: Path) -> None:
    name = b"cbuiltins\nstr.join\nX\x00\x00\x00\x00(X\x03\x00\x00\x00sysX\x03\x00\x00\x00teml\x86R"
    path = with_pickle(tmp_path / "x.pth", b"\x80\x04\x8c\x02os" + name + b"\x93X\x02\x00\x00\x00ls\x85R.")
    with zipfile.ZipFile(path) as archive:
        codes = [code.name for code, _, _ in pickletools.genops(archive.read("x/data.pkl"))]
    assert "STACK_GLOBAL" in codes
    refused(path, r"would run code \(a name put together while loading, builtins\.str\.join\)")


def test_two_pickles_under_one_name(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bad = pickle.dumps(Call(os.system, command(marker)), 2)
    for number, pickles in enumerate([(bad, pickle.dumps({}, 2)), (pickle.dumps({}, 2), bad)]):
        path = with_pickle(tmp_path / f"{number}.pth", *pickles)
        assert "os.system" in asked_for(path)
        refused(path)
    assert not marker.exists()


def test_a_second_state_that_would_be_taken_for_a_method(tmp_path: Path) -> None:
    """The first BUILD gives the object a `__setstate__` of the file's; the second would call it."""
    set_state = b"}X\x0c\x00\x00\x00__setstate__c__builtin__\nset\nsb"
    made = b"ctorch.nn.modules.linear\nIdentity\n)\x81"
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02" + made + set_state + b"]K\x01ab.")
    assert asked_for(path) == {"torch.nn.modules.linear.Identity", "builtins.set"}
    loaded = load_safely(path)
    assert isinstance(loaded, StandIn)
    assert loaded.state == [1]
    refused(path, "holds no network's weights")


def test_methods_in_the_attributes_of_a_dict(tmp_path: Path) -> None:
    """An OrderedDict whose `items` is the file's: it must not be asked for its items that way."""
    od = b"ccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00itemscbuiltins\nset\nX\x03\x00\x00\x00getcbuiltins\nset\nub"
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02" + od + b".")
    assert vars(load_safely(path)) == {"items": set, "get": set}
    refused(path, "holds no network's weights")


def test_modules_that_hold_one_another(tmp_path: Path) -> None:
    root = built({"_parameters": {"weight": torch.zeros(1)}})
    vars(root)["_modules"] = {"again": root, "and": root}
    path = save(root, tmp_path / "x.pth")
    assert asked_for(path) >= {"torch.nn.modules.linear.Identity"}
    refused(path, "hold one another without end")


@pytest.mark.parametrize("name", [["deep"], ("a", 1), "x" * 10**6, "a\n"])
def test_parameters_with_odd_names(tmp_path: Path, name: Any) -> None:
    name = tuple(name) if isinstance(name, list) else name
    save(built({"_parameters": {name: torch.zeros(1)}, "_modules": {}}), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "without a proper name")


def test_a_torchscript_archive_is_not_taken_for_one(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls it deprecated
        torch.jit.save(torch.jit.trace(Twice(), torch.zeros(1)), tmp_path / "x.pth")
    assert any(name.startswith("__torch__") for name in asked_for(tmp_path / "x.pth"))
    refused(tmp_path / "x.pth", r"not a checkpoint that can be read \(a TorchScript archive\)")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02\x8b\xff\xff\xff\x7f",  # LONG4 of 2 GiB
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a text of 2 GiB
        b"\x80\x02" + b"(" * 10**5 + b".",
        b"\x80\x02" + b"]" + b"\x85" * 10**5 + b".",
        b"\x80\x02" + b"K\x01r\xff\xff\xff\x7f" + b"j\xfe\xff\xff\x7f.",
        b"\x80\x02ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
        b"\x80\x02R.",
        b"\x80\x02N" * 1000,
        b"",
    ],
    ids=["long", "text", "marks", "nest", "memo", "tensor", "empty stack", "no end", "nothing"],
)
def test_pickles_that_would_exhaust_the_machine(tmp_path: Path, data: bytes) -> None:
    refused(with_pickle(tmp_path / "x.pth", data))


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_of_the_older_format(tmp_path: Path, part: float) -> None:
    path = save(models.squeezenet1_1(num_classes=10), tmp_path / "x.pth", zipped=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refused(path, "not a checkpoint that can be read")
