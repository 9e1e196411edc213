"""Hostile pickles for tests: files that would run code in a reader that imports and calls what they name."""

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

from cifarx_serve.errors import CifarxError
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.models.options import ModelOptions
from tests.support.external_checkpoints import new_weights


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


def assert_refused(path: Path, message: str = r"\.pth") -> None:
    """Assert that a file is refused, whether the user states a network or not."""
    for model in (None, "lzh"):
        with pytest.raises(CifarxError, match=message):
            load_checkpoint(path, ModelOptions(model))
